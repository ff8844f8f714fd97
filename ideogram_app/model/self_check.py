"""Self-check of what needs the model: a whole block per storage, a copy through the offload ring; and when it is made.

    checked(...)      while a recipe is loaded: what the record knows, or a check of what that recipe will use
    check_all(...)    every case there is, made anew: `python -m ideogram_app check`

On a GPU the first load on a device makes the check, and the first after any change of card, driver, torch, Triton or
program; the cases of one recipe alone, so that it takes seconds. On a processor it is made only when asked for: its
products are tried at their first use (kernels/processor.py), all else is plain torch, and the check would take longer
than the miniature's picture; what `check` has found there is used. Left out: the cases themselves
(kernels/self_check_cases.py, model/self_check_cases.py), and the text encoder and decoder, which have no kernels of
this program.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.errors import DeviceError
from ideogram_app.kernels import self_check
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.kernels.contract import InputFormat, Kernels
from ideogram_app.kernels.self_check_assembly import assembled
from ideogram_app.kernels.self_check_attention import ATTENTION, OneBackend, attention_case, attention_names
from ideogram_app.kernels.self_check_cases import Case, kernel_cases
from ideogram_app.kernels.self_check_record import Checked, RecordFile, SelfCheck, identity
from ideogram_app.kernels.self_check_trial import LIMIT_SECONDS, told
from ideogram_app.machine.copies import BlockingCopyStream, copy_stream
from ideogram_app.machine.meter import release
from ideogram_app.model.self_check_cases import BLOCK, RING, STORAGES, block_trials, ring_trials
from ideogram_app.model.transformer.layers import W4A8

log = logging.getLogger(__name__)

CHOSEN = "as chosen"  # a block by the kernels that were found right one by one


@dataclass(frozen=True)
class Uses:
    """What a recipe runs: input formats, what Q4_K is decoded to, and the storages of its blocks."""

    formats: tuple[InputFormat, ...]
    q4_k: tuple[str, ...] = ()
    storages: tuple[str, ...] = ()


EVERYTHING = Uses(("dense", "int8", "rotated"), ("int8", "dense"), STORAGES)


@dataclass(frozen=True)
class Found:
    """What a device draws with after the check.

    Attributes:
        excluded: attention's backends that are not to be tried, as kernels/attention.py names them.
        blocking: why copies beside computing are not to be used, "" where they may be.
        notes: what did not go as it should, a sentence each.
    """

    kernels: Kernels
    excluded: tuple[str, ...] = ()
    blocking: str = ""
    check: SelfCheck | None = None
    notes: tuple[str, ...] = ()


def uses_of(recipe: Recipe, model: str, arithmetic: str) -> Uses:
    """What a recipe runs, its protected layers included."""
    kept = any(
        linear.in_block and not linear.once and not recipe.packs(linear.name)
        for linear in find_model(model).conditional.linears()
    )
    dense: tuple[InputFormat, ...] = ("dense",) if kept else ()
    if recipe.storage == "gguf" and recipe.gguf_type == "Q4_K":
        if arithmetic == W4A8:
            return Uses(("rotated", *dense), ("int8",), (f"Q4_K {W4A8}",))
        return Uses(("dense",), ("dense",), ("Q4_K",))
    if recipe.storage in ("int8", "convrot"):
        own: InputFormat = "int8" if recipe.storage == "int8" else "rotated"
        return Uses((own, *dense), (), (own,))
    return Uses(("dense",), (), (recipe.gguf_type or recipe.storage,))


def checked(first: str, device: torch.device, dtype: torch.dtype, data: Path, uses: Uses) -> Found:
    """What a device draws with, by its record; what the record lacks is checked first, on a processor only by `check`.

    Args:
        first: the name of the kernels that choice.py has for it.
        data: the folder with the record.

    Raises:
        DeviceError: the device stopped or hangs in the check; the program must be started again.
    """
    record = RecordFile(data)
    if device.type == "cpu" and not record.path.exists():
        return Found(find_kernels(first))
    try:
        found = _checked(first, device, dtype, uses, record, only_known=device.type == "cpu")
    except DeviceError:
        raise
    except Exception as problem:  # a check that fails itself must not keep anyone from drawing
        log.exception("The self-check failed")
        return Found(find_kernels(first), notes=(f"The self-check could not be made: {told(problem)}.",))
    for note in found.notes:
        log.warning("%s", note)
    return found


def check_all(first: str, device: torch.device, dtype: torch.dtype, data: Path, limit: float = LIMIT_SECONDS) -> Found:
    """Every case on a device, whatever the record says; it is kept in the record. DeviceError as in `checked`."""
    record = RecordFile(data)
    record.came_back()  # who asks wants everything tried
    return _checked(first, device, dtype, EVERYTHING, record, anew=True, limit=limit)


def _checked(
    first: str,
    device: torch.device,
    dtype: torch.dtype,
    uses: Uses,
    record: RecordFile,
    only_known: bool = False,
    anew: bool = False,
    limit: float = LIMIT_SECONDS,
) -> Found:
    names, kind = self_check.ladder(first), str(dtype).removeprefix("torch.")
    device_name, known = identity(device, names)
    run = _Run(names, device, dtype, uses, record, limit)
    check = SelfCheck(device_name, kind, known) if anew else record.find(device_name, kind, known)
    check = check or SelfCheck(device_name, kind, known)
    if not only_known and run.missing(check):
        with record.alone():
            if not anew:  # another process may have checked while this one waited
                check = record.find(device_name, kind, known) or check
            if run.missing(check):
                check = run.completed(check)
                record.keep(check)
        _clean_up(device)
    return run.found(check)


class _Run:
    """The cases of one device and recipe, and what their rows mean."""

    def __init__(
        self,
        names: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        uses: Uses,
        record: RecordFile,
        limit: float,
    ) -> None:
        self.names, self.device, self.dtype, self.uses, self.record = names, device, dtype, uses, record
        self.limit, self.backends = limit, attention_names(device)
        self.cases = kernel_cases(device, dtype, uses.formats, uses.q4_k)
        self.attention = attention_case(device, dtype)
        self.copies = {"streams": copy_stream} if device.type in ("cuda", "xpu") else {}
        self.copies |= {"blocking": BlockingCopyStream}

    def missing(self, check: SelfCheck) -> list[str]:
        wanted = [(case.kernel, self.names) for case in self.cases]
        wanted += [(ATTENTION, self.backends), (RING, tuple(self.copies))]
        wanted += [(f"{BLOCK}, {storage}", (CHOSEN, "plain")) for storage in self.uses.storages]
        rows = {row.kernel: row.engaged for row in check.kernels}
        return [kernel for kernel, names in wanted if rows.get(kernel) not in (*names, "")]

    def completed(self, check: SelfCheck) -> SelfCheck:
        """The check with what it lacked: kernels, then attention and ring, then blocks of all of these."""
        missing = self.missing(check)
        rows = [row for row in check.kernels if row.kernel not in missing]
        rows += self._check([case for case in self.cases if case.kernel in missing], self.names, find_kernels)
        if ATTENTION in missing:
            rows += self._check([self.attention], self.backends, partial(OneBackend.of, names=self.backends))
        if RING in missing:
            ring = Case(RING, "", partial(ring_trials, self.device), timed=False)
            rows += self._check([ring], tuple(self.copies), self.copies.__getitem__)
        found = self.found(replace(check, kernels=tuple(rows)))
        both = {CHOSEN: found.kernels, "plain": find_kernels("plain")}
        cases = [
            Case(BLOCK, storage, partial(block_trials, storage, self.device, self.dtype, found.excluded), timed=False)
            for storage in self.uses.storages
            if f"{BLOCK}, {storage}" in missing
        ]
        rows += self._check(cases, tuple(both), both.__getitem__)
        return replace(check, kernels=tuple(rows))

    def found(self, check: SelfCheck) -> Found:
        own = {case.kernel for case in self.cases}
        rows = [row for row in check.kernels if row.kernel in own and row.engaged in (*self.names, "")]
        made = assembled(rows, self.names, find_kernels)
        blocks = [f"{BLOCK}, {storage}" for storage in self.uses.storages]
        broken = [row for row in check.kernels if row.kernel in blocks and row.engaged != CHOSEN]
        if broken:
            made = replace(find_kernels("plain"), name=f"plain; {broken[0].kernel}: {broken[0].reason}")
        ring = check.row(RING)
        blocking = ring.reason if ring and ring.engaged == "blocking" and len(self.copies) > 1 else ""
        notes = (*self.record.notes, *(f"{row.kernel}: {row.reason}." for row in check.kernels if not row.engaged))
        return Found(made, self._excluded(check), blocking, check, notes)

    def _excluded(self, check: SelfCheck) -> tuple[str, ...]:
        """The backends before the one that is engaged; none where none was found right."""
        row = check.row(ATTENTION)
        engaged = row.engaged if row else ""
        return self.backends[: self.backends.index(engaged)] if engaged in self.backends else ()

    def _check(self, cases: Sequence[Case], names: tuple[str, ...], build: self_check.Build) -> list[Checked]:
        return self_check.check_kernels(cases, names, build, self.device, self.record, self.limit)


def _clean_up(device: torch.device) -> None:
    """Leave neither memory nor a peak behind: whoever loads measures what a picture takes."""
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
