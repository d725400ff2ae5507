"""Formatting of numbers and times on the pages; None is shown as a dash."""

from datetime import UTC, datetime
from typing import Final

MISSING: Final = "–"
_PREFIXES: Final = ("", "k", "M", "G", "T", "P")


def size(count: float | None) -> str:
    """Bytes with a decimal prefix and three significant digits: `561 kB`."""
    if count is None:
        return MISSING
    power, value = 0, float(count)
    while value >= 999.5 and power < len(_PREFIXES) - 1:
        value /= 1000
        power += 1
    return f"{significant(value)} {_PREFIXES[power]}B" if power else f"{count:.0f} B"


def significant(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits; no exponent between 0.0001 and a million."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:#.{digits}g}"
    return f"{value:.0f}" if "e" in text else text.rstrip(".")


def percentage(share: float | None) -> str:
    """A share of one: `94.2 %`."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def plain(value: float | None) -> str:
    """A number without trailing zeros: `1`, `0.75`."""
    return MISSING if value is None else f"{value:g}"


def grouped(count: int | None) -> str:
    """An integer with thousands separated by narrow no-break spaces: `56 832`."""
    return MISSING if count is None else f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def moment(value: datetime) -> str:
    """A time to the second, in UTC."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(value: datetime) -> str:
    """How long ago a time is, or in how long, or its date if that is weeks: `5 min ago`."""
    passed = (datetime.now(UTC) - value).total_seconds()
    for unit, length, up_to in (("min", 60, 60), ("h", 3600, 24), ("d", 86400, 14)):
        count = max(1, round(abs(passed) / length))
        if count < up_to:
            if unit == "min" and abs(passed) < 45:
                return "just now"
            return f"{count} {unit} ago" if passed > 0 else f"in {count} {unit}"
    return f"{value.astimezone(UTC):%Y-%m-%d}"


def latency(value: float | None) -> str:
    """A short duration: `18 ms`, `1.2 s`."""
    if value is None:
        return MISSING
    return f"{significant(1000 * value, 2)} ms" if value < 1 else f"{value:.1f} s"


def seconds(value: float | None) -> str:
    """A duration, to the second: `2 min 6 s`."""
    if value is None:
        return MISSING
    if round(value) < 60:
        return f"{max(round(value), 0)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
