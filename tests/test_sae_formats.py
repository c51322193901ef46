"""Every SAE format against its formula in float64, and against the projects' own packages."""
import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import refuses
from lorasae.io.files import write_json, write_tensors
from lorasae.io import sae_readers, saes as sae_formats
from lorasae.sae import JumpReLU, TopK
from lorasae.io.saes import load_sae, save_sae
from lorasae.tiny.saes import save_sparsify

D, M, K, THETA = 24, 96, 7, 2.5
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")      # SAELens's names
HOOK = "blocks.3.hook_resid_post"
WHAT = {"model_name": "m", "layer": 3, "context": 64}


def random_tensors():
    """Random tensors: one row per latent, biases that matter, decoder rows of different norms."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)                              # noqa: E731
    return {
        "x": 2 * rand(3, 17, D), "W_enc": rand(M, D), "b_enc": rand(M),
        "W_dec": rand(M, D) * rand(M, 1).exp(), "b_dec": rand(D),
        "threshold": 4 * torch.rand(M, generator=g)}


@pytest.fixture
def t():
    return random_tensors()


def f64(t):
    return [tensor.double() for tensor in t.values()]


def formula(t, kind, centred=True, rescaled=False, theta=None):
    """(z, x̂) in float64. n: the decoder's norms, or 1. z selects among n · pre; x̂ decodes z / n.

    theta: one threshold for all latents.
    """
    x, W_enc, b_enc, W_dec, b_dec, thresholds = f64(t)
    n = W_dec.norm(dim=1) if rescaled else torch.ones(M).double()
    pre = ((x - b_dec * centred) @ W_enc.T + b_enc) * n
    least = {
        "topk": pre.topk(K, dim=-1).values[..., -1:], "standard": -torch.inf,
        "jumprelu": (thresholds if theta is None else theta) + 1e-12}[kind]
    z = pre.relu() * (pre >= least)
    return z, z / n @ W_dec + b_dec


def agrees(sae, x, z, x_hat):
    """Latents and both reconstructions (decode, forward) equal z and x̂ to 1e-5 of the largest."""
    assert 0 < (z != 0).double().mean() < 0.7           # some latents fire, but not all
    for got, expected in ((sae.encode(x), z), (sae.decode(sae.encode(x)), x_hat), (sae(x), x_hat)):
        assert got.shape == expected.shape
        assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---- The files as each project writes them -------------------------------------------------------

def gemma_scope(folder, t, **more):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: t[name].numpy() for name in ("b_enc", "b_dec", "threshold")}
    arrays |= {"W_enc": t["W_enc"].T.numpy(), "W_dec": t["W_dec"].numpy()}
    np.savez(folder / "params.npz", **arrays, **more)
    return folder


def llama_scope(folder, t, theta=0.6, n_in=2.5, n_out=2.5, **more):
    write_json(folder / "hyperparams.json", {
        "d_model": D, "d_sae": M, "hook_point_in": HOOK, "hook_point_out": HOOK,
        "act_fn": "jumprelu", "jump_relu_threshold": theta, "norm_activation": "dataset-wise",
        "use_decoder_bias": True, "dataset_average_activation_norm": {"in": n_in, "out": n_out},
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False, "top_k": 50, **more})
    write_tensors(folder / "checkpoints" / "final.safetensors", {
        "encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T, "decoder.bias": t["b_dec"]})
    return folder


def sparsify(folder, t, **cfg):
    write_json(folder / "cfg.json", {
        "expansion_factor": M // D, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "d_in": D, **cfg})
    tensors = {
        "encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "W_dec": t["W_dec"],
        "b_dec": t["b_dec"]}
    write_tensors(folder / "sae.safetensors", tensors)
    return folder


def sae_lens_6(folder, t, architecture, metadata=None, **cfg):
    cfg |= {"k": K} if architecture == "topk" else {}
    write_json(folder / "cfg.json", {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", **cfg,
        "metadata": {"sae_lens_version": "6.18.0", "hook_name": HOOK, **(metadata or {})}})
    names = ["b_enc", "b_dec"] + ["threshold"] * (architecture == "jumprelu")
    write_tensors(folder / "sae_weights.safetensors", {
        "W_enc": t["W_enc"].T, "W_dec": t["W_dec"], **{name: t[name] for name in names}})
    return folder


def sae_lens_5(folder, t, architecture, **cfg):
    sae_lens_6(folder, t, architecture)
    write_json(folder / "cfg.json", {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "model_name": "m", "hook_name": HOOK, "hook_layer": 3, "hook_head_index": None,
        "context_size": 64, "prepend_bos": True, "activation_fn_str": "relu",
        "activation_fn_kwargs": {}, "finetuning_scaling_factor": False,
        "apply_b_dec_to_input": True, "normalize_activations": "none", "dataset_path": "",
        "neuronpedia_id": None, "dataset_trust_remote_code": True,
        "sae_lens_training_version": None, **cfg})
    return folder


def dictionary_learning(folder, t, dict_class, place="resid_post_layer_3", theta=THETA, **buffer):
    write_json(folder / "config.json", {
        "trainer": {
            "dict_class": dict_class, "activation_dim": D, "dict_size": M, "k": K, "layer": 3,
            "lm_name": "m", "submodule_name": place},
        "buffer": {"ctx_len": 64, **buffer}})
    plain = {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    plain["W_enc"] = t["W_enc"].T
    one = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(theta)}
    state = {
        "encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    if dict_class == "AutoEncoder":
        state |= {"bias": t["b_dec"]}
    elif dict_class == "AutoEncoderTopK":
        state |= {"b_dec": t["b_dec"], **one, "threshold": torch.tensor(-1.0)}
    elif dict_class == "JumpReluAutoEncoder":
        state = plain
    elif dict_class == "BatchTopKSAE":
        state |= {"b_dec": t["b_dec"], **one}
    elif dict_class == "MatryoshkaBatchTopKSAE":
        state = plain | one | {"group_sizes": torch.tensor([M // 4, M - M // 4])}
    torch.save(state, folder / "ae.pt")
    return folder


# ---- Each against its formula --------------------------------------------------------------------

@pytest.mark.parametrize("shift", [0, -3])
def test_gemma_scope_matches_its_formula(tmp_path, t, shift):
    t["threshold"] += shift                             # negative thresholds act as ReLU
    sae = load_sae(gemma_scope(tmp_path, t, scaling_factor=np.ones(M)))
    agrees(sae, t["x"], *formula(t, "jumprelu", centred=False))
    assert isinstance(sae, JumpReLU) and not sae.on_special
    assert not any(p.requires_grad for p in sae.parameters())
    assert torch.equal(load_sae(tmp_path / "params.npz").W_enc, t["W_enc"])


@pytest.mark.parametrize("n_out, norms", [(2.5, True), (4.0, True), (4.0, False)])
def test_llama_scope_matches_its_authors_formula(tmp_path, t, n_out, norms):
    folder = llama_scope(tmp_path, t, n_out=n_out, sparsity_include_decoder_norm=norms)
    sae = load_sae(folder)
    x, W_e, b_e, W_d, b_d, _ = f64(t)
    f_in, f_out = math.sqrt(D) / 2.5, math.sqrt(D) / n_out
    pre = f_in * (x @ W_e.T) + b_e
    c = W_d.norm(dim=1) * f_in / f_out if norms else torch.ones(M).double()
    pre = pre * (pre * c / f_in > 0.6)
    agrees(sae, t["x"], pre * c / f_in, (pre @ W_d + b_d) / f_out)
    assert not norms or (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert not sae.on_special


@pytest.mark.parametrize("cfg", [
    {}, {"num_latents": M, "expansion_factor": 99}, {"multi_topk": True},
    {"activation": "topk", "skip_connection": False, "transcode": False, "new_field": 1}])
def test_sparsify_matches_its_formula(tmp_path, t, cfg):
    sae = load_sae(sparsify(tmp_path, t, **cfg))
    agrees(sae, t["x"], *formula(t, "topk"))
    assert isinstance(sae, TopK) and sae.k == K and sae.on_special


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind, rescaled", [
    ("topk", False), ("topk", True), ("jumprelu", False), ("standard", False)])
def test_sae_lens_matches_its_formula(tmp_path, t, kind, rescaled, centred):
    said = {"rescale_acts_by_decoder_norm": True} if rescaled else {}
    sae = load_sae(sae_lens_6(tmp_path, t, kind, apply_b_dec_to_input=centred, **said))
    agrees(sae, t["x"], *formula(t, kind, centred, rescaled))
    assert isinstance(sae, TopK) is sae.on_special is (kind == "topk")


def test_a_preactivation_equal_to_its_threshold_does_not_fire(tmp_path, t):
    """Whole numbers, so that pre-activations hit θ exactly."""
    t = {name: tensor.round() for name, tensor in t.items()}
    t["b_dec"] = torch.zeros(D)
    sae = load_sae(dictionary_learning(tmp_path / "a", t, "BatchTopKSAE"))
    sae.threshold.data.fill_(3.0)
    pre = t["x"] @ t["W_enc"].T + t["b_enc"]
    assert (pre == 3).any() and torch.equal(sae.encode(t["x"]), pre * (pre > 3))


@pytest.mark.parametrize("kind", ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"))
@pytest.mark.parametrize("theta", [-1.0, 0.0])
def test_a_batch_topk_without_a_learnt_threshold_is_refused(tmp_path, t, kind, theta):
    folder = dictionary_learning(tmp_path, t, kind, theta=theta)
    refuses(rf"threshold is tensor\({theta:g}.*, but should be", load_sae, folder)


@pytest.mark.parametrize("dict_class", sae_readers.DICTIONARIES)
def test_dictionary_learning_matches_its_formula(tmp_path, t, dict_class):
    sae = load_sae(dictionary_learning(tmp_path, t, dict_class), layer=3)
    if dict_class == "JumpReluAutoEncoder":
        expected = formula(t, "jumprelu", centred=False)
    else:
        kind = {"AutoEncoder": "standard", "AutoEncoderTopK": "topk"}.get(dict_class, "jumprelu")
        expected = formula(t, kind, theta=THETA)
    agrees(sae, t["x"], *expected)
    assert sae.on_special and isinstance(sae, TopK) is (dict_class == "AutoEncoderTopK")
    assert not load_sae(dictionary_learning(tmp_path, t, dict_class, remove_bos=True)).on_special


def test_special_tokens_follow_the_file_or_else_the_kind_of_sae(tmp_path, t):
    for kind, excluded, expected in (
            ("topk", None, True), ("topk", [1], False), ("jumprelu", None, False),
            ("jumprelu", False, True)):
        metadata = {"exclude_special_tokens": excluded}
        assert load_sae(sae_lens_6(tmp_path, t, kind, metadata)).on_special is expected
    for kind in (*BATCH_TOPK, "jumprelu"):              # its architecture in training
        folder = sae_lens_6(tmp_path, t, "jumprelu", {"training_architecture": kind})
        assert load_sae(folder).on_special is (kind in BATCH_TOPK)
    assert load_sae(sae_lens_5(tmp_path, t, "jumprelu")).on_special is False
    no_bos = {"prepend_bos": False, "exclude_special_tokens": False}    # never saw a BOS
    assert load_sae(sae_lens_6(tmp_path, t, "topk", no_bos)).on_special is False


def test_an_sae_names_its_model_if_the_file_does(tmp_path, t):
    for folder, expected in (
            (sae_lens_6(tmp_path / "6", t, "topk", {"model_name": "gemma-2-2b"}), "gemma-2-2b"),
            (sae_lens_6(tmp_path / "n", t, "topk"), None),
            (sae_lens_5(tmp_path / "5", t, "jumprelu"), "m"),
            (dictionary_learning(tmp_path / "d", t, "AutoEncoder"), "m"),
            (gemma_scope(tmp_path / "g", t), None), (sparsify(tmp_path / "s", t), None)):
        assert load_sae(folder).model_name == expected


# ---- Precision and memory ------------------------------------------------------------------------

class LargestFloat32(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (out if isinstance(out, (list, tuple)) else [out]):
            on_cpu = isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
            if on_cpu and tensor.dtype == torch.float32:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("write", [
    llama_scope, lambda folder, t: sae_lens_6(folder, t, "jumprelu"), sparsify])
def test_a_bfloat16_sae_never_exists_in_float32(tmp_path, t, monkeypatch, write):
    write(tmp_path, {name: tensor.bfloat16() for name, tensor in t.items()})
    whole = load_sae(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(sae_formats, "ROWS", 8)
    monkeypatch.setattr(sae_readers, "ROWS", 8)
    with LargestFloat32() as largest:
        sae = load_sae(tmp_path, dtype=torch.bfloat16)
    assert 0 < largest.bytes <= max(8 * D, M) * 4       # a slice of a matrix, or a vector
    exact = {name for name, p in sae.named_parameters() if p.dtype != torch.bfloat16}
    assert exact <= {"threshold"}
    assert all(map(torch.equal, sae.parameters(), whole.parameters()))


def test_bfloat16_rounds_weights_once_and_thresholds_not_at_all(tmp_path, t):
    gemma_scope(tmp_path, t)
    sae = load_sae(tmp_path, dtype="bfloat16")
    assert torch.equal(sae.W_enc, t["W_enc"].bfloat16())
    assert torch.equal(sae.W_dec, t["W_dec"].bfloat16())
    assert torch.equal(sae.threshold, t["threshold"])
    llama_scope(tmp_path / "l", t)
    exact, rounded = (load_sae(tmp_path / "l", dtype=dtype) for dtype in (None, torch.bfloat16))
    assert torch.equal(exact.W_enc.bfloat16(), rounded.W_enc)
    assert torch.equal(exact.threshold, rounded.threshold)


# ---- Writing -------------------------------------------------------------------------------------

def ours(t, kind, on_special=True):
    topk = kind == "topk"
    sae = TopK(D, M, K, on_special=on_special) if topk else JumpReLU(D, M, on_special=on_special)
    sae.load_state_dict({name: t[name] for name in sae.state_dict()})
    return sae.requires_grad_(False)


@pytest.mark.parametrize("on_special", [True, False])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_saved_sae_loads_again_bit_for_bit(tmp_path, t, kind, on_special):
    sae = ours(t, kind, on_special)
    save_sae(sae, tmp_path / "run" / "sae", **WHAT)
    found = [load_sae(tmp_path / "run", layer=3)]
    assert found[0].on_special is on_special and found[0].model_name == WHAT["model_name"]
    if kind == "topk":
        save_sparsify(sae, tmp_path / "s")
        found.append(load_sae(tmp_path / "s"))
    for back in found:
        assert type(back) is type(sae)
        for name, tensor in sae.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name])


# ---- Against the packages themselves -------------------------------------------------------------

@torch.no_grad()
def equal(ours, theirs, x):
    agrees(ours, x, theirs.encode(x), theirs(x))


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens", reason="the oracle sae-lens is not installed")


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_sae_lens_loads_what_we_save(tmp_path, t, sae_lens, kind):
    sae = ours(t, kind, on_special=False)
    save_sae(sae, tmp_path, **WHAT)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == kind and theirs.cfg.metadata.hook_name == HOOK
    assert theirs.cfg.metadata.context_size == 64
    assert theirs.cfg.metadata.exclude_special_tokens is True
    equal(sae, theirs, t["x"])


@pytest.mark.parametrize("kind, cfg", [
    *[(kind, {"apply_b_dec_to_input": centred}) for kind in ("topk", "jumprelu", "standard")
      for centred in (True, False)],
    ("topk", {"rescale_acts_by_decoder_norm": True})])
def test_we_load_what_sae_lens_saves(tmp_path, t, sae_lens, kind, cfg):
    theirs = sae_lens.SAE.load_from_disk(sae_lens_6(tmp_path / "a", t, kind, **cfg))
    theirs.save_model(tmp_path / "b")
    equal(load_sae(tmp_path / "b"), theirs, t["x"])


@pytest.mark.parametrize("kind, cfg", [
    ("standard", {}), ("jumprelu", {}),
    ("standard", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}})])
def test_we_read_version_5_as_sae_lens_does(tmp_path, t, sae_lens, kind, cfg):
    sae_lens_5(tmp_path, t, kind, **cfg)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    equal(load_sae(tmp_path), theirs, t["x"])


def test_sparsify_loads_what_we_save_and_we_load_what_it_saves(tmp_path, t):
    sparsify = pytest.importorskip("sparsify", reason="the oracle eai-sparsify is not installed")
    save_sparsify(ours(t, "topk"), tmp_path / "a")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "a")
    theirs.save_to_disk(tmp_path / "b")
    with torch.no_grad():
        x = t["x"].flatten(0, 1)
        out = theirs(x)
        z = torch.zeros(len(x), M).scatter(1, out.latent_indices.long(), out.latent_acts)
        agrees(load_sae(tmp_path / "b"), x, z, out.sae_out)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("kind", BATCH_TOPK)
def test_batch_topk_matches_sae_lens(tmp_path, t, sae_lens, kind, rescaled):
    """SAELens's training class exports our tensors; its inference class is the oracle."""
    sae_class, config_class = sae_lens.registry.get_sae_training_class(kind)
    more = {"matryoshka_widths": [M // 2, M]} if kind == "matryoshka_batchtopk" else {}
    training = sae_class(config_class(
        d_in=D, d_sae=M, k=6.5, rescale_acts_by_decoder_norm=rescaled, **more))
    training.load_state_dict({
        "W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"], "b_enc": t["b_enc"],
        "b_dec": t["b_dec"], "topk_threshold": torch.tensor(THETA, dtype=torch.float64)})
    training.save_inference_model(tmp_path)
    theirs, sae = sae_lens.SAE.load_from_disk(tmp_path), load_sae(tmp_path)
    assert theirs.cfg.architecture() == "jumprelu"
    assert isinstance(sae, JumpReLU) and sae.on_special
    equal(sae, theirs, t["x"])


# ---- Bad input: one line each, nothing executed --------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.mkdir, (Bomb.target,)


@pytest.fixture
def bomb(tmp_path):
    Bomb.target = str(tmp_path / "executed")
    yield Bomb()
    assert not os.path.exists(Bomb.target)


def test_pickles_are_refused_and_not_executed(tmp_path, t, bomb):
    gemma_scope(tmp_path / "a", t, scaling_factor=np.array([bomb], dtype=object))
    refuses("cannot read .*params.npz: scaling_factor .*Object", load_sae, tmp_path / "a")
    (tmp_path / "a" / "params.npz").write_bytes(pickle.dumps(bomb))
    refuses(r"cannot read .*params.npz \(", load_sae, tmp_path / "a")
    dictionary_learning(tmp_path / "b", t, "AutoEncoder")
    torch.save({"encoder.weight": bomb}, tmp_path / "b" / "ae.pt")
    refuses(r"cannot read .*ae.pt \(", load_sae, tmp_path / "b")


MLP = "blocks.3.hook_mlp_out"
SIGNED = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "signed": True}}


@pytest.mark.parametrize("write, how, cfg, message", [
    (gemma_scope, [], {"scaling_factor": np.full(M, 2.0)}, "scaling_factor other than 1"),
    (sparsify, [], {"signed": True}, "signed is True"),
    (sae_lens_6, ["batchtopk"], {}, "architecture is 'batchtopk'"),     # a training checkpoint
    (sae_lens_5, ["standard"], {"activation_fn_str": "tanh-relu"}, "str is 'tanh-relu'"),
    (sae_lens_5, ["standard"], {"normalize_activations": True}, "normalize_activations True"),
    (sae_lens_5, ["standard"], SIGNED, "signed is True"),
    (llama_scope, [], {"hook_point_out": MLP}, f"hook_point_out is '{MLP}'"),
    (dictionary_learning, ["AutoEncoder", "mlp_out"], {},
     "reads 'model.layers.3.mlp', which is not a block's output"),
])
def test_unsupported_settings_are_refused_by_name(tmp_path, t, write, how, cfg, message):
    """tests/test_bad_files.py tries other values of every key that is read."""
    refuses(message, load_sae, write(tmp_path, t, *how, **cfg))


def test_a_pt_file_with_anything_but_named_tensors_is_one_line(tmp_path, t):
    folder = dictionary_learning(tmp_path, t, "AutoEncoder")
    state = torch.load(folder / "ae.pt")
    bias = state["bias"]
    for wrong in ({**state, "bias": 7}, {**state, "bias": {"a": bias}}, [bias], bias, 7):
        torch.save(wrong, folder / "ae.pt")
        refuses("ae.pt", load_sae, folder)


def test_a_layer_that_the_file_contradicts_is_refused(tmp_path, t):
    for folder in (llama_scope(tmp_path / "l", t), sae_lens_6(tmp_path / "s", t, "topk"),
                   dictionary_learning(tmp_path / "d", t, "AutoEncoder")):
        assert load_sae(folder, layer=3).W_enc.shape == (M, D)
        refuses("was trained on block 3, not 5: pass --layer 3", load_sae, folder, layer=5)


def test_other_mistakes_are_one_line(tmp_path, t):
    message = "dtype 'float7' is not one of float32"
    refuses(message, load_sae, gemma_scope(tmp_path / "a", t), dtype="float7")
    gemma_scope(sparsify(tmp_path / "d", t), t)
    refuses(r"several SAEs that fit: . \(gemma_scope\), . \(sparsi", load_sae, tmp_path / "d")
