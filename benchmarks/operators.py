"""Counts torch operators: on a GPU each is a launch of some 5 us, whatever it computes."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    {
        "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "expand", "flatten",
        "permute", "reshape", "resolve_conj", "resolve_neg", "select", "slice", "split",
        "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that would launch a kernel, by name."""

    FREE: ClassVar[frozenset[str]] = VIEWS
    """Operators that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Operators counted so far."""
        return self.by_name.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count one call and run it."""
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))
