"""A queue in which tenants take turns."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """What waits, by tenant: the tenant that was served last is the last in turn.

    A tenant's own items are in order of arrival. For one thread at a time.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[str | None, deque[Item]] = OrderedDict()
        """Of each tenant that waits, in the order of their turns."""

    def __bool__(self) -> bool:
        return bool(self._items)

    def __iter__(self) -> Iterator[tuple[str | None, Item]]:
        return ((tenant, item) for tenant, items in self._items.items() for item in items)

    def put(self, tenant: str | None, item: Item) -> None:
        """Add an item; a tenant that had none is the last in turn."""
        self._items.setdefault(tenant, deque()).append(item)

    def take(self, may: Callable[[str | None, Item], bool]) -> tuple[str | None, Item] | None:
        """Remove the first item that `may` be served, with its tenant; None if there is none.

        Tenants without one keep their turns.
        """
        for tenant, items in self._items.items():
            for item in items:
                if may(tenant, item):
                    self._items.move_to_end(tenant)
                    self.remove(tenant, item)
                    return tenant, item
        return None

    def remove(self, tenant: str | None, item: Item) -> None:
        """Remove an item that waits no more, if it is there; its tenant keeps its turn."""
        items = self._items.get(tenant, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._items[tenant]
