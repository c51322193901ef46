"""Tensors of a CPU that say `is_cuda`, so the code's way for CUDA can be checked without one."""
import torch


class OnCuda(torch.Tensor):
    """is_cuda is True. What only CUDA can do is emulated; what it cannot do fails as there."""
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
