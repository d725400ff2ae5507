"""Where operations run."""

from torch import Tensor


def on_gpu(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs in a Triton kernel.

    Tests replace this to run models on the CPU in Triton's interpreter.
    """
    return tensor.is_cuda
