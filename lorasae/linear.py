"""y = x Wᵀ + b by the faster of the two libraries that PyTorch brings for it: every matrix product of model, SAE and loss.

On a CPU F.linear sends fp32 to MKL, which on processors other than Intel's runs at half their speed (an AMD Zen 5: 110
GFLOP/s a core, oneDNN 240). torch.backends.mkldnn.flags(enabled=False) brings F.linear back. Elsewhere, and in other
dtypes, linear is F.linear.
"""
import torch
from torch import nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def linear(x, weight, bias=None):
    """x [..., in], weight [out, in], bias [out] -> x Wᵀ + b [..., out]: F.linear to rounding, gradients included."""
    if by_onednn(x, weight):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """y = W x"""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def by_onednn(x, weight):
    return (not torch.compiler.is_compiling()                   # Inductor has its own, for constant weights alone
            and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() > 0 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


class OneDNNLinear(torch.autograd.Function):
    """∂/∂x = g W,  ∂/∂W = gᵀ x,  ∂/∂b = Σ g. A frozen weight keeps no x."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (product(grad, weight.T) if ctx.needs_input_grad[0] else None,
                product(rows.T, x.reshape(-1, x.shape[-1]).T) if ctx.needs_input_grad[1] else None,
                rows.sum(0) if ctx.needs_input_grad[2] else None)


def product(x, weight, bias=None):
    """x Wᵀ + b by oneDNN, without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
