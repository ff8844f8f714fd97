"""What the studio has work done by: a row of functions, and the real ones.

The real ones import the rooms below when they are first called, so that the page is up before torch is loaded, and
tests put functions of their own in their place. A preparation of published weights is a download and then the writing,
one after the other in one iterator: whoever drives it sees one job with two stages.

Left out: jobs, their order and who sees them (studio/state.py, studio/worker.py, studio/studio.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ideogram_app.catalog.models import find_model, weight_bytes
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.catalog.text_encoder import DEFAULT
from ideogram_app.checkpoints.published.local import find_source
from ideogram_app.comparison.record import Comparison
from ideogram_app.errors import RequestError
from ideogram_app.folders import bytes_taken
from ideogram_app.hub.access import Access, access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow, memory_now
from ideogram_app.planning.footprint import DISK_MARGIN, encoder_weights
from ideogram_app.planning.learning import ProfileStore
from ideogram_app.planning.planner import Plan
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import Event, Request


@dataclass(frozen=True)
class SourceState:
    """What of a model's published weights is on this disk.

    Attributes:
        state: included (they ship with the program), given (in a folder that the user named), missing, partial (a
            download was begun) or complete.
        bytes: taken on disk; of an included or given source nothing is counted.
        companions_bytes: taken by text encoder and VAE, kept beside what was made; `companions_begun` by those that are
            not finished yet.
        folder: where they lie, or would.
        commit: which version was fetched; "" where none was.
    """

    state: str
    bytes: int = 0
    folder: Path | None = None
    commit: str = ""
    companions_bytes: int = 0
    companions_begun: int = 0

    @property
    def at_hand(self) -> bool:
        """Whether recipes can be made without a download."""
        return self.state in ("included", "given", "complete")


@dataclass(frozen=True)
class Backend:
    """What does the work.

    `status` answers with a `checkpoints.store.Status`, `memory` with what is in use now, `known` with what the machine
    has shown of itself, `loaded` with what stays in memory from one picture to the next, in words; `unload` lets it go.
    """

    detect: Callable[[], Hardware]
    status: Callable[[str, str], Any]
    prepare: Callable[[str, str], Iterator[Event]]
    compare: Callable[[Request, Hardware, Plan, Path], Iterator[Event]]
    write_sheet: Callable[[Comparison, Path], None]
    access: Callable[[str], Access]
    source_state: Callable[[str], SourceState]
    delete_source: Callable[[str], int]
    memory: Callable[[Hardware | None], MemoryNow] = memory_now
    loaded: Callable[[], str] = str
    unload: Callable[[], None] = lambda: None
    known: Callable[[Hardware], MachineProfile | None] = lambda hardware: None


def real_backend(
    data: Path,
    given: Mapping[str, Path] | None = None,
    *,
    offline: bool = False,
    calibration: Path | None = None,
    encoder: str | None = None,
    device: str = "cpu",
    reserve_bytes: int = 0,
) -> Backend:
    """The rooms below, each imported when it is first needed: torch comes with the first of them that needs it.

    Args:
        data: where weights rest.
        given: model -> a folder that already holds its weights; others ship with the program or are fetched.
        offline: never touch the network.
        calibration: what preparations use, in place of the model's own; recipes are then made again where they were
            made without it.
        encoder: how the text encoder is kept beside packed transformers; one kept otherwise is made again. None keeps
            what is there.
        device: where preparations pack.
        reserve_bytes: device memory that drawing leaves alone, for other programs.
    """
    hush()
    sources = _Sources(data, given or {}, offline)

    staying, learning = _Staying(), ProfileStore(data)

    def detect() -> Hardware:
        from ideogram_app.machine import hardware

        return staying.counted_as_free(hardware.detect(data))

    def store() -> Any:
        from ideogram_app.checkpoints.prepared.store import Store

        return Store(data)

    def compare(request: Request, hardware: Hardware, sized: Plan, folder: Path) -> Iterator[Event]:
        from ideogram_app.comparison import compare as comparing

        features, kept = staying.features_and_kept()
        drawn = comparing.compare(
            request,
            store(),
            hardware,
            sized,
            folder,
            features,
            kept=kept,
            reserve_bytes=reserve_bytes,
            known=learning.known(hardware),
            observe=partial(learning.note, hardware),
        )
        return iter(drawn)

    def write_sheet(comparison: Comparison, path: Path) -> None:
        from ideogram_app.comparison import contact_sheet as sheet

        sheet.write_sheet(comparison, path)

    return Backend(
        detect,
        lambda model, recipe: store().status(model, recipe),
        _Preparing(data, sources, calibration, encoder, device).recipe,
        compare,
        write_sheet,
        sources.access,
        sources.state,
        sources.delete,
        known=learning.known,
        loaded=staying.title,
        unload=staying.unload,
    )


class _Staying:
    """What stays in memory between pictures; nothing, and no torch, before the first."""

    def __init__(self) -> None:
        self._features_and_kept: tuple[Any, Any] | None = None

    def features_and_kept(self) -> tuple[Any, Any]:
        """The `FeatureCache` and the `ModelCache` of this process."""
        if self._features_and_kept is None:
            from ideogram_app.model.cache import ModelCache
            from ideogram_app.model.text_encoder.features import FeatureCache

            self._features_and_kept = FeatureCache(), ModelCache()
        return self._features_and_kept

    def title(self) -> str:
        """What is loaded, in words."""
        key = self._features_and_kept[1].key if self._features_and_kept else None
        return f"{find_recipe(key.recipe).title} of {find_model(key.model).title}" if key else ""

    def unload(self) -> None:
        """Let it go; features of captions stay, they are small."""
        if self._features_and_kept:
            self._features_and_kept[1].unload()

    def counted_as_free(self, hardware: Hardware) -> Hardware:
        """RAM of what is loaded can be given back, as device memory that this process holds."""
        if self._features_and_kept is None or hardware.host_free_bytes is None:
            return hardware
        return replace(hardware, host_free_bytes=hardware.host_free_bytes + self._features_and_kept[1].host_bytes)


@dataclass(frozen=True)
class _Preparing:
    """What `prepare` goes by: where weights come from and rest, and how they are packed."""

    data: Path
    sources: _Sources
    calibration: Path | None
    encoder: str | None
    device: str

    def recipe(self, model: str, recipe: str) -> Iterator[Event]:
        """Fetch and keep what is missing, then write the recipe; one that is ready stays as it was tuned."""
        from ideogram_app.checkpoints.prepared.store import Store
        from ideogram_app.prepare.calibration.tuning import calibration_at_hand, tuning_for
        from ideogram_app.prepare.packing import UNTUNED
        from ideogram_app.prepare.transformers import prepare

        store = Store(self.data)
        usable, kept = store.status(model, recipe).usable, store.components_status(model)
        is_other = kept.state != "included" and self.encoder not in (None, kept.recipe)
        if not usable or is_other:
            yield from self.sources.fetch(model, recipe)
        if is_other or not (usable or kept.usable):
            yield from self._companions(store, model)
        folder = self.sources.given.get(model) if usable else self.sources.folder(model)
        tuning = UNTUNED
        if self.calibration or not usable:
            tuning = tuning_for(model, recipe, self.calibration or calibration_at_hand(self.data, model))
        yield from prepare(store, model, recipe, folder, tuning=tuning, device=self.device)

    def _companions(self, store: Any, model: str) -> Iterator[Event]:
        """Text encoder, tokenizer, scheduler and VAE of a pipeline folder; other sources hold none of them."""
        from ideogram_app.checkpoints.prepared.components import ENCODER
        from ideogram_app.prepare.components import prepare_components

        folder = self.sources.folder(model)
        if folder and (folder / ENCODER).is_dir():
            yield from prepare_components(store, model, folder, self.encoder or DEFAULT, self.device)


class _Sources:
    """The published weights of each model: given, fetched or still to be fetched."""

    def __init__(self, data: Path, given: Mapping[str, Path], offline: bool) -> None:
        self.data, self.given, self.offline = data, given, offline

    def state(self, model: str) -> SourceState:
        """What is on disk."""
        from ideogram_app.checkpoints.prepared.store import Store
        from ideogram_app.hub.record import fetched

        source, beside = find_source(model), Store(self.data).components_status(model)
        kept, begun = beside.bytes if beside.usable else 0, beside.bytes if beside.state == "partial" else 0
        if model in self.given:
            return SourceState("given", 0, self.given[model], "", kept, begun)
        if source.included:
            return SourceState("included", folder=source.included)
        folder = self._fetched_folder(model)
        complete, taken = fetched(source, folder), bytes_taken(folder)
        if complete:
            return SourceState("complete", taken, folder, complete.commit, kept, begun)
        return SourceState("partial" if taken else "missing", taken, folder, "", kept, begun)

    def folder(self, model: str) -> Path | None:
        """The folder to read weights from; None for what ships with the program, or is neither given nor fetched."""
        state = self.state(model)
        return state.folder if state.state in ("given", "complete") else None

    def fetch(self, model: str, recipe: str) -> Iterator[Event]:
        """Bring the weights here, with room left for what is made from them; nothing where they are at hand."""
        from ideogram_app.hub.download import fetch

        state = self.state(model)
        if state.at_hand:
            return
        row, shape = find_recipe(recipe).protecting(), find_model(model)
        made = sum(weight_bytes(branch, row) for branch in shape.branches)
        beside = 0 if state.companions_bytes else encoder_weights(shape, 2)  # kept already where a recipe was made
        reserve = round((made + beside) * DISK_MARGIN)
        yield from fetch(find_source(model), self._fetched_folder(model), offline=self.offline, reserve_bytes=reserve)

    def access(self, model: str) -> Access:
        """Whether this user may fetch them, in plain words."""
        return access(find_source(model), offline=self.offline)

    def delete(self, model: str) -> int:
        """Remove the download; says how many bytes that freed.

        Raises:
            RequestError: something that is needed to draw is nowhere else.
        """
        from ideogram_app.checkpoints.prepared.store import Store
        from ideogram_app.hub.record import delete_fetched

        if not Store(self.data).components_status(model).usable:
            raise RequestError(
                "The download is still needed: text encoder and VAE are nowhere else yet",
                do="Prepare a precision first, which keeps them beside it",
            )
        return delete_fetched(self._fetched_folder(model))

    def _fetched_folder(self, model: str) -> Path:
        from ideogram_app.hub.record import source_folder

        return source_folder(self.data, find_source(model))


def hush() -> None:
    """Keep libraries from reporting on the terminal what a user can neither use nor change.

    torchao lists CUDA extensions that a CPU build lacks, torch a deprecation inside torchao, diffusers an optional
    class, transformers its loading bars. Errors still come through.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
