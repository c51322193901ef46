"""linear against F.linear: its values and gradients by another library, where that is meant."""
import pytest
import torch
import torch.nn.functional as F

from lorasae import linear as module
from lorasae.linear import Linear, by_onednn, linear

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(),
                            reason="this PyTorch was built without oneDNN")


@onednn
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_every_gradient_are_those_of_the_formula(shape, bias, transposed):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(5, 4).T if transposed else torch.randn(4, 5)
    weight, b = weight.requires_grad_(), torch.randn(4, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, b) if t is not None]
    y = linear(x, weight, b)
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    assert by_onednn(x, weight) and y.shape == expected.shape
    assert type(y.grad_fn).__name__ == "OneDNNLinearBackward"
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g),
                            torch.autograd.grad(expected, inputs, g.double())):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@onednn
def test_a_frozen_weight_keeps_nothing_of_its_input(monkeypatch):
    layer, saved = Linear(5, 4, bias=False).requires_grad_(False), []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert len(saved) == 1 and saved[0].data_ptr() == layer.weight.data_ptr()
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 5))


def test_elsewhere_it_is_f_linear(monkeypatch):
    monkeypatch.setattr(module, "product", None)
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x.float(), weight.float()), F.linear(x.float(), weight.float()))
    assert linear(x[:0].float(), weight.float()).shape == (0, 4)
    assert linear(x.float().to("meta"), weight.float().to("meta")).is_meta
