"""What this machine has shown of itself: rates that were measured, and how near real pictures came to them.

    machine.json in the data folder, one entry for each device and torch, so that machines may share the folder
    measured   peaks of products, copies from RAM and reads from disk (machine/microbench.py)
    shares     for each model and arithmetic: ideal seconds of a step over measured ones, of the last few pictures

A plan counts with these before the table in planning/step_time.py. Where a device has no known peak, as a processor,
its ideal is one teraflop, and the share says what it does of that. A median of few pictures is taken, so that one that
was drawn while something else ran does not count. A file that is damaged or somebody else's is as good as none.

Left out: dates, averages over machines, and anything about pictures: only numbers of the device are kept.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ideogram_app.catalog.models import find_model
from ideogram_app.errors import RequestError
from ideogram_app.files import write_json
from ideogram_app.planning.step_time import (
    DISK_BYTES_PER_SECOND,
    LINK_BYTES_PER_SECOND,
    Rates,
    branch_flops,
    find_rates,
    ideal_seconds,
)
from ideogram_app.planning.streaming import STREAMING_OVERHEAD
from ideogram_app.wire import from_plain, to_plain

FILE = "machine.json"
OBSERVATIONS_KEPT = 5  # pictures whose times are remembered for each model and arithmetic
# Where copying takes more than this of a step it may be what the step waited for, and says nothing of computing.
MOST_COPYING = 0.8
UNIT_RATES = Rates(1.0, 1.0)  # the ideal of a device without known peaks


@dataclass(frozen=True)
class MeasuredRates:
    """Teraflops in 16 bits (a processor: in its computing type), INT8 teraops, bytes a second; None: not measured."""

    tflops_16bit: float | None = None
    tops_int8: float | None = None
    link: float | None = None
    disk: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no device can be, so that a file edited by hand is noticed."""
        if not all(rate is None or (math.isfinite(rate) and rate > 0) for rate in vars(self).values()):
            raise ValueError("a rate is a positive number")


@dataclass(frozen=True)
class MachineProfile:
    """One machine's rates and shares; see above. `shares` is keyed as `miniature/w8a8`."""

    measured: MeasuredRates | None = None
    shares: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse shares that nothing could have measured."""
        if not all(math.isfinite(share) and share > 0 for kept in self.shares.values() for share in kept):
            raise ValueError("a share is a positive number")

    def share(self, model: str, arithmetic: str) -> float | None:
        """The median of what pictures of this model reached with this arithmetic; None before the first."""
        kept = self.shares.get(f"{model}/{arithmetic}")
        return statistics.median(kept) if kept else None


@dataclass(frozen=True)
class Observation:
    """Steps of one picture that was drawn whole, without savings.

    Attributes:
        seconds: of a step, the median over the steps after the first.
        streamed_bytes, streamed_blocks: of its plan; `disk` where they came from there.
        devices: 2 where each transformer had its own.
    """

    model: str
    arithmetic: str
    width: int
    height: int
    text_tokens: int
    seconds: float
    streamed_bytes: int = 0
    streamed_blocks: tuple[int, int] = (0, 0)
    disk: bool = False
    devices: int = 1


def key(device: str, torch: str) -> str:
    """Under which name a machine is remembered: a driver or a torch of another version computes at another speed."""
    return f"{device}, torch {torch}"


def known_rates(device: str, known: MachineProfile | None) -> Rates | None:
    """The published peaks of a device with those that were measured in their places; None where there are neither."""
    published, measured = find_rates(device), known.measured if known else None
    if measured is None:
        return published
    flops = measured.tflops_16bit or (published.tflops_16bit if published else None)
    if flops is None:
        return None
    ops = measured.tops_int8 or (published.tops_int8 if published else flops)
    link = measured.link or (published.link if published else LINK_BYTES_PER_SECOND)
    return Rates(flops, ops, link, measured.disk)


def remember_measured(known: MachineProfile | None, measured: MeasuredRates) -> MachineProfile:
    """New rates in place of the old ones; what was not measured anew stays.

    Shares of other peaks mean nothing: where products were measured anew they are forgotten.
    """
    old = known or MachineProfile()
    before = vars(old.measured or MeasuredRates())
    merged = MeasuredRates(
        **{name: rate if rate is not None else before[name] for name, rate in vars(measured).items()}
    )
    same = (merged.tflops_16bit, merged.tops_int8) == (before["tflops_16bit"], before["tops_int8"])
    return MachineProfile(merged, old.shares if same else {})


def learn(known: MachineProfile | None, device: str, seen: Observation) -> MachineProfile:
    """What is known after one more picture; the same as before where its time was that of copying.

    Raises:
        RequestError: there is no model of that name.
    """
    known = known or MachineProfile()
    rates = known_rates(device, known) or UNIT_RATES
    way = (rates.disk or DISK_BYTES_PER_SECOND) if seen.disk else rates.link
    if not seen.seconds > 0 or seen.streamed_bytes / way > MOST_COPYING * seen.seconds:
        return known
    model = find_model(seen.model)
    works = branch_flops(model, (seen.width, seen.height), seen.text_tokens)
    ideal = [
        ideal_seconds(rates, work, seen.arithmetic) * (1 + (STREAMING_OVERHEAD - 1) * moved / branch.num_layers)
        for work, branch, moved in zip(works, model.branches, seen.streamed_blocks, strict=True)
    ]
    share = (max(ideal) if seen.devices > 1 else sum(ideal)) / seen.seconds
    name = f"{seen.model}/{seen.arithmetic}"
    kept = (*known.shares.get(name, ()), share)[-OBSERVATIONS_KEPT:]
    return replace(known, shares={**known.shares, name: kept})


def read(file: Path, name: str) -> MachineProfile | None:
    """What is remembered under a name; None where nothing is, or nothing that can be read."""
    row = _rows(file).get(name)
    if row is None:
        return None
    try:
        return from_plain(MachineProfile, row)
    except RequestError:
        return None


def write(file: Path, name: str, remembered: MachineProfile) -> None:
    """Keep it beside what the file holds under other names; the file is whole at any time.

    Raises:
        OSError: the folder cannot be written to.
    """
    rows = {**_rows(file), name: to_plain(remembered)}
    write_json(file, {"machines": rows})


def _rows(file: Path) -> Mapping[str, Any]:
    """Everything the file holds, by name; {} where it is missing or not such a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return {}
    rows = found.get("machines") if isinstance(found, dict) else None
    return rows if isinstance(rows, dict) else {}
