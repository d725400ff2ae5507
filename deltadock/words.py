"""Counts, sizes and durations as people write them."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, whose plural has an s: `1 job`, `2 jobs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size_text(count: int) -> str:
    """A number of bytes for people, in powers of ten."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def duration_text(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 5 s`, `2 h 10 min`, `5 days`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    if whole < 48 * 3600:
        return f"{whole // 3600} h" + (f" {minutes} min" if (minutes := whole % 3600 // 60) else "")
    return f"{whole // 86400} days"
