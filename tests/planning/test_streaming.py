"""Blocks on the road: which, how many, and the time of a step against what can be worked out by hand."""

from __future__ import annotations

import itertools

import pytest

from ideogram_app.planning.streaming import (
    SLOTS,
    STREAMING_OVERHEAD,
    TransformerPass,
    apportion,
    fewest,
    spread,
    step_seconds,
)

DEPTH = 34


def step(moved: int, copy: float, slots: int, seconds: tuple[float, float] = (36.0, 34.0)) -> float:
    """A step of two transformers of 34 blocks, so that one block computes for about a second."""
    counts = apportion(moved, (DEPTH, DEPTH))
    passes = [TransformerPass(DEPTH, own, count) for own, count in zip(seconds, counts, strict=True)]
    return step_seconds(passes, copy, slots)


@pytest.mark.parametrize("offloaded", range(1, DEPTH + 1))
def test_travelling_blocks_are_spread_evenly_and_the_last_is_among_them(offloaded: int) -> None:
    chosen = sorted(spread(offloaded, DEPTH))
    assert len(chosen) == offloaded and chosen[-1] == DEPTH - 1
    gaps = {after - before for before, after in itertools.pairwise([-1, *chosen])}
    assert max(gaps) - min(gaps) <= 1


def test_no_travelling_block_is_no_block() -> None:
    assert spread(0, DEPTH) == frozenset()


@pytest.mark.parametrize("blocks", [(34, 34), (6, 3), (34,)])
def test_each_transformer_gives_its_part_and_what_is_left_over_is_the_first_ones(blocks: tuple[int, ...]) -> None:
    for offloaded in range(sum(blocks) + 1):
        counts = apportion(offloaded, blocks)
        assert sum(counts) == offloaded
        for own, count in zip(blocks, counts, strict=True):
            assert 0 <= count <= own
            assert abs(count - offloaded * own / sum(blocks)) < 1


def test_as_few_blocks_travel_as_leave_room_for_the_places_too() -> None:
    # 10 blocks of 3 and 5 bytes beside them: 35 in all
    assert fewest(35, 35, 3, 10, 2) == 0
    assert fewest(34, 35, 3, 10, 2) == 3  # 35 - 9 + 6 = 32 fit, 35 - 6 + 6 would not
    assert fewest(11, 35, 3, 10, 2) == 10
    assert fewest(10, 35, 3, 10, 2) is None


def test_a_step_in_which_nothing_travels_takes_the_sum_of_both() -> None:
    assert step(0, 5.0, 2) == 70.0


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("copy", [1.2, 3.0, 10.0])
def test_where_everything_travels_over_a_slow_link_a_step_takes_as_long_as_the_copies(copy: float, slots: int) -> None:
    assert step(2 * DEPTH, copy, slots) == pytest.approx(2 * DEPTH * copy)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("moved", [4, 17, 34, 51, 68])
def test_copies_that_are_faster_than_computing_hide_entirely(moved: int, slots: int) -> None:
    counts = apportion(moved, (DEPTH, DEPTH))
    computing = sum(
        seconds * (1 + (STREAMING_OVERHEAD - 1) * count / DEPTH)
        for seconds, count in zip((36.0, 34.0), counts, strict=True)
    )
    assert step(moved, 0.9, slots) == pytest.approx(computing)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("copy", [0.5, 1.0, 1.3, 1.7, 2.5])
def test_a_step_is_never_shorter_than_copies_or_computing_nor_longer_than_both(copy: float, slots: int) -> None:
    for moved in range(slots + 1, 2 * DEPTH + 1):
        found = step(moved, copy, slots)
        assert max(moved * copy, 70.0) - 1e-9 <= found <= moved * copy + 70.0 * STREAMING_OVERHEAD


def test_what_does_not_hide_is_counted() -> None:
    """By hand: of two blocks one travels, and the others of the step compute for 1 s. Through one place its copy of
    1.5 s begins when it was computed, and only 1 s of it is behind the other block: 1 + 0.5 + 1.07."""
    assert step_seconds([TransformerPass(2, 2.0, 1)], 1.5, 1) == pytest.approx(1 + 0.5 + STREAMING_OVERHEAD)
    # with two places it may begin a step earlier, and nothing is waited for
    assert step_seconds([TransformerPass(2, 2.0, 1)], 1.5, 2) == pytest.approx(1 + STREAMING_OVERHEAD)


def test_a_third_place_never_makes_the_same_step_slower() -> None:
    for moved in range(4, 2 * DEPTH + 1):
        for copy in (0.5, 1.1, 1.4, 2.0):
            assert step(moved, copy, 3) <= step(moved, copy, 2) + 1e-9


@pytest.mark.parametrize("slots", SLOTS)
def test_more_travelling_blocks_never_make_a_step_faster(slots: int) -> None:
    for copy in (0.5, 1.1, 1.4, 2.0):
        times = [step(moved, copy, slots) for moved in range(slots + 1, 2 * DEPTH + 1)]
        assert all(after >= before - 1e-9 for before, after in itertools.pairwise(times))
