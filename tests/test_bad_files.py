"""A campaign against every reader: each key and tensor of every kind of file is spoilt in turn.

Loading must either fail with one line that names the file or its folder, or succeed with the right
values. `READ` lists, for each kind of file, the keys that are read and the mutations that leave the
file good. Every other mutation of a key that is read must be refused, and a mutation of a key that
is not read must change nothing.
"""
import io
import json
import shutil
import tempfile
import zipfile
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GEMMA, LLAMA, random_model, write_model, write_shards
from helpers import adapted, one_line, refuses
from lorasae import InputError, load_adapter, load_model, load_sae, save_adapter
from lorasae.io.files import read_json, write_json
from test_sae_formats import (
    D, M, dictionary_learning, gemma_scope, llama_scope, random_tensors, sae_lens_6, sparsify)
from test_shards import numbered, text_of, write_documents

T = random_tensors()
MISSING = object()
DEEP = json.loads('{"a":' * 40 + "1" + "}" * 40)
VALUES = {
    "missing": MISSING, "null": None, "string": "seven", "negative": -3, "zero": 0, "float": 2.5,
    "true": True, "list": [1, 2], "object": {"a": 1}, "nested": DEEP, "huge": 10**30,
    "too long": 10**400}

SMALL = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "attention_bias": False}
GEMMA_SMALL = {
    **GEMMA, **SMALL, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": False}
LLAMA_SMALL = {**LLAMA, **SMALL, "mlp_bias": False}
TOKENS = torch.tensor([[2, 5, 7, 11, 3]])

write_sharded = partial(write_shards, raw=LLAMA_SMALL, shards=2)


def write_sae_lens(kind):
    about = {"hook_head_index": None, "exclude_special_tokens": False, "model_name": "m"}
    own = {"rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    return lambda folder: sae_lens_6(folder, T, kind, about, **own)


def write_dictionary(dict_class):
    def write(folder):
        path = dictionary_learning(folder, T, dict_class, remove_bos=False) / "ae.pt"
        state = torch.load(path)
        unread = {"k", "threshold"} if dict_class == "AutoEncoderTopK" else {"group_sizes", "k"}
        torch.save({name: state[name] for name in state.keys() - unread}, path)
    return write


def write_adapter(folder):
    save_adapter(adapted(random_model(LLAMA_SMALL, 0.2), [1], rank=2, std=1.0), folder)
    written = read_json(folder / "adapter_config.json")         # PEFT writes more keys
    for name in ("use_dora", "use_rslora", "modules_to_save", "fan_in_fan_out"):
        written[name] = False
    write_json(folder / "adapter_config.json", written)


def run_model(folder):
    return load_model(folder)(TOKENS)


def run_sae(folder):
    x = 2 * torch.randn(30, D, generator=torch.Generator().manual_seed(2))
    sae = load_sae(folder, layer=3)
    return torch.cat([sae.encode(x), sae(x), torch.full((30, 1), float(sae.on_special))], dim=1)


def run_adapter(folder):
    return load_adapter(random_model(LLAMA_SMALL, 0.2), folder)(TOKENS)


KINDS = {
    "gemma-2": (lambda folder: write_model(folder, GEMMA_SMALL), run_model),
    "llama": (lambda folder: write_model(folder, LLAMA_SMALL), run_model),
    "sharded llama": (write_sharded, run_model),
    "Gemma Scope": (lambda folder: gemma_scope(folder, T), run_sae),
    "Llama Scope": (lambda folder: llama_scope(folder, T), run_sae),
    "sparsify": (lambda folder: sparsify(
        folder, T, num_latents=M, expansion_factor=1, activation="topk", skip_connection=False,
        transcode=False), run_sae),
    **{f"SAELens {kind}": (write_sae_lens(kind), run_sae)
       for kind in ("topk", "jumprelu")},
    **{f"dictionary_learning {kind}": (write_dictionary(kind), run_sae)
       for kind in ("AutoEncoderTopK", "MatryoshkaBatchTopKSAE")},
    "adapter": (write_adapter, run_adapter),
}

NONE = set()
ABSENT = {"missing", "null"}
A_NUMBER = {"float", "huge"}                            # any positive number is good
CONFIG = {
    **dict.fromkeys([
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads"], NONE),
    **dict.fromkeys(["model_type", "torch_dtype"], ABSENT),
    **dict.fromkeys(["attention_bias", "hidden_act", "max_position_embeddings"], {"missing"}),
    **dict.fromkeys(["bos_token_id", "eos_token_id"], {"missing", "zero", "list"}),
    "tie_word_embeddings": {"missing", "true"}, "rms_norm_eps": {"missing", "zero", *A_NUMBER},
    "rope_theta": {"missing", *A_NUMBER},
}
READ = {
    "gemma-2": {
        **CONFIG, "head_dim": NONE, "hidden_activation": {"missing"},
        "query_pre_attn_scalar": {"missing", *A_NUMBER}, "sliding_window": {"missing"},
        "attn_logit_softcapping": {*ABSENT, *A_NUMBER},
        "final_logit_softcapping": {*ABSENT, *A_NUMBER}, "layer_types": ABSENT,
        "use_bidirectional_attention": ABSENT},
    "llama": {
        **CONFIG, "head_dim": ABSENT, "mlp_bias": {"missing"}, "rope_scaling": ABSENT,
        "rope_scaling.rope_type": NONE, "rope_scaling.factor": A_NUMBER,
        "rope_scaling.low_freq_factor": {"float"}, "rope_scaling.high_freq_factor": A_NUMBER,
        "rope_scaling.original_max_position_embeddings": {"missing"}},
    "Llama Scope": {
        **dict.fromkeys(["hook_point_in", "dataset_average_activation_norm"], NONE),
        **dict.fromkeys([
            "hook_point_out", "act_fn", "norm_activation", "apply_decoder_bias_to_pre_encoder",
            "use_glu_encoder"], {"missing"}),
        **dict.fromkeys(["use_decoder_bias", "sparsity_include_decoder_norm"], {"missing", "true"}),
        "jump_relu_threshold": {"zero", *A_NUMBER},
        "dataset_average_activation_norm.in": A_NUMBER,
        "dataset_average_activation_norm.out": A_NUMBER},
    "sparsify": {
        "k": NONE,
        **dict.fromkeys(["activation", "skip_connection", "transcode"], {"missing"})},
    "SAELens topk": {
        **dict.fromkeys(["architecture", "k"], NONE),
        "rescale_acts_by_decoder_norm": {"missing", "true"},
        "apply_b_dec_to_input": {"missing", "true"}, "normalize_activations": ABSENT,
        "reshape_activations": ABSENT, "metadata": {*ABSENT, "object", "nested"},
        "metadata.hook_name": {*ABSENT, "zero"}, "metadata.hook_head_index": ABSENT,
        "metadata.model_name": {*ABSENT, "string"},
        "metadata.exclude_special_tokens": set(VALUES)},
    "dictionary_learning AutoEncoderTopK": {
        **dict.fromkeys(["trainer", "trainer.dict_class", "trainer.k"], NONE),
        "trainer.layer": ABSENT, "trainer.submodule_name": {*ABSENT, "string"},
        "trainer.lm_name": {*ABSENT, "string"}, "buffer": {*ABSENT, "object", "nested"},
        "buffer.remove_bos": {"missing", "true"}},
    "adapter": {
        "r": NONE, "lora_alpha": A_NUMBER, "lora_dropout": {"missing", "zero"},
        "peft_type": {"missing"}, "bias": {"missing"},
        "use_rslora": {"missing", "true"},
        **dict.fromkeys(["use_dora", "modules_to_save", "fan_in_fan_out"], {*ABSENT, "zero"})},
}


def without(kind, *keys):
    return {key: ends for key, ends in READ[kind].items() if key not in keys}


READ["SAELens jumprelu"] = without("SAELens topk", "k", "rescale_acts_by_decoder_norm")
READ["dictionary_learning MatryoshkaBatchTopKSAE"] = without(
    "dictionary_learning AutoEncoderTopK", "trainer.k")


def json_cases(path, table):
    """Yields (case, change, allowed, read) for every key (nested: "outer.inner") and every value.

    change(path) spoils the file; allowed: the file may still be good; read: the key is read.
    """
    raw = read_json(path)
    for key, value in raw.items():
        inner = value if isinstance(value, dict) else ()
        for *outer, last in [(key,), *((key, name) for name in inner)]:
            place = ".".join([*outer, last])
            for mutation, other in VALUES.items():
                spoilt = deepcopy(raw)
                held = spoilt[key] if outer else spoilt
                held[last] = other
                if other is MISSING:
                    del held[last]
                allowed = mutation in table.get(place, ())
                change = partial(write_json, value=spoilt)
                yield f"{place}: {mutation}", change, allowed, place in table


def with_one(tensor, value):
    """The tensor with its largest number replaced by `value`."""
    return torch.where(tensor == tensor.max(), float(value), tensor.double())


TENSORS = {
    "missing": None,
    "one short": lambda tensor: tensor.flatten()[:-1] if tensor.dim() < 2 else tensor[:-1],
    "one more dimension": lambda tensor: tensor[None],
    "empty": lambda tensor: tensor.flatten()[:0] if tensor.dim() < 2 else tensor[:0],
    "int8": lambda tensor: tensor.to(torch.int8),
    "int64": lambda tensor: tensor.to(torch.int64),
    "bool": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "fp8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "NaN": lambda tensor: with_one(tensor, "nan"),
    "infinite": lambda tensor: with_one(tensor, "inf"),
    "minus infinity": lambda tensor: with_one(tensor, "-inf"),
}


def read_tensors(path):
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write_tensors(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        (torch.save if path.suffix == ".pt" else save_file)(tensors, path)


def tensor_cases(path):
    """Like json_cases, for every tensor and every mutation."""
    tensors = read_tensors(path)
    for name in sorted(tensors):
        if "layers.1" in name and "lora" not in name:
            continue                                    # read like those of layer 0
        one_number = tensors[name].dim() == 0
        for mutation, change in TENSORS.items():
            if mutation == "fp8" and path.suffix == ".npz":
                continue                                # numpy has no fp8
            spoilt = {**tensors}
            tensor = spoilt.pop(name)
            if change is not None:
                spoilt[name] = change(tensor)
            below_all = name == "threshold" and mutation == "minus infinity"        # a ReLU SAE
            allowed = below_all or (one_number and mutation == "one more dimension")
            yield f"{name}: {mutation}", partial(write_tensors, tensors=spoilt), allowed, True


FILES = {
    "gone": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"<html>no such page" * 100),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


def with_key(text):
    """A change that adds a key with this value to a JSON object."""
    end = b', "new": ' + text + b"}"
    return lambda path: path.write_bytes(path.read_bytes().rstrip()[:-1] + end)


JSONS = {
    "a list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "deep": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "not UTF-8": with_key(b'"\xff\xfe"'),
    "an endless number": with_key(b"9" * 10_000),
}


def judged(load, folder, reference, allowed, read):
    """What is wrong with the outcome of a case, or None.

    allowed: the file may still be good; read: the key is read.
    """
    try:
        found = load(folder)
    except (InputError, OSError) as error:
        clear = str(folder) in str(error) and "\n" not in str(error)
        return None if clear else f"unclear line ({error})"
    except Exception as error:                          # reported by the test below
        return f"traceback ({type(error).__name__}: {error})"
    if allowed:
        return None
    if read:
        return "silent success on a wrong value"
    return None if torch.equal(found, reference) else "silent success with other values"


def campaign(kind, tmp):
    """Yields (what was done, what is wrong with the outcome or None) for every case of a kind."""
    write, load = KINDS[kind]
    good = Path(tmp) / "good"
    good.mkdir()
    write(good)
    reference = load(good)
    assert reference.isfinite().all()
    table = READ.get(kind, {})

    for path in sorted(path for path in good.rglob("*") if path.is_file()):
        cases = [(name, change, False, True) for name, change in FILES.items()]
        if path.suffix == ".json":
            cases += [(name, change, False, True) for name, change in JSONS.items()]
            cases += json_cases(path, table) if kind != "sharded llama" else []    # see INDEX_NAMES
        else:
            cases += tensor_cases(path)
        for case, change, allowed, read in cases:
            folder = Path(tempfile.mkdtemp(dir=tmp)) / "spoilt"
            shutil.copytree(good, folder)
            change(folder / path.relative_to(good))
            end = judged(load, folder, reference, allowed, read)
            yield f"{path.relative_to(good)}: {case}", end


@pytest.mark.parametrize("kind", KINDS)
def test_every_spoilt_file_gives_one_clear_line_or_the_right_values(kind, tmp_path):
    ends = list(campaign(kind, tmp_path))
    wrong = [f"{case}: {end}" for case, end in ends if end is not None]
    assert len(ends) > 50 and not wrong, "\n".join(wrong)


def huge_array():
    """The beginning of an .npy file that claims to have 10^13 numbers."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**6)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(1000)


@pytest.mark.parametrize("name", ["W_enc", "b_dec", "threshold"])
def test_an_npz_that_claims_to_be_huge_is_refused_in_one_line(name, tmp_path):
    path = gemma_scope(tmp_path, T) / "params.npz"
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in {**members, f"{name}.npy": huge_array()}.items():
            archive.writestr(member, data)
    refuses(f"cannot read {path}: {name} .*[Aa]rray", load_sae, tmp_path)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The folder of a run's text."""
    folder = tmp_path_factory.mktemp("held-out")
    path = write_documents(folder / "a.jsonl", map(numbered, range(80)))
    text_of(path, folder=folder / "text").close()
    return folder / "text"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_json(**changes):
    return lambda raw: json.dumps({**json.loads(raw), **changes}).encode()


GOOD = np.full((4, 16), 3)
HELD_OUT = [
    ("text.json", [lambda raw, text=text: text for text in (b"", b"{", b"[]", b"null", b"7")]),
    ("text.json", [as_json(documents=value) for value in
                   (None, 7, [], [0, 0], ["0"] * 4, [None] * 4, [[0]] * 4, [float("nan")] * 4)]),
    ("held-out.npy", [lambda raw, data=data: data for data in (
        b"", huge_array(), bytes(5000), npy(GOOD[0]), npy(GOOD[:3]), npy(GOOD[..., None]),
        npy(GOOD + 10**6), npy(-GOOD), npy(GOOD.astype(object)), npy(GOOD.astype(str)))]),
    ("held-out.npy", [lambda raw: raw[:-9], lambda raw: raw[:50]]),
]


@pytest.mark.parametrize("name, changes", HELD_OUT)
def test_spoilt_held_out_text_is_refused_in_one_line(name, changes, held_out, tmp_path):
    folder = Path(shutil.copytree(held_out, tmp_path / "text"))
    good = (folder / name).read_bytes()
    assert len(text_of("nowhere", folder=folder).held_out) == 4
    for change in changes:
        (folder / name).write_bytes(change(good))
        with one_line(str(folder), kind=(InputError, OSError)):
            text_of("nowhere", folder=folder)


INDEX_NAMES = {
    "another folder": "../secret.safetensors", "two up": "..", "here": ".", "empty": "",
    "absolute": "/etc/passwd", "NUL": "model\0.safetensors", "long": "x" * 300 + ".safetensors",
    "a newline": "model\n.safetensors", "no weights": "config.json", "null": None, "a number": 7,
    "a list": ["model.safetensors"], "true": True, "not there": "model-00003.safetensors"}


@pytest.mark.parametrize("case", INDEX_NAMES)
def test_an_index_that_does_not_name_weights_in_its_folder_is_refused(case, tmp_path):
    write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    raw = read_json(index)
    raw["weight_map"][sorted(raw["weight_map"])[3]] = INDEX_NAMES[case]
    write_json(index, raw)
    with one_line(kind=(InputError, OSError)) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)
