"""Numbers, sizes and times as people read them, on the command line, on pages and in messages.

None is shown as a dash. `api/static/app.js` writes sizes and times in the same way.
"""

import re
from datetime import UTC, datetime
from typing import Final

MISSING: Final = "–"
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def counted(number: int, noun: str) -> str:
    """A number with its noun, whose plural has an s: `1 job`, `2 jobs`."""
    return f"{grouped(number)} {noun if number == 1 else f'{noun}s'}"


def grouped(number: int | None) -> str:
    """A whole number with its thousands separated: `56,832`."""
    return MISSING if number is None else f"{number:,}"


def plain(value: float | None) -> str:
    """A number as it was given, without trailing zeros: `1`, `0.75`."""
    return MISSING if value is None else f"{value:g}"


def budget(bits: float | None) -> str:
    """A bit budget, given or found: `1`, `0.75`, `0.6239`."""
    return MISSING if bits is None else f"{bits:.4g}"


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


def ratio(value: float | None) -> str:
    """How many times smaller: `9.83 ×`."""
    return MISSING if value is None else f"{significant(value)} ×"


def nats(value: float | None) -> str:
    """A KL or a loss in the unit of both: `0.00217 nats per token`."""
    return MISSING if value is None else f"{significant(value)} nats per token"


def percentage(share: float | None) -> str:
    """A share of one: `94.2 %`; `100.0 %` is all of it."""
    if share is None:
        return MISSING
    return f"{min(100 * share, 99.9) if share < 1 else 100 * share:.1f} %"


def progress(percent: float) -> str:
    """How much of a job is done: `42 %`; `100 %` is all of it."""
    return f"{int(percent)} %"


def size(count: float | None) -> str:
    """Bytes in powers of a thousand, with three significant digits: `561 kB`."""
    if count is None:
        return MISSING
    power, value = 0, float(count)
    while value >= 999.5 and power < len(_UNITS) - 1:
        value /= 1000
        power += 1
    return f"{significant(value) if power else f'{value:.0f}'} {_UNITS[power]}"


def parse_size(text: str) -> int:
    """The bytes of `500GB`, `1.5 MB`, `400k` or a plain number.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kMGTP]?)B?", text)
    if found is None:
        raise ValueError(f"{text!r} is no size, such as 500GB")
    return round(float(found[1]) * 1000.0 ** _UNITS.index(f"{found[2]}B"))


def duration(seconds: float | None) -> str:
    """A duration to the second, minute or day: `42 s`, `3 min 5 s`, `2 h 10 min`, `5 days`."""
    if seconds is None:
        return MISSING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    if whole < 48 * 3600:
        return f"{whole // 3600} h" + (f" {minutes} min" if (minutes := whole % 3600 // 60) else "")
    return f"{whole // 86400} days"


def latency(seconds: float | None) -> str:
    """A short duration: `18 ms`, `1.2 s`."""
    if seconds is None:
        return MISSING
    return f"{significant(1000 * seconds, 2)} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def moment(time: datetime) -> str:
    """A time to the second, in UTC."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(time: datetime | None) -> str:
    """How long ago a time is, or in how long, or its date if that is weeks: `5 min ago`."""
    if time is None:
        return MISSING
    passed = (datetime.now(UTC) - time).total_seconds()
    if abs(passed) < 45:
        return "just now"
    for unit, length, below in (("min", 60, 60), ("h", 3600, 24), ("day", 86400, 14)):
        number = max(1, round(abs(passed) / length))
        if number < below:
            text = counted(number, unit) if unit == "day" else f"{number} {unit}"
            return f"{text} ago" if passed > 0 else f"in {text}"
    return f"{time.astimezone(UTC):%Y-%m-%d}"
