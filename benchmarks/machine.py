"""What a measurement ran on, in one line, so that a figure never stands without it."""

import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(device: str = "cpu") -> str:
    """Processor, cores, threads, accelerator where `device` is one, and versions."""
    parts = [f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    if torch.device(device).type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}")
    return "; ".join(parts)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a clock read before that means nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
