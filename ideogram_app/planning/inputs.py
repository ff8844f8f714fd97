"""Plan inputs: a machine, a model, a picture, and the memory that may be used for it, as one frozen `PlanInputs`.

    plan(PlanInputs.of(hardware, "ideogram-4", recipe="gguf-q4_k"))      by names
    plan(PlanInputs.of_request(request, hardware))                       size, limits and savings of a request

Built once and carried; another question is a `dataclasses.replace` of them. The few numbers that follow from them
directly stand here too: free memory of each device, RAM that is missing, bytes and seconds of a recipe. Free memory
counts, never the total.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ideogram_app.catalog.models import Model, check_size, find_model
from ideogram_app.catalog.presets import PRESETS, find_preset
from ideogram_app.catalog.reasons import NOTHING, Reason
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.speedups import cached_bytes
from ideogram_app.machine.attention import expected
from ideogram_app.machine.capabilities import (
    arithmetic,
    compute_type,
    decoder_type,
    device_name,
    pair_objection,
    products,
    widens_products,
)
from ideogram_app.machine.gpu_specs import Rates, find_rates
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory_limit import MemoryLimit, memory_limits
from ideogram_app.planning.activations import MAX_TEXT_TOKENS, Drawing, decode_bytes, tile_gaps
from ideogram_app.planning.footprint import DEVICE_CONTEXT_BYTES, HOST_PROCESS_BYTES, Footprint, footprint
from ideogram_app.planning.profile import UNIT_RATES, MachineProfile, known_rates
from ideogram_app.planning.step_time import TYPICAL_TEXT_TOKENS, branch_flops, ideal_seconds, published_share
from ideogram_app.records import Request

ASSUMED_FREE = 0.93  # of a described device that names no free memory: the desktop holds the rest
# Windows locks no more than about half of the RAM for devices; ComfyUI keeps to this share of it (model_management.py).
# Elsewhere what is free can be locked.
WINDOWS_LOCKED_SHARE = 0.4
# Sides in pixels of the tiles in which a picture may be decoded, all multiples of 64; larger ones have fewer seams and
# decode less twice, for a quarter of a tile overlaps its neighbour.
TILE_SIDES = (1024, 768, 512, 384, 256)


@dataclass(frozen=True)
class DeviceAssignment:
    """A device, the bytes that may be used of it, and which transformers it holds: 0 conditional, 1 unconditional."""

    device: int
    free: int
    branches: tuple[int, ...]


def within(hardware: Hardware, host_limit_bytes: int | None) -> Hardware:
    """The machine with no more free RAM than may be planned with."""
    free = hardware.host_free_bytes
    if host_limit_bytes is None:
        return hardware
    return replace(hardware, host_free_bytes=host_limit_bytes if free is None else min(free, host_limit_bytes))


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan is computed from.

    Attributes:
        size: width and height of the picture, in pixels.
        recipe: what was asked for by name; None lets the plan choose.
        stored_bytes: what of the download and of the files made from it is on disk already.
        ready: recipes whose files are complete, whatever became of the download: they need no room on disk.
        text_tokens: of the caption. The longest one, which stands for a caption not known yet, is what memory is
            planned for; the time of a step is then that of a usual one.
        reserve_bytes: free memory of every device that is left to other programs.
        limit_bytes: the most memory of a device to plan with, where that is less than what is free; None: no limit.
        host_limit_bytes: the most RAM to plan with, likewise.
        known: the measured profile of this machine (planning/profile.py); it counts before published numbers.
        steps: of the picture, which its seconds are planned for.
        savings: keys of `SPEEDUPS`; some cache tensors from step to step, which takes memory.

    Raises:
        RequestError: the size cannot be drawn.
    """

    hardware: Hardware
    model: Model
    size: tuple[int, int]
    recipe: str | None = None
    stored_bytes: int = 0
    ready: Collection[str] = ()
    text_tokens: int = MAX_TEXT_TOKENS
    reserve_bytes: int = 0
    limit_bytes: int | None = None
    host_limit_bytes: int | None = None
    known: MachineProfile | None = None
    savings: tuple[str, ...] = ()
    steps: int = PRESETS["default-20"].steps

    def __post_init__(self) -> None:
        check_size(*self.size)

    @classmethod
    def of(
        cls, hardware: Hardware, model: str, width: int | None = None, height: int | None = None, **others: Any
    ) -> PlanInputs:
        """By the model's name; sides left out are its default. others: any of the other attributes.

        Raises:
            RequestError: there is no such model, or the size cannot be drawn.
        """
        shape = find_model(model)
        return cls(hardware, shape, (width or shape.default_size[0], height or shape.default_size[1]), **others)

    @classmethod
    def of_request(cls, request: Request, hardware: Hardware, **others: Any) -> PlanInputs:
        """Model, size, limits and savings of a request, on a machine. others: the attributes that no request has.

        Raises:
            RequestError: there is no such model, or the size cannot be drawn.
        """
        return cls.of(
            hardware,
            request.model,
            request.width,
            request.height,
            limit_bytes=request.device_limit_bytes,
            host_limit_bytes=request.host_limit_bytes,
            savings=request.savings,
            steps=find_preset(request.preset).steps,
            **others,
        )

    @functools.cached_property
    def dtype(self) -> str:
        """The computing type: float32, bfloat16 or float16."""
        return compute_type(self.hardware)[0]

    @property
    def published(self) -> bool:
        """Whether this is the model that is fetched, and not the miniature that ships with the program."""
        return self.model.source_bytes > 0

    @property
    def devices(self) -> tuple[tuple[int, int], ...]:
        """Number and usable bytes of every device that torch has kernels for, the freest first."""
        hardware, own = self.hardware, self.hardware.device_index
        first = hardware.device_free_bytes
        if first is None:
            first = int((hardware.device_memory_bytes or 0) * ASSUMED_FREE)
        listed = hardware.devices_free_bytes
        free = list(listed if len(listed) > max(1, own) else (first,) * max(1, hardware.device_count))
        free[own] = min((first, *listed[own : own + 1]))
        usable = [max(0, each - self.reserve_bytes) for each in free]
        if self.limit_bytes is not None:
            usable = [min(each, self.limit_bytes) for each in usable]
        supported = hardware.devices_supported
        rows = [row for row in enumerate(usable) if row[0] == own or supported[row[0] : row[0] + 1] != (False,)]
        return tuple(sorted(rows, key=lambda row: (-row[1], row[0])))

    @property
    def device_free(self) -> int:
        """Usable bytes of the device that would hold both transformers."""
        return self.device_assignments()[0][0].free

    def device_assignments(self) -> tuple[tuple[DeviceAssignment, ...], ...]:
        """What to try: both transformers on one device, and where there is a second, one on each.

        One device: the freest of the first one's kind, which is what the machine is described by. Of a pair, the freer
        has the conditional transformer, which does more: text besides the image. One of them is of that kind, and the
        other the freest that nothing speaks against (`pair_objection`).
        """
        alike, others = self._alike, [row for row in self.devices if row[0] != self._alike[0][0]]
        alone = (DeviceAssignment(*alike[0], (0, 1)),)
        second = next((row for row in others if not pair_objection(self.hardware, alike[0][0], row[0])), None)
        if second is None:
            return (alone,)
        freer, other = sorted((alike[0], second), key=lambda row: (-row[1], row[0]))
        return alone, (DeviceAssignment(*freer, (0,)), DeviceAssignment(*other, (1,)))

    @property
    def not_paired(self) -> Reason:
        """Why a second device does nothing, where there is one and none may share the work; else `NOTHING`."""
        own = self._alike[0][0]
        others = [index for index in range(max(self.hardware.device_count, len(self.devices))) if index != own]
        told = [pair_objection(self.hardware, own, index) for index in others]
        return told[0] if told and all(told) else NOTHING

    @property
    def _alike(self) -> list[tuple[int, int]]:
        """Number and usable bytes of the devices of the kind that the machine is described by, the freest first."""
        return [row for row in self.devices if device_name(self.hardware, row[0]) == self.hardware.name]

    @property
    def memory_limits(self) -> tuple[MemoryLimit, ...]:
        """What torch may allocate on each device, where the driver would not refuse more."""
        return memory_limits(self.hardware, self.devices, DEVICE_CONTEXT_BYTES)

    def host_lacks(self, pageable: int, pinned: int = 0) -> int:
        """Bytes of RAM missing for this beside the process itself; 0 where it is enough or not known. pinned:
        memory that a device copies from, in addition to the pageable rest."""
        free, total = self.hardware.host_free_bytes, self.hardware.host_memory_bytes
        missing = 0 if free is None else max(0, pageable + pinned + HOST_PROCESS_BYTES - free)
        if self.windows and total is not None:
            missing = max(missing, pinned - int(total * WINDOWS_LOCKED_SHARE))
        return missing

    @property
    def windows(self) -> bool:
        return self.hardware.os.startswith("Windows")

    @property
    def dense_bytes(self) -> int:
        """Bytes of a number in the computing type."""
        return 4 if self.dtype == "float32" else 2

    @property
    def decoder_bytes(self) -> int:
        """Bytes of a number in the VAE."""
        return 4 if decoder_type(self.hardware) == "float32" else 2

    def measure(self, recipe: Recipe) -> Footprint:
        """What a recipe takes here."""
        cached = cached_bytes(self.savings, self.model, self.size, self.text_tokens, self.dense_bytes)
        drawing = Drawing(
            model=self.model,
            recipe=recipe,
            size=self.size,
            dense_bytes=self.dense_bytes,
            text_tokens=self.text_tokens,
            arithmetic=arithmetic(self.hardware, recipe)[0] if recipe.gguf_type == "Q4_K" else "",
            kernels=products(self.hardware),
            attention=expected(self.hardware),
            decoder_bytes=self.decoder_bytes,
            widens=widens_products(self.hardware),
        )
        counted = footprint(drawing)
        return replace(counted, workspace=counted.workspace + cached) if cached else counted

    @property
    def feature_bytes(self) -> int:
        """Text features on the host: in float32 for the picture, and in the computing type for the next one."""
        return self.text_tokens * self.model.conditional.llm_features_dim * (4 + self.dense_bytes)

    def decoding(self, size: Footprint, side: int = 0) -> int:
        """Device bytes beside the weights while the picture is decoded, in tiles of this side or whole."""
        (width, height), tile = self.size, side or None
        gaps = tile_gaps(self.model, width, height, self.decoder_bytes, tile)
        return size.standing + decode_bytes(self.model, width, height, self.decoder_bytes, tile) + gaps

    def rates(self, device: int | None = None) -> Rates | None:
        """Peaks of a device, measured or published; of that which is described where None. None: there are neither."""
        name = self.hardware.name if device is None else device_name(self.hardware, device)
        return known_rates(name, self.known) if name == self.hardware.name else find_rates(name)

    def pass_seconds(self, recipe: Recipe, branch: int, device: int | None = None) -> float | None:
        """Seconds of one transformer in one step with all its weights on a device; None where nobody knows.

        Pictures drawn on this machine count first. Published shares are of the published model, whose work fills a
        card, so the miniature has a time only where it was drawn before, and so has anything on a processor.
        """
        how = arithmetic(self.hardware, recipe)[0]
        rates, share = self.rates(device), self.known.share(self.model.name, how) if self.known else None
        if share is None and rates and self.published and self.hardware.kind != "cpu":
            share = published_share(recipe, how)
        if share is None:
            return None
        tokens = TYPICAL_TEXT_TOKENS if self.text_tokens == MAX_TEXT_TOKENS else self.text_tokens
        return ideal_seconds(rates or UNIT_RATES, branch_flops(self.model, self.size, tokens)[branch], how) / share
