"""A campaign against every reader: each JSON key and each tensor of every kind of file spoilt in turn.

A load must end in one of two ways: an InputError of one line that names the file or its folder, or a success whose values are
right. `READ` says, kind by kind, which keys are read and which of the mutations leave a good file; every other mutation of a key
that is read must be refused, and one of a key that nobody reads must change nothing.

    python tests/test_bad_files.py          counts the ways the campaign ended, kind by kind
"""
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import GEMMA, LLAMA, random_weights, write_model                          # noqa: E402
from lorasae.errors import InputError                                                   # noqa: E402
from lorasae.io.adapters import load_adapter, save_adapter                              # noqa: E402
from lorasae.io.models import load_model, parse_config                              # noqa: E402
from lorasae.io.saes import load_sae                                             # noqa: E402
from lorasae.lora import add_lora, adapters                                             # noqa: E402
from lorasae.model import Transformer                                                   # noqa: E402

D, M, K = 8, 12, 3
MISSING = object()
DEEP = json.loads('{"a":' * 40 + "1" + "}" * 40)
VALUES = {"missing": MISSING, "null": None, "string": "seven", "negative": -3, "zero": 0, "float": 2.5, "true": True,
          "list": [1, 2], "object": {"a": 1}, "nested": DEEP, "huge": 10**30, "too long": 10**400}

SMALL = {"vocab_size": 20, "hidden_size": D, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4}
GEMMA_SMALL = {**GEMMA, **SMALL, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False,
               "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": False}
LLAMA_SMALL = {**LLAMA, **SMALL, "attention_bias": False, "mlp_bias": False}
TOKENS = torch.tensor([[2, 5, 7, 11, 3]])


# ---- The files: how each kind is written, and what it computes when it is loaded -------------------------------------

def matrices():
    generator = torch.Generator().manual_seed(0)
    return {"W_enc": torch.randn(M, D, generator=generator), "b_enc": torch.randn(M, generator=generator),
            "W_dec": torch.randn(M, D, generator=generator), "b_dec": torch.randn(D, generator=generator),
            "threshold": torch.rand(M, generator=generator) + 0.5}


def write_gemma(folder):
    write_model(folder, GEMMA_SMALL)


def write_llama(folder):
    write_model(folder, LLAMA_SMALL)


def write_sharded(folder):
    tensors = random_weights(LLAMA_SMALL)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(LLAMA_SMALL))


def write_gemma_scope(folder):
    t = matrices()
    np.savez(folder / "params.npz", W_enc=t["W_enc"].T.numpy(), W_dec=t["W_dec"].numpy(), b_enc=t["b_enc"].numpy(),
             b_dec=t["b_dec"].numpy(), threshold=t["threshold"].numpy())


def write_llama_scope(folder):
    t = matrices()
    (folder / "hyperparams.json").write_text(json.dumps({
        "d_model": D, "d_sae": M, "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post",
        "act_fn": "jumprelu", "jump_relu_threshold": 0.6, "norm_activation": "dataset-wise", "use_decoder_bias": True,
        "dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": 50}))
    (folder / "checkpoints").mkdir()
    save_file({"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T.contiguous(),
               "decoder.bias": t["b_dec"]}, folder / "checkpoints" / "final.safetensors")


def write_sparsify(folder):
    t = matrices()
    (folder / "cfg.json").write_text(json.dumps({
        "expansion_factor": 1, "normalize_decoder": True, "num_latents": M, "k": K, "multi_topk": False, "d_in": D,
        "activation": "topk", "skip_connection": False, "transcode": False}))
    save_file({"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]},
              folder / "sae.safetensors")


def write_sae_lens(architecture):
    def write(folder):
        t = matrices()
        own = {"topk": {"k": K, "rescale_acts_by_decoder_norm": False}, "jumprelu": {},
               "batchtopk": {"k": 3.5, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}}[architecture]
        (folder / "cfg.json").write_text(json.dumps({
            "architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", **own,
            "metadata": {"sae_lens_version": "6.18.0", "hook_name": "blocks.1.hook_resid_post", "hook_head_index": None,
                         "exclude_special_tokens": False}}))
        tensors = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        if architecture == "jumprelu":
            tensors["threshold"] = t["threshold"]
        if architecture == "batchtopk":
            tensors["topk_threshold"] = torch.tensor(0.8, dtype=torch.float64)
        save_file(tensors, folder / "sae_weights.safetensors")
    return write


def write_dictionary_learning(dict_class):
    def write(folder):
        t = matrices()
        (folder / "config.json").write_text(json.dumps({
            "trainer": {"dict_class": dict_class, "activation_dim": D, "dict_size": M, "k": K, "layer": 1, "lm_name": "m",
                        "submodule_name": "resid_post_layer_1"},
            "buffer": {"ctx_len": 64, "remove_bos": False}}))
        if dict_class == "MatryoshkaBatchTopKSAE":
            state = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"],
                     "threshold": torch.tensor(0.8)}
        else:
            state = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T, "b_dec": t["b_dec"],
                     "k": torch.tensor(K, dtype=torch.int32)}
        torch.save(state, folder / "ae.pt")
    return write


def write_adapter(folder):
    torch.manual_seed(1)
    model = add_lora(small_llama(), [1], rank=2)
    for module in adapters(model).values():
        torch.nn.init.normal_(module.lora_B.weight)
    save_adapter(model, folder)


def small_llama():
    """The model that the adapters belong to."""
    model = Transformer(parse_config(LLAMA_SMALL, "the test"))
    model.load_state_dict(random_weights(LLAMA_SMALL))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def run_model(folder):
    return load_model(folder)(TOKENS)


@torch.no_grad()
def run_sae(folder):
    x = 2 * torch.randn(30, D, generator=torch.Generator().manual_seed(2))
    sae = load_sae(folder, layer=1)
    return torch.cat([sae.encode(x), sae(x), torch.full((30, 1), float(sae.on_special))], dim=1)


@torch.no_grad()
def run_adapter(folder):
    return load_adapter(small_llama(), folder)(TOKENS)


KINDS = {
    "gemma-2": (write_gemma, run_model),
    "llama": (write_llama, run_model),
    "sharded llama": (write_sharded, run_model),
    "Gemma Scope": (write_gemma_scope, run_sae),
    "Llama Scope": (write_llama_scope, run_sae),
    "sparsify": (write_sparsify, run_sae),
    "SAELens topk": (write_sae_lens("topk"), run_sae),
    "SAELens jumprelu": (write_sae_lens("jumprelu"), run_sae),
    "SAELens batchtopk": (write_sae_lens("batchtopk"), run_sae),
    "dictionary_learning topk": (write_dictionary_learning("AutoEncoderTopK"), run_sae),
    "dictionary_learning matryoshka": (write_dictionary_learning("MatryoshkaBatchTopKSAE"), run_sae),
    "adapter": (write_adapter, run_adapter),
}


# ---- What may be accepted --------------------------------------------------------------------------------------------

NONE = set()
ABSENT = {"missing", "null"}
A_NUMBER = {"float", "huge"}                            # where any positive number is a good one
CONFIG = {
    "architectures": ABSENT, "model_type": ABSENT, "vocab_size": NONE, "hidden_size": NONE, "intermediate_size": NONE,
    "num_hidden_layers": NONE, "num_attention_heads": NONE, "tie_word_embeddings": {"missing", "true"}, "torch_dtype": ABSENT,
    "attention_bias": {"missing"}, "rms_norm_eps": {"missing", "zero", *A_NUMBER}, "hidden_act": {"missing"},
    "max_position_embeddings": {"missing"}, "rope_theta": {"missing", *A_NUMBER},
    "bos_token_id": {"missing", "zero", "list"}, "eos_token_id": {"missing", "zero", "list"},
}
READ = {
    "gemma-2": {
        **CONFIG, "num_key_value_heads": NONE, "head_dim": NONE, "hidden_activation": {"missing"},
        "query_pre_attn_scalar": {"missing", *A_NUMBER}, "sliding_window": {"missing"},
        "attn_logit_softcapping": {*ABSENT, *A_NUMBER}, "final_logit_softcapping": {*ABSENT, *A_NUMBER},
        "layer_types": ABSENT, "use_bidirectional_attention": ABSENT},
    "llama": {
        **CONFIG, "num_key_value_heads": NONE, "head_dim": ABSENT, "mlp_bias": {"missing"},
        "rope_scaling": ABSENT, "rope_scaling.rope_type": NONE, "rope_scaling.factor": A_NUMBER,
        "rope_scaling.low_freq_factor": {"float"}, "rope_scaling.high_freq_factor": A_NUMBER,
        "rope_scaling.original_max_position_embeddings": {"missing"}},
    "Llama Scope": {
        **dict.fromkeys(["d_model", "d_sae", "hook_point_in", "hook_point_out", "act_fn", "norm_activation",
                         "dataset_average_activation_norm"], NONE),
        "jump_relu_threshold": {"zero", *A_NUMBER}, "use_decoder_bias": {"true"},
        "dataset_average_activation_norm.in": A_NUMBER, "dataset_average_activation_norm.out": A_NUMBER,
        "apply_decoder_bias_to_pre_encoder": {"missing"}, "sparsity_include_decoder_norm": {"missing", "true"},
        "use_glu_encoder": {"missing"}},
    "sparsify": {
        "num_latents": NONE, "d_in": NONE, "k": NONE, "activation": {"missing"}, "skip_connection": {"missing"},
        "transcode": {"missing"}},
    "SAELens topk": {
        "architecture": NONE, "d_in": NONE, "d_sae": NONE, "k": NONE, "rescale_acts_by_decoder_norm": {"missing", "true"},
        "apply_b_dec_to_input": {"missing", "true"}, "normalize_activations": ABSENT, "reshape_activations": ABSENT,
        "metadata": {*ABSENT, "object", "nested"}, "metadata.hook_name": ABSENT, "metadata.hook_head_index": ABSENT,
        "metadata.exclude_special_tokens": {*ABSENT, "true", "list"}},
    "dictionary_learning topk": {
        "trainer": NONE, "trainer.dict_class": NONE, "trainer.activation_dim": NONE, "trainer.dict_size": NONE,
        "trainer.layer": ABSENT, "trainer.submodule_name": {*ABSENT, "string"}, "buffer": {*ABSENT, "object", "nested"},
        "buffer.remove_bos": {"missing", "true"}},
    "adapter": {
        "peft_type": NONE, "r": NONE, "lora_alpha": A_NUMBER, "lora_dropout": {"missing", "zero"}, "bias": {"missing"},
        "use_rslora": {"missing", "true"}, "use_dora": {*ABSENT, "zero"}, "modules_to_save": {*ABSENT, "zero"},
        "fan_in_fan_out": {*ABSENT, "zero"}},
}
READ["SAELens batchtopk"] = {key: ends for key, ends in READ["SAELens topk"].items() if key != "k"}
READ["SAELens jumprelu"] = {key: ends for key, ends in READ["SAELens batchtopk"].items() if key != "rescale_acts_by_decoder_norm"}
READ["dictionary_learning matryoshka"] = READ["dictionary_learning topk"]


# ---- The campaign ----------------------------------------------------------------------------------------------------

def json_cases(folder):
    """(name, key, value) of every mutation of every key of the folder's JSON files, nested ones as "outer.inner"."""
    for path in sorted(folder.glob("*.json")):
        if (folder / "model.safetensors.index.json").exists():
            continue                                                # its configuration is llama's; its index has a test of its own
        for key, value in json.loads(path.read_text()).items():
            for inner in ["", *(f".{name}" for name in value)] if isinstance(value, dict) else [""]:
                for name in VALUES:
                    yield path, f"{key}{inner}" if inner else key, name


def mutate_json(path, key, value):
    raw = json.loads(path.read_text())
    outer, dot, inner = key.partition(".")
    place, key = (raw[outer], inner) if dot and outer in raw and isinstance(raw[outer], dict) else (raw, key)
    if value is MISSING:
        del place[key]
    else:
        place[key] = value
    path.write_text(json.dumps(raw))


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
    "NaN": lambda tensor: torch.full_like(tensor, float("nan")) if tensor.dtype.is_floating_point else tensor.double() * float("nan"),
    "infinite": lambda tensor: tensor.double() + float("inf"),
    "minus infinity": lambda tensor: tensor.double() - float("inf"),
}


def tensor_files(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".npz", ".pt"))


def read_tensors(path):
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write_tensors(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def tensor_cases(folder):
    for path in tensor_files(folder):
        tensors = read_tensors(path)
        for name in sorted(tensors):
            if "layers.1" in name and "lora" not in name:
                continue                                            # read as those of layer 0 are
            integer = not tensors[name].dtype.is_floating_point
            for mutation in TENSORS:
                if mutation == "fp8" and path.suffix == ".npz":
                    continue                                        # numpy has none
                if (integer and mutation in ("int8", "int64")) or (tensors[name].dim() == 0 and mutation == "one more dimension"):
                    continue                                        # as good a number
                yield path, name, mutation


def mutate_tensor(path, name, mutation):
    tensors = read_tensors(path)
    if mutation == "missing":
        del tensors[name]
    else:
        tensors[name] = TENSORS[mutation](tensors[name])
    write_tensors(path, tensors)


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def twice(path):
    text = path.read_text().strip()
    key = next(iter(json.loads(text)))
    path.write_text(f'{{"{key}": 1, {text[1:]}')


FILES = {
    "gone": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"<html>no such page" * 100),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "a folder": folder_instead,
    "a loop of links": loop,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}
JSONS = {
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "null": lambda path: path.write_text("null"),
    "deep": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "NaN": lambda path: path.write_text(path.read_text().rstrip()[:-1] + ', "new": NaN}'),
    "infinity": lambda path: path.write_text(path.read_text().rstrip()[:-1] + ', "new": 1e999}'),
    "a key twice": twice,
    "not UTF-8": lambda path: path.write_bytes(path.read_bytes().rstrip()[:-1] + b', "new": "\xff\xfe"}'),
    "an endless number": lambda path: path.write_text(path.read_text().rstrip()[:-1] + f', "new": {"9" * 10_000}}}'),
}


def file_cases(folder):
    for path in sorted(folder.glob("*.json")) + tensor_files(folder):
        for name in (*FILES, *(JSONS if path.suffix == ".json" else ())):
            yield path, name


def outcome(load, folder):
    """-> "refused", its line; "accepted", what it computes; or "traceback", the exception."""
    try:
        return "accepted", load(folder)
    except InputError as error:
        return "refused", str(error)
    except Exception as error:                                      # counted, and reported by every test below
        return "traceback", f"{type(error).__name__}: {error}"


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


def judge(kind, how, result, reference, folder, allowed, read):
    """What is wrong with the end of a case, or None. allowed: this mutation may leave a good file; read: the key is read."""
    if how == "traceback":
        return f"traceback ({result})"
    if how == "refused":
        named = str(folder) in result
        return None if named and "\n" not in result else f"unclear line ({result})"
    if read and not allowed:
        return "silent success on a wrong value"
    if not allowed and not same(result, reference):
        return "silent success with other values"
    return None if bool(result.isfinite().all()) or allowed else "silent success with values that are not finite"


def campaign(kind, tmp):
    """Yields (what was done, what is wrong with the end or None) of every case of a kind."""
    write, load = KINDS[kind]
    good = Path(tmp) / "good"
    good.mkdir()
    write(good)
    reference = load(good)
    table = READ.get(kind, {})

    def trial(mutate, allowed=False, read=False):
        folder = Path(tempfile.mkdtemp(dir=tmp)) / "spoilt"
        shutil.copytree(good, folder)
        mutate(folder)
        how, result = outcome(load, folder)
        return judge(kind, how, result, reference, folder, allowed, read)

    for path, key, name in json_cases(good):
        relative = path.relative_to(good)
        wrong = trial(lambda folder: mutate_json(folder / relative, key, VALUES[name]), name in table.get(key, ()), key in table)
        yield f"{relative}, {key}: {name}", wrong

    for path, name, mutation in tensor_cases(good):
        relative = path.relative_to(good)
        optional = (path.suffix, name, mutation) == (".pt", "k", "missing")     # the configuration has it too
        wrong = trial(lambda folder: mutate_tensor(folder / relative, name, mutation), allowed=optional, read=True)
        yield f"{relative}, {name}: {mutation}", wrong

    for path, name in file_cases(good):
        relative = path.relative_to(good)
        spoil = {**FILES, **JSONS}[name]
        yield f"{relative}: {name}", trial(lambda folder: spoil(folder / relative), read=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_spoilt_file_is_one_clear_line_or_right(kind, tmp_path):
    ends = list(campaign(kind, tmp_path))
    wrong = [f"{case}: {end}" for case, end in ends if end is not None]
    assert len(ends) > 50 and not wrong, "\n".join(wrong)


INDEX_NAMES = {
    "another folder": "../secret.safetensors", "two up": "..", "here": ".", "absolute": "/etc/passwd", "empty": "",
    "NUL": "model\0.safetensors", "long": "x" * 300 + ".safetensors", "a newline": "model\n.safetensors", "no weights": "config.json",
    "null": None, "a number": 7, "a list": ["model.safetensors"], "true": True, "not there": "model-00003-of-00002.safetensors"}


@pytest.mark.parametrize("case", INDEX_NAMES)
def test_an_index_names_files_of_its_folder_or_is_refused(case, tmp_path):
    write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][sorted(raw["weight_map"])[3]] = INDEX_NAMES[case]
    index.write_text(json.dumps(raw))
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


ODD_NAMES = {"long": "x" * 300, "long path": "/".join(["y" * 200] * 30), "NUL": "a\0b", "loop": None, "empty": ""}


@pytest.mark.parametrize("load", [load_model, load_sae, lambda name: load_adapter(small_llama(), name)],
                         ids=["model", "sae", "adapter"])
@pytest.mark.parametrize("case", ODD_NAMES)
def test_odd_names_are_one_line(case, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as error:
        load(ODD_NAMES[case] if case != "loop" else str(tmp_path / "loop"))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


if __name__ == "__main__":
    total = Counter()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as tmp:
            counts = Counter()
            for case, wrong in campaign(kind, tmp):
                counts["right" if wrong is None else wrong.partition(" (")[0]] += 1
                if wrong is not None and "-v" in sys.argv:
                    print(f"    {kind}: {case}: {wrong}"[:300])
        total += counts
        print(f"{kind:32}", dict(sorted(counts.items())), flush=True)
    print(f"{'all':32}", dict(sorted(total.items())), total.total())
