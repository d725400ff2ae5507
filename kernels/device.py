"""Which device a process computes on."""

import torch


def choose_device(name: str) -> torch.device:
    """The device of a setting: "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
