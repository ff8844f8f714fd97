"""Measured machine profile: peak rates of this machine, and how near real pictures came to them (efficiency).

    store = ProfileStore(data); profile = store.known(hardware); store.note(hardware, Observation(...))

    machine.json in the data folder, one entry for each device and torch, so that machines may share the folder
    measured   peaks of products, copies from RAM and reads from disk (machine/microbench.py)
    shares     for each model and arithmetic: ideal seconds of a step over measured ones, of the last few pictures
    works      operations of a step of these pictures; another size is predicted from them, and less surely
    beside     for each model: what caption, first step and decoding took beside the steps, in steps
    downloads  bytes a second of the last few; they are the line's, not a device's, and stand under a name of their own
    outcomes   what plans said of the last pictures, with which interval, and what was measured (planning/intervals.py)

A plan counts with these before published numbers (planning/step_time.py). Where a device has no known peak, as a
processor, its ideal is one teraflop, and the share says what it does of that. A median of few pictures is taken, so
that one that was drawn while something else ran does not count. A damaged or foreign file is ignored.

Left out: dates, averages over machines, and anything about pictures: only numbers of the device are stored.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ideogram_app.catalog.models import find_model
from ideogram_app.errors import RequestError
from ideogram_app.files import write_json
from ideogram_app.machine.gpu_specs import (
    DISK_BYTES_PER_SECOND,
    LINK_BYTES_PER_SECOND,
    MeasuredRates,
    Rates,
    find_rates,
)
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.downloads import downloaded
from ideogram_app.planning.intervals import Outcome, kept
from ideogram_app.planning.step_time import branch_flops, ideal_seconds, step_work
from ideogram_app.planning.streaming import STREAMING_OVERHEAD
from ideogram_app.records import Result
from ideogram_app.wire import from_plain, to_plain

FILE = "machine.json"
LINE = "the network"  # the name in the file of what downloads have shown
RECENT_PICTURES = 5  # whose times count, for each model and arithmetic
# Where copying takes more than this of a step it may be what the step waited for, and says nothing of computing.
MOST_COPYING = 0.8
LEAST_BESIDE = 0.01  # steps: where the steps after the first were slower than the median says, nothing seems left
UNIT_RATES = Rates(1.0, 1.0)  # the ideal of a device without known peaks
log = logging.getLogger(__name__)
ROOM_TO_PROBE = 2_000_000_000  # bytes of free device memory: the probe's operands, results and copies take 1


@dataclass(frozen=True)
class MachineProfile:
    """One machine's rates and shares; see above. `shares` and `works` are keyed as `miniature/w8a8`."""

    measured: MeasuredRates | None = None
    shares: dict[str, tuple[float, ...]] = field(default_factory=dict)
    works: dict[str, tuple[float, ...]] = field(default_factory=dict)
    beside: dict[str, tuple[float, ...]] = field(default_factory=dict)
    downloads: tuple[float, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that nothing could have measured."""
        recent = (*self.shares.values(), *self.works.values(), *self.beside.values(), self.downloads)
        if not all(math.isfinite(number) and number > 0 for numbers in recent for number in numbers):
            raise ValueError("what a machine has shown are positive numbers")

    def share(self, model: str, arithmetic: str) -> float | None:
        """The median of what pictures of this model reached with this arithmetic; None before the first."""
        recent = self.shares.get(f"{model}/{arithmetic}")
        return statistics.median(recent) if recent else None

    def typical_works(self, model: str, arithmetic: str) -> tuple[float, ...]:
        """Operations of a step of the picture, or of the two, whose share is the median; of all that are known where a
        file of an earlier program does not say which; () before the first."""
        name = f"{model}/{arithmetic}"
        shares, works = self.shares.get(name, ()), self.works.get(name, ())
        if len(shares) != len(works):
            return works
        ranked = [work for _, work in sorted(zip(shares, works, strict=True))]
        return tuple(ranked[(len(ranked) - 1) // 2 : len(ranked) // 2 + 1])


@dataclass(frozen=True)
class Observation:
    """Steps of one picture that was drawn whole, without savings.

    Attributes:
        seconds: of a step, the median over the steps after the first.
        streamed_bytes, streamed_blocks: of its plan; `disk` where they came from there.
        devices: 2 where each transformer had its own.
        beside: what the picture took beside its steps, in steps; None where that was not measured.
        outcomes: what its plan said, and what came of it.
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
    beside: float | None = None
    outcomes: tuple[Outcome, ...] = ()


class ProfileStore:
    """The file of profiles in a data folder."""

    def __init__(self, data: Path) -> None:
        self._data, self._file = data, data / FILE
        self._refused: set[str] = set()  # names of machines that could not be measured; not tried again

    def recorded(self, hardware: Hardware) -> MachineProfile | None:
        """The profile of a machine as it stands in the file, with what downloads have shown; nothing is measured."""
        return self._with_line(read(self._file, key(hardware.name, hardware.torch)))

    def known(self, hardware: Hardware) -> MachineProfile | None:
        """The profile of a machine; a card is measured first where it never was."""
        return self._with_line(self._measured(hardware))

    def _with_line(self, known: MachineProfile | None) -> MachineProfile | None:
        line = read(self._file, LINE)
        if line is None:
            return known
        own = known or MachineProfile()
        return replace(own, downloads=line.downloads, outcomes=(*own.outcomes, *line.outcomes))

    def _measured(self, hardware: Hardware) -> MachineProfile | None:
        name = key(hardware.name, hardware.torch)
        known = read(self._file, name)
        if known is not None and known.measured is not None:
            return known
        has_room = (hardware.device_free_bytes or 0) > ROOM_TO_PROBE
        usable = hardware.kind in ("cuda", "rocm") and hardware.torch_supports_device is not False
        if not (usable and has_room) or name in self._refused:
            return known
        try:
            import torch

            from ideogram_app.machine.meter import release
            from ideogram_app.machine.microbench import probe

            device = torch.device(f"cuda:{hardware.device_index}")
            known = with_rates(known, probe(device, self._data))
            release(device)
        except RuntimeError:  # the device is busy or broken; what it can do will be seen when it draws
            log.warning("%s could not be measured", hardware.name, exc_info=True)
            self._refused.add(name)
            return known
        self._write(name, known)
        return known

    def note(self, hardware: Hardware, seen: Observation) -> None:
        """A picture was drawn."""
        name = key(hardware.name, hardware.torch)
        before = read(self._file, name)
        after = learn(before, hardware.name, seen)
        if after != before:
            self._write(name, after)

    def note_download(self, rate: float) -> None:
        """Bytes came over the network, at so many a second."""
        before = read(self._file, LINE) or MachineProfile()
        seen = downloaded(rate, before.downloads, before.outcomes)
        rates = (*before.downloads, rate)[-RECENT_PICTURES:]
        self._write(LINE, replace(before, downloads=rates, outcomes=kept((*before.outcomes, seen))))

    def _write(self, name: str, known: MachineProfile) -> None:
        try:
            write(self._file, name, known)
        except OSError as problem:
            log.warning("%s could not be written: %s", self._file, problem)


def key(device: str, torch: str) -> str:
    """The name of a profile in the file: a driver or a torch of another version computes at another speed."""
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


def with_rates(known: MachineProfile | None, measured: MeasuredRates) -> MachineProfile:
    """New rates in place of the old ones; what was not measured anew stays. Shares of other peaks mean nothing: where
    products were measured anew they are dropped."""
    old = known or MachineProfile()
    before = old.measured or MeasuredRates()
    merged = before.updated(measured)
    same = (merged.tflops_16bit, merged.tops_int8) == (before.tflops_16bit, before.tops_int8)
    return replace(old, measured=merged) if same else replace(old, measured=merged, shares={}, works={})


def learn(known: MachineProfile | None, device: str, seen: Observation) -> MachineProfile:
    """The profile after one more picture; the same as before where its time was that of copying. RequestError: no such
    model."""
    known = known or MachineProfile()
    if not seen.seconds > 0:
        return known
    known = replace(known, outcomes=kept((*known.outcomes, *seen.outcomes)))
    if seen.beside:
        known = replace(known, beside=_with_newer(known.beside, seen.model, seen.beside))
    rates = known_rates(device, known) or UNIT_RATES
    speed = (rates.disk or DISK_BYTES_PER_SECOND) if seen.disk else rates.link
    if seen.streamed_bytes / speed > MOST_COPYING * seen.seconds:
        return known
    name = f"{seen.model}/{seen.arithmetic}"
    work = step_work(find_model(seen.model), (seen.width, seen.height), seen.text_tokens)
    shares = _with_newer(known.shares, name, efficiency(seen, rates))
    return replace(known, shares=shares, works=_with_newer(known.works, name, work))


def beside_steps(result: Result) -> float | None:
    """What caption, first step and decoding took beside the steps, in steps; None where no step was measured."""
    step, seconds = result.seconds_per_step, result.seconds.total - result.seconds.load
    return max(seconds / step - result.steps, LEAST_BESIDE) if step else None


def _with_newer(rows: Mapping[str, tuple[float, ...]], name: str, value: float) -> dict[str, tuple[float, ...]]:
    """The last few values of every name, one of them newer."""
    return {**rows, name: (*rows.get(name, ()), value)[-RECENT_PICTURES:]}


def efficiency(seen: Observation, rates: Rates) -> float:
    """Ideal seconds of a step over the measured ones; offloaded blocks compute `STREAMING_OVERHEAD` longer."""
    model = find_model(seen.model)
    flops = branch_flops(model, (seen.width, seen.height), seen.text_tokens)
    first, second = (
        ideal_seconds(rates, work, seen.arithmetic) * (1 + (STREAMING_OVERHEAD - 1) * moved / branch.num_layers)
        for work, branch, moved in zip(flops, model.branches, seen.streamed_blocks, strict=True)
    )
    ideal = max(first, second) if seen.devices > 1 else first + second
    return ideal / seen.seconds


def read(file: Path, name: str) -> MachineProfile | None:
    """The profile under a name; None where there is none, or none that can be read."""
    row = _rows(file).get(name)
    with suppress(RequestError):
        return None if row is None else from_plain(MachineProfile, row)
    return None


def write(file: Path, name: str, profile: MachineProfile) -> None:
    """Add a profile beside what the file holds under other names, atomically. OSError: the folder is not writable."""
    write_json(file, {"machines": {**_rows(file), name: to_plain(profile)}})


def _rows(file: Path) -> Mapping[str, Any]:
    """Everything the file holds, by name; {} where it is missing or not such a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return {}
    rows = found.get("machines") if isinstance(found, dict) else None
    return rows if isinstance(rows, dict) else {}
