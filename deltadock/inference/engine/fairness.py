"""Virtual token counters: service per queue, so that a flood delays only its sender.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the queue with the lowest
counter is scheduled next; one that becomes active again is lifted to the lowest active counter, so
that idle time earns no credit.
"""

from dataclasses import dataclass
from typing import Final

PROMPT_WEIGHT: Final = 1
"""Cost of a prompt token. Tokens from the prefix cache are free."""
OUTPUT_WEIGHT: Final = 2
"""Cost of a generated token: each takes a pass."""


@dataclass(slots=True)
class _Account:
    served: int = 0
    reserved: int = 0
    sequences: int = 0


class VirtualTokenCounters:
    """A virtual token counter per queue key: each tenant's use of a delta, or of the bare base."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def add_sequence(self, queue_key: str) -> None:
        """Count a sequence as active until `remove_sequence`."""
        account = self._accounts.setdefault(queue_key, _Account())
        if account.sequences == 0:
            active = [other.served for other in self._accounts.values() if other.sequences]
            account.served = max(account.served, min(active, default=0))
        account.sequences += 1

    def remove_sequence(self, queue_key: str) -> None:
        """Remove an ended sequence.

        An idle queue's counter is kept only while it is above the lowest active one; below, it
        would be lifted to that one anyway.
        """
        self._accounts[queue_key].sequences -= 1
        active = [account.served for account in self._accounts.values() if account.sequences]
        lowest = min(active, default=None)
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.sequences or (lowest is not None and account.served > lowest)
        }

    def reserve(self, queue_key: str, prompt_tokens: int) -> None:
        """Reserve service for prompt tokens of an admitted sequence; release it if negative."""
        self._accounts[queue_key].reserved += PROMPT_WEIGHT * prompt_tokens

    def charge_prompt(self, queue_key: str, tokens: int) -> None:
        """Charge computed prompt tokens, and release their reservation."""
        account = self._accounts[queue_key]
        account.reserved -= PROMPT_WEIGHT * tokens
        account.served += PROMPT_WEIGHT * tokens

    def charge_output(self, queue_key: str) -> None:
        """Charge one generated token."""
        self._accounts[queue_key].served += OUTPUT_WEIGHT

    def served(self, queue_key: str) -> int:
        """Service so far, in weighted tokens."""
        return self._accounts[queue_key].served

    def level(self, queue_key: str) -> int:
        """Service including the reserved prompts, in weighted tokens."""
        account = self._accounts[queue_key]
        return account.served + account.reserved
