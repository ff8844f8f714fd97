"""Sizes, durations, moments and lists as people read them."""

from __future__ import annotations

import time

import pytest

from ideogram_app.text import clock, duration, figures, gb, in_seconds, lasting, listed, remaining, size


@pytest.mark.parametrize(
    ("count", "sentence", "table"),
    [
        (19_313_000_000, "19.3 GB", "19.3 GB"),
        (1_204_000_000_000, "1204.0 GB", "1204 GB"),
        (842_000_000, "0.8 GB", "842 MB"),
        (7_240_000, "7.2 MB", "7.24 MB"),
        (512_000, "0.5 MB", "512 kB"),
        (7, "0.0 MB", "7 B"),
    ],
)
def test_sizes_have_a_tenth_in_sentences_and_three_figures_in_tables(count: int, sentence: str, table: str) -> None:
    assert (gb(count), size(count)) == (sentence, table)


@pytest.mark.parametrize(("value", "text"), [(0.34, "0.34"), (4.213, "4.21"), (93.52, "93.5"), (1204.4, "1204")])
def test_three_figures_need_no_exponent(value: float, text: str) -> None:
    assert figures(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 ms"),
        (0.0004, "under 1 ms"),
        (0.34, "340 ms"),
        (0.9996, "1.00 s"),
        (4.213, "4.21 s"),
        (59.4, "59.4 s"),
        (125, "2 min 5 s"),
        (4800, "1 h 20 min"),
    ],
)
def test_a_time_that_was_measured_has_the_unit_that_suits_it(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.336, "0.34 s"), (4.213, "4.2 s"), (93.52, "93.5 s")])
def test_times_that_are_compared_stay_in_seconds(seconds: float, text: str) -> None:
    assert in_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "left", "in_all"),
    [
        (0.4, "under 1 s", "under a minute"),
        (20, "20 s", "under a minute"),
        (60, "60 s", "about 1 minute"),
        (2200, "37 min", "about 37 minutes"),
        (5900, "98 min", "about 98 minutes"),
        (6300, "1 h 45 min", "about 1 h 45 min"),
    ],
)
def test_an_estimate_is_said_in_whole_minutes(seconds: float, left: str, in_all: str) -> None:
    assert (remaining(seconds), lasting(seconds)) == (left, in_all)


def test_a_moment_of_another_day_has_its_date(monkeypatch: pytest.MonkeyPatch) -> None:
    now, utc = 1_700_000_000, time.gmtime  # 14 November 2023, 22:13
    monkeypatch.setattr(time, "localtime", lambda seconds=now: utc(seconds))
    assert clock(now - 3600) == "21:13"
    assert clock(now - 86_400) == f"13 {time.strftime('%b', utc(now))}, 22:13"


@pytest.mark.parametrize(
    ("names", "text"),
    [((), ""), (("FP8",), "FP8"), (("INT8", "FP8"), "INT8 and FP8"), (("INT8", "FP8", "Q4_K"), "INT8, FP8 and Q4_K")],
)
def test_names_are_listed_as_in_a_sentence(names: tuple[str, ...], text: str) -> None:
    assert listed(names) == text
