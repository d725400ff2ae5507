"""Virtual token counters: who has been served how much, so that a flood delays only its sender.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the delta whose counter is
lowest goes next, and one that comes back from idleness starts no lower than the lowest of those
that are active, so that nobody saves service up.
"""

from dataclasses import dataclass
from typing import Final

PROMPT_WEIGHT: Final = 1
"""What a prompt token costs. Tokens that come from the prefix cache cost nothing."""
OUTPUT_WEIGHT: Final = 2
"""What a generated token costs: it has a pass of its own."""


@dataclass(slots=True)
class _Account:
    served: int = 0
    owed: int = 0
    sequences: int = 0


class VirtualTokenCounters:
    """A virtual token counter for each digest of model_key, the base's included."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def arrive(self, model_key: str) -> None:
        """A sequence has come: it waits or runs until `leave`."""
        account = self._accounts.setdefault(model_key, _Account())
        if account.sequences == 0:
            active = [other.served for other in self._accounts.values() if other.sequences]
            account.served = max(account.served, min(active, default=0))
        account.sequences += 1

    def leave(self, model_key: str) -> None:
        """A sequence has ended.

        An idle delta's counter is kept while it is above the lowest active one: it would be lifted
        to that one otherwise.
        """
        self._accounts[model_key].sequences -= 1
        active = [account.served for account in self._accounts.values() if account.sequences]
        lowest = min(active, default=None)
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.sequences or (lowest is not None and account.served > lowest)
        }

    def owe(self, model_key: str, prompt_tokens: int) -> None:
        """So many prompt tokens have been taken on, or given up if negative."""
        self._accounts[model_key].owed += PROMPT_WEIGHT * prompt_tokens

    def prompt(self, model_key: str, tokens: int) -> None:
        """So many of the prompt tokens taken on have been computed."""
        account = self._accounts[model_key]
        account.owed -= PROMPT_WEIGHT * tokens
        account.served += PROMPT_WEIGHT * tokens

    def output(self, model_key: str) -> None:
        """A token has been generated."""
        self._accounts[model_key].served += OUTPUT_WEIGHT

    def served(self, model_key: str) -> int:
        """What a delta has been served, in weighted tokens."""
        return self._accounts[model_key].served

    def level(self, model_key: str) -> int:
        """What a delta will have been served once the prompts taken on are computed."""
        account = self._accounts[model_key]
        return account.served + account.owed
