"""Compute kernels, one folder per operation: reference, Triton kernel, CPU path, dispatch."""

import torch


def choose_device(name: str) -> torch.device:
    """The device of a setting; "auto" is the first GPU, or the CPU if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
