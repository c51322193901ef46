"""Tensors of a CPU that take the ways of CUDA: the code asks `is_cuda`, and the values can be checked without a GPU."""
import torch


class OnCuda(torch.Tensor):
    """is_cuda is True; what CUDA alone can do is emulated, and what it cannot do fails as it does there."""
    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.mm and "out_dtype" in kwargs:
            dtype = kwargs["out_dtype"]
            assert args[0].dtype == args[1].dtype == torch.bfloat16 and dtype == torch.float32
            function, args, kwargs = torch.matmul, [matrix.to(dtype) for matrix in args], {}
        if "embedding_bag_per_sample_weights_backward" in str(function):
            assert args[0].dtype != torch.bfloat16, "not implemented for 'BFloat16'"
        return super().__torch_function__(function, types, args, kwargs)


def on_cuda(tensor):
    return tensor.detach().as_subclass(OnCuda)
