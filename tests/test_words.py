"""Numbers, sizes and times as people read them."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltadock import words

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86400}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (561_040, "561 kB"), (999_499, "999 kB"),
     (999_500, "1.00 MB"), (999_700, "1.00 MB"), (13_500_000_000, "13.5 GB"), (None, "–")],
)  # fmt: skip
def test_sizes(count: int | None, text: str) -> None:
    assert words.size(count) == text


@given(st.integers(0, 999 * 10**15))
@example(999_500_000)
def test_a_size_has_three_digits_and_the_right_unit(count: int) -> None:
    shown = words.size(count)
    number, unit = shown.split()
    assert re.fullmatch(r"\d{1,3}|\d\.\d\d|\d\d\.\d", number), shown
    assert abs(float(number) * UNITS[unit] - count) <= 0.00501 * count
    assert words.parse_size(shown) == round(float(number) * UNITS[unit])


@pytest.mark.parametrize(
    ("text", "count"),
    [("9", 9), ("400k", 400_000), ("1.5 GB", 1_500_000_000), ("500GB", 5 * 10**11)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert words.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "B", "-1", "1e3", "1 KB", "1 MiB", "many", "1,000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size, such as 500GB"):
        words.parse_size(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1596, "0.160"), (0, "0"), (9.8277, "9.83"), (123.4, "123"), (1235.4, "1235"),
     (0.00001234, "1.23e-05"), (None, "–"), (-0.5, "-0.500")],
)  # fmt: skip
def test_significant_digits(value: float | None, text: str) -> None:
    assert words.significant(value) == text


def test_figures_have_their_units() -> None:
    assert words.ratio(9.8277) == "9.83 ×"
    assert words.nats(0.0021739) == "0.00217 nats per token"
    assert words.counted(1, "job") == "1 job"
    assert words.counted(32_768, "token") == "32,768 tokens"
    assert {words.ratio(None), words.nats(None), words.percentage(None)} == {words.MISSING}


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (0.94249, "94.2 %"), (0.9996, "99.9 %"), (1, "100.0 %")],
)
def test_only_all_of_it_is_a_hundred_per_cent(share: float, text: str) -> None:
    assert words.percentage(share) == text
    assert words.progress(100 * share) == f"{int(100 * share)} %"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (-0.2, "0 s"), (4.2, "4 s"), (59.7, "1 min"), (125.6, "2 min 6 s"),
     (3599.6, "1 h"), (3600 * 5 + 61, "5 h 1 min"), (3 * 86400 + 5, "3 days")],
)  # fmt: skip
def test_durations(value: float | None, text: str) -> None:
    assert words.duration(value) == text


@given(st.floats(0, 10**7))
def test_a_duration_is_near_what_it_says(seconds: float) -> None:
    parts = re.findall(r"(\d+) (\w+)", words.duration(seconds))
    units = [SECONDS[unit] for _, unit in parts]
    shown = sum(int(number) * unit for (number, _), unit in zip(parts, units, strict=True))
    finest = {1: 1, 60: 1, 3600: 60, 86400: 86400}[units[0]]
    assert shown - 0.5 <= seconds < shown + max(finest, 0.5) + 0.5
    assert [unit for _, unit in parts] == sorted({unit for _, unit in parts}, key=SECONDS.get)[::-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01849, "18 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (12.34, "12.3 s"), (None, "–")],
)
def test_latencies(value: float | None, text: str) -> None:
    assert words.latency(value) == text


def test_times_are_utc() -> None:
    assert words.moment(datetime(2026, 11, 22, 8, 5, tzinfo=UTC)) == "2026-11-22 08:05:00 UTC"


@pytest.mark.parametrize(
    ("passed", "text"),
    [(3, "just now"), (50, "1 min ago"), (60 * 59, "59 min ago"), (5 * 3600, "5 h ago"),
     (3590, "1 h ago"), (86400, "1 day ago"), (3 * 86400, "3 days ago"), (-50, "in 1 min"),
     (-3 * 86400 - 60, "in 3 days")],
)  # fmt: skip
def test_recent_times_are_relative(passed: int, text: str) -> None:
    assert words.ago(datetime.now(UTC) - timedelta(seconds=passed)) == text


def test_old_times_are_dates() -> None:
    assert words.ago(datetime(2024, 11, 22, 8, 5, tzinfo=UTC)) == "2024-11-22"
    assert words.ago(None) == words.MISSING
