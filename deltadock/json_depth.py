"""The limit on the nesting of JSON that others send: what handles it recurses."""

from typing import Final

MAX_DEPTH: Final = 128


def is_too_deep(value: object) -> bool:
    """Whether parsed JSON has more than `MAX_DEPTH` objects and arrays inside each other."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)
