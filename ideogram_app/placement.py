"""Where the weights of one recipe can live on one machine: on the device, on two of them, in RAM, or on disk.

`place` answers for a single recipe; planner.py compares the answers. Free memory counts, never the total. The three
homes are tried from the fastest down, each a small function that either answers or passes on.

Left out: moving whole transformers to and fro between the branches of a step, which SD.Next measured as painfully
slow; blocks travel instead, while the block before them computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ideogram_app.architecture import Model
from ideogram_app.footprint import (
    DISK_MARGIN,
    HOST_PROCESS_BYTES,
    STREAM_BUFFERS,
    Footprint,
    device_bytes,
    footprint,
    gb,
    room_for_weights,
)
from ideogram_app.hardware import Hardware
from ideogram_app.rates import (
    DISK_BYTES_PER_SECOND,
    LINK_BYTES_PER_SECOND,
    find_rates,
    moved_seconds,
    step_seconds,
)
from ideogram_app.recipes import Recipe
from ideogram_app.verdicts import arithmetic

ASSUMED_FREE = 0.93  # of a described device that names no free memory: the desktop holds the rest


@dataclass(frozen=True)
class Job:
    """The question: everything the answer is computed from.

    Attributes:
        dtype: the computing type, from verdicts.compute_type.
        stored_bytes: what of the download and of the files made from it is on disk already.
        ready: recipes whose files are complete, so that they need no room on disk.
    """

    hardware: Hardware
    model: Model
    size: tuple[int, int]
    dtype: str
    stored_bytes: int = 0
    ready: frozenset[str] = frozenset()

    @property
    def device_free(self) -> int:
        """Free memory of the device, of the fullest where there are several."""
        known = self.hardware.device_free_bytes
        if known is None:
            known = int((self.hardware.device_memory_bytes or 0) * ASSUMED_FREE)
        return min([known, *self.hardware.devices_free_bytes])

    def host_lacks(self, wanted: int) -> int:
        """Bytes of RAM missing for this beside the process itself; 0 where it is enough or not known."""
        free = self.hardware.host_free_bytes
        return 0 if free is None else max(0, wanted + HOST_PROCESS_BYTES - free)

    def measure(self, recipe: Recipe) -> Footprint:
        """What a recipe takes here."""
        dense_bytes = 4 if self.dtype == "float32" else 2
        fused = self.hardware.kind in ("cuda", "rocm", "xpu")
        return footprint(self.model, recipe, self.size, dense_bytes, fused)


@dataclass(frozen=True)
class Option:
    """One recipe, placed.

    Attributes:
        residency: resident, streamed or disk; None where it fits nowhere.
        streamed: bytes of weights that travel in every step.
        split: whether each transformer has a device of its own.
        seconds: of one step, None where the card's rates are not known.
        reason: the sentence for the page: why here, or why nowhere.
        lacks: disk, ram or device: what is missing where it fits nowhere.
    """

    recipe: Recipe
    size: Footprint
    residency: str | None = None
    streamed: int = 0
    split: bool = False
    seconds: float | None = None
    reason: str = ""
    lacks: str = ""

    @property
    def fits(self) -> bool:
        return self.residency is not None

    @property
    def on_device(self) -> int:
        """Bytes of weights that one device holds while a step runs."""
        if self.split:
            return max(self.size.branches)
        return self.size.weights - self.streamed + (STREAM_BUFFERS * self.size.block if self.streamed else 0)


def place(job: Job, recipe: Recipe) -> Option:
    """Find where a recipe can live: disk space first, then the fastest home that has room."""
    option = Option(recipe, job.measure(recipe))
    lacking = "" if recipe.name in job.ready else _disk_lacking(job, option.size)
    if lacking:
        return replace(option, reason=lacking, lacks="disk")
    if job.hardware.kind == "cpu":
        return _on_processor(job, option)
    rates, (products, _) = find_rates(job.hardware.name), arithmetic(job.hardware, recipe)
    option = replace(option, seconds=step_seconds(rates, job.model, recipe, job.size, products))
    return _resident(job, option) or _split(job, option) or _from_ram(job, option) or _from_disk(job, option)


def least_busy(size: Footprint) -> int:
    """Device bytes that a phase needs beside the weights: decoding can shrink to tiles, the encoder to layers."""
    return max(size.workspace, size.decode_tiled, size.encoder_layer)


def _disk_lacking(job: Job, size: Footprint) -> str:
    """Why the disk does not do, or ""."""
    free = job.hardware.disk_free_bytes
    wanted = round(max(0, size.disk - job.stored_bytes) * DISK_MARGIN)
    if free is None or wanted <= free:
        return ""
    return (
        f"The disk lacks {gb(wanted - free)}: the download ({gb(size.download)}) and the files made from it need "
        f"{gb(wanted)} with a tenth to spare, {gb(free)} are free."
    )


def _on_processor(job: Job, option: Option) -> Option:
    size = option.size
    missing = job.host_lacks(size.weights + size.once + size.encoder + max(size.workspace, size.decode_whole))
    if missing:
        reason = f"RAM lacks {gb(missing)} for the {job.model.title} on the processor."
        return replace(option, reason=reason, lacks="ram")
    held = gb(size.weights + size.once)
    reason = f"{option.recipe.title}: both transformers ({held}) live in RAM and run on the processor."
    return replace(option, residency="resident", reason=reason)


def _resident(job: Job, option: Option) -> Option | None:
    """Both transformers on the first device."""
    size, free = option.size, job.device_free
    if size.weights > room_for_weights(free, least_busy(size)) or job.host_lacks(size.once + size.staging):
        return None
    reason = f"{option.recipe.title} keeps both transformers ({gb(size.weights)}) in the {gb(free)} that are free."
    if job.hardware.device_count > 1:
        reason += f" One of the {job.hardware.device_count} devices is enough."
    return replace(option, residency="resident", reason=reason)


def _split(job: Job, option: Option) -> Option | None:
    """One transformer a device. Exact, since the two meet only in their outputs."""
    size, free = option.size, job.device_free
    if job.hardware.device_count < 2 or job.host_lacks(size.once + size.staging):
        return None
    if max(size.branches) > room_for_weights(free, least_busy(size)):
        return None
    reason = (
        f"{option.recipe.title} puts the conditional transformer ({gb(size.branches[0])}) on the first device and the "
        f"unconditional one ({gb(size.branches[1])}) on the second; {gb(free)} are free on each."
    )
    return replace(option, residency="resident", split=True, reason=reason)


def _travelling(job: Job, size: Footprint) -> int | None:
    """Bytes that must travel in every step, or None where the device holds not even what cannot travel."""
    room = room_for_weights(job.device_free, least_busy(size)) - STREAM_BUFFERS * size.block
    if room < size.weights - size.blocks:
        return None
    return max(0, size.weights - room)


def _part(option: Option, moved: int) -> str:
    kept, total = gb(option.size.weights - moved), gb(option.size.weights)
    return f"{option.recipe.title} keeps {kept} of {total} on the device and brings {gb(moved)} in every step"


def _from_ram(job: Job, option: Option) -> Option | None:
    """The blocks that do not fit come from locked RAM. No gain where the GPU shares the RAM."""
    moved = _travelling(job, option.size)
    if moved is None or job.hardware.kind == "mps" or job.host_lacks(moved + option.size.once + option.size.staging):
        return None
    rates = find_rates(job.hardware.name)
    seconds = moved_seconds(option.seconds, moved, rates.link if rates else LINK_BYTES_PER_SECOND)
    reason = f"{_part(option, moved)} from RAM, block by block: {gb(job.device_free)} of device memory are free."
    return replace(option, residency="streamed", streamed=moved, seconds=seconds, reason=reason)


def _from_disk(job: Job, option: Option) -> Option:
    """The blocks that do not fit are read from disk in every step; the last resort, and the place of the refusals."""
    size, title = option.size, option.recipe.title
    moved = _travelling(job, size)
    needed = device_bytes(size.weights - size.blocks + STREAM_BUFFERS * size.block, least_busy(size))
    if moved is None:
        free = gb(job.device_free)
        reason = f"{title} needs {gb(needed)} of device memory even when it is streamed; {free} are free."
        return replace(option, reason=reason, lacks="device")
    shared = needed if job.hardware.kind == "mps" else 0
    short = job.host_lacks(size.once + size.staging + STREAM_BUFFERS * size.block + shared)
    if short:
        reason = f"{title} lacks {gb(short)} of free RAM to load even one matrix at a time."
        return replace(option, reason=reason, lacks="ram")
    missing = job.host_lacks(moved + size.once + size.staging)
    why = "the GPU shares the RAM" if job.hardware.kind == "mps" else f"RAM lacks {gb(missing)} to hold them"
    seconds = moved_seconds(option.seconds, moved, DISK_BYTES_PER_SECOND)
    return replace(
        option, residency="disk", streamed=moved, seconds=seconds, reason=f"{_part(option, moved)} from disk: {why}."
    )
