"""Every path of attention against the naive formula, including CUDA's paths without a GPU."""
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from conftest import GEMMA, LLAMA
from helpers import on_cuda
from lorasae import attention as module
from lorasae.attention import (
    attention, blockwise_attention, flex_mask, fused_attention, naive_attention, positions)
from lorasae.io.models import parse_config

HEADS, GROUPS, WIDTH = 4, 2, 16  # two query heads per key-value head, as in Gemma-2
compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                              reason="Inductor needs a C++ compiler")


def problem(T, S=None, B=1, width=WIDTH, device="cpu", dtype=torch.float32, gradients=True):
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, HEADS, T, width), (B, GROUPS, S or T, width), (B, GROUPS, S or T, width)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(gradients)
            for shape in shapes]


def with_gradients(function, inputs, *rest):
    y = function(*inputs, *rest)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y, *torch.autograd.grad((y * weight).sum(), inputs)


def agree(results, expected, rtol=1e-4, atol=1e-5):
    for ours, naive in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), naive, rtol=rtol, atol=atol)


@pytest.mark.parametrize("softcap, window", [(None, None), (None, 50), (5.0, None), (5.0, 50)])
def test_every_length_from_1_to_300_matches_the_naive_formula(softcap, window):
    for T in range(1, 301):
        inputs = problem(T, gradients=False)
        agree([attention(*inputs, 0.3, softcap, window)],
              [naive_attention(*inputs, 0.3, softcap, window)])


@pytest.mark.parametrize("rows", [64, 1024])                            # on a CPU, on CUDA
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("T, S", [(1, 1), (63, 63), (64, 64), (65, 65), (100, 100), (127, 127),
                                  (130, 200), (1, 200)])
def test_blockwise_values_and_gradients_match_the_naive_formula(rows, softcap, window, T, S):
    inputs = problem(T, S)
    agree(with_gradients(blockwise_attention, inputs, 0.3, softcap, window, rows),
          with_gradients(naive_attention, inputs, 0.3, softcap, window))


# ---- CUDA's paths, without a GPU -----------------------------------------------------------------

@pytest.mark.parametrize("dtype, repeated", [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("T, S", [(100, 100), (1, 100)])
def test_fp32_on_cuda_never_uses_the_kernel_that_stores_scores(monkeypatch, dtype, repeated, T, S):
    seen = []

    def fused(q, k, v, **how):
        seen.append((k.shape[1], v.shape[1], how["enable_gqa"], how["is_causal"]))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    attention(*map(on_cuda, problem(T, S, dtype=dtype, gradients=False)), 0.3)
    heads = HEADS if repeated else GROUPS
    assert seen == [(heads, heads, not repeated, T > 1)]


def test_repeated_heads_on_cuda_match_the_naive_formula():
    inputs = problem(40, gradients=False)
    agree([fused_attention(*map(on_cuda, inputs), 0.3)], [naive_attention(*inputs, 0.3)])


@pytest.mark.parametrize("softcap, window, T, S", [
    (5.0, None, 100, 100), (5.0, 8, 100, 100), (None, 8, 100, 100), (5.0, None, 7, 100),
    (5.0, None, 1, 100)])
def test_uncompiled_cuda_runs_blockwise_and_never_compiles(monkeypatch, softcap, window, T, S):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled something"))
    monkeypatch.setattr(module, "flex_attention",
                        lambda *a: pytest.fail("FlexAttention outside a compiled block"))
    rows, exact = [], module.blockwise_attention
    monkeypatch.setattr(module, "blockwise_attention", lambda *a: rows.append(a[-1]) or exact(*a))
    inputs = problem(T, S, gradients=False)
    y = attention(*map(on_cuda, inputs), 0.3, softcap, window, {None: "a mask", 8: "a mask"})
    agree([y], [naive_attention(*inputs, 0.3, softcap, window)])
    assert rows == [1024]


def test_masks_are_made_only_on_cuda_and_for_models_with_windows(monkeypatch):
    made = []
    monkeypatch.setattr(module, "flex_mask", lambda T, window, device: made.append((T, window)))
    gemma, llama = parse_config(GEMMA, "the test"), parse_config(LLAMA, "the test")
    for place, config in (on_cuda, gemma), (on_cuda, llama), (torch.clone, gemma):
        found = positions(config, 3, place(torch.empty(2, 100, 48)))
        assert found.rotary[0].shape == (100, config.head_dim)
    assert made == [(100, None), (100, 16)]


# ---- FlexAttention, compiled on a CPU, where it has no backward pass -----------------------------

def compiled_against_naive(backend, window):
    torch.compiler.reset()
    fast = torch.compile(attention, fullgraph=True, dynamic=False, backend=backend)
    inputs = problem(100, gradients=False)
    masks = {window: flex_mask(100, window, torch.device("cpu"))}
    for softcap in (50.0, 3.0):                         # two soft-caps in one process
        with torch.no_grad():
            agree([fast(*inputs, 0.3, softcap, window, masks)],
                  [naive_attention(*inputs, 0.3, softcap, window)])
    torch.compiler.reset()


def test_a_compiled_block_uses_flexattention_with_the_kernel_for_training(monkeypatch):
    from torch.nn.attention import flex_attention as flex
    seen, exact = [], flex.flex_attention

    def spy(*inputs, **how):
        seen.append((how["kernel_options"], how["enable_gqa"], how["scale"]))
        return exact(*inputs, **how)

    monkeypatch.setattr(flex, "flex_attention", spy)
    compiled_against_naive("aot_eager", None)
    assert seen and all(how == ({"FORCE_USE_FLEX_ATTENTION": True}, True, 0.3) for how in seen)


@compiler
@pytest.mark.parametrize("window", [None, 30])
def test_flexattention_through_inductor_matches_the_naive_formula(window):
    compiled_against_naive("inductor", window)


@pytest.mark.cuda
@pytest.mark.parametrize("softcap, window", [(50.0, None), (5.0, 100)])
@pytest.mark.parametrize("T", [1, 65, 100, 127, 128, 256, 300])
def test_flexattention_on_cuda_matches_the_naive_formula(softcap, window, T):
    torch.compiler.reset()
    window = window if window is not None and window < T else None
    inputs, device = problem(T, width=64, device="cuda"), torch.device("cuda", 0)
    inputs = [t.detach().requires_grad_() for t in inputs]
    masks = {window: flex_mask(T, window, device)}
    fast = torch.compile(attention, fullgraph=True, dynamic=False)
    agree(with_gradients(fast, inputs, 0.125, softcap, window, masks),
          with_gradients(naive_attention, inputs, 0.125, softcap, window), 2e-2, 2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("softcap, window", [(None, None), (50.0, None), (5.0, 100)])
def test_uncompiled_attention_on_cuda_matches_the_naive_formula(softcap, window):
    inputs = [t.detach().requires_grad_() for t in problem(256, width=64, device="cuda")]
    agree(with_gradients(attention, inputs, 0.125, softcap, window),
          with_gradients(naive_attention, inputs, 0.125, softcap, window), 1e-3, 1e-3)
