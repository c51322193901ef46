"""y = x Wᵀ + b, for the linear layers of the model, the SAE and the loss. Its twin is F.linear.

On a CPU, F.linear uses MKL for fp32, which is slow on some processors (one core of an AMD Zen 5:
110 GFLOP/s; with oneDNN, which also ships with PyTorch, 240; on Zen 4 the two are close). So
`linear` uses oneDNN where it applies, and F.linear elsewhere. At first, read it as F.linear.

`with torch.backends.mkldnn.flags(enabled=False):` uses F.linear everywhere.
"""
import torch
from torch import nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

WIDENED = 2 ** 25       # elements of a bf16 weight that a CPU casts to fp32 at a time: 134 MB


def linear(x, weight, bias=None):
    """x [..., in], weight [out, in], bias [out] -> x Wᵀ + b [..., out]: F.linear up to rounding."""
    if by_onednn(x, weight):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_fp32(x, weight, bias=None):
    """linear for x [N, in], but with an fp32 result (fp64 if x is), even for bf16 x and weight.

    CUDA multiplies bf16 and returns its fp32 sums; a CPU casts a slice of the weight at a time.
    """
    if x.dtype.itemsize > 2:
        return linear(x, weight, bias)
    if x.is_cuda:
        y = torch.mm(x, weight.T, out_dtype=torch.float32)
    else:
        rows = max(1, WIDENED // weight.shape[1])
        parts = [linear(x.float(), part.float()) for part in weight.split(rows)]
        y = torch.cat(parts, dim=1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """y = W x + b"""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


# ---- oneDNN --------------------------------------------------------------------------------------

def by_onednn(x, weight):
    """Whether to use oneDNN: fp32 on a CPU, outside compiled code, which picks its own kernels."""
    if torch.compiler.is_compiling() or x.numel() == 0:
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    on_cpu = x.device.type == weight.device.type == "cpu"
    return on_cpu and x.dtype == weight.dtype == torch.float32


class OneDNNLinear(torch.autograd.Function):
    """∂/∂x = g W,  ∂/∂W = gᵀ x,  ∂/∂b = Σ g. With a frozen weight, x is not kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None

        rows = grad.reshape(-1, grad.shape[-1])
        if need_x:
            grad_x = product(grad, weight.T)
        if need_weight:
            # gᵀ x, or (xᵀ g)ᵀ: oneDNN copies the left factor, so take the smaller one.
            left, right = rows.T, x.reshape(-1, x.shape[-1]).T
            if len(left) <= len(right):
                grad_weight = product(left, right)
            else:
                grad_weight = product(right, left).T
        if need_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def product(x, weight, bias=None):
    """x Wᵀ + b with oneDNN, without autograd: Inductor's operation, which has no public name."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
