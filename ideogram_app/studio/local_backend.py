"""`LocalBackend`: the services of studio/worker.py's `Backend`, done on this machine in one data folder.

What it calls is imported when it is first called, so that the page is up before torch is loaded. A preparation of
published weights is one iterator: first the download, then the packing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.catalog.sources import find_source
from ideogram_app.catalog.text_encoder import DEFAULT
from ideogram_app.comparison.history import Comparison
from ideogram_app.errors import RequestError
from ideogram_app.files import DISK_MARGIN, bytes_taken
from ideogram_app.hub.access import Access, access
from ideogram_app.kernels.self_check_record import with_check
from ideogram_app.machine.hardware import Hardware, detect
from ideogram_app.machine.memory import MemoryNow, memory_now
from ideogram_app.planning.footprint import encoder_weights
from ideogram_app.planning.lost_device import LostDevice
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.profile import MachineProfile, ProfileStore
from ideogram_app.records import Event
from ideogram_app.studio.setup_status import made_bytes
from ideogram_app.studio.state import SourceState

RATES_SEEN = 10  # events, of half a second or more each: a few bytes say little of a line
CAPTIONS_TOKENIZED = 64  # the last ones are not tokenized again: reading the tokenizer takes longer than using it


class LocalBackend:
    """A `Backend` with everything in one data folder.

    Args:
        given: model -> a folder that already holds its weights; others ship with the program or are fetched.
        offline: never touch the network.
        calibration: a file used in place of the model's own; recipes made without it are made again.
        encoder: recipe of the text encoder beside packed transformers; one in another is made again. None keeps it.
        device: where preparations pack.
    """

    def __init__(
        self,
        data: Path,
        given: Mapping[str, Path] | None = None,
        *,
        offline: bool = False,
        calibration: Path | None = None,
        encoder: str | None = None,
        device: str = "cpu",
    ) -> None:
        quiet_library_logging()
        self._data, self._given, self._offline = data, given or {}, offline
        self._calibration, self._encoder, self._device = calibration, encoder, device
        self._profiles = ProfileStore(data)
        self._caches: tuple[Any, Any] | None = None  # ModelCache, FeatureCache; no torch before the first picture
        self._lost: dict[str, LostDevice] = {}  # what one picture lost, the next must not try
        self._tokenized = lru_cache(CAPTIONS_TOKENIZED)(self._tokenize)

    @cached_property
    def _store(self) -> Any:
        from ideogram_app.checkpoints.prepared.store import Store

        return Store(self._data)

    def detect(self) -> Hardware:
        hardware = with_check(detect(self._data), self._data)
        if self._caches is None or hardware.host_free_bytes is None:
            return hardware
        return replace(hardware, host_free_bytes=hardware.host_free_bytes + self._caches[0].host_bytes)

    def known(self, hardware: Hardware) -> MachineProfile | None:
        return self._profiles.known(hardware)

    def memory(self, hardware: Hardware | None) -> MemoryNow:
        return memory_now(hardware)

    def source_state(self, model: str) -> SourceState:
        from ideogram_app.hub.record import fetched

        source, components = find_source(model), self._store.components_status(model)
        if source.included and model not in self._given:
            return SourceState("included", folder=source.included)
        source_state = partial(
            SourceState,
            components_bytes=components.bytes if components.usable else 0,
            components_begun=components.bytes if components.state == "partial" else 0,
        )
        if model in self._given:
            return source_state("given", folder=self._given[model])
        folder = self._fetched_folder(model)
        record, taken = fetched(source, folder), bytes_taken(folder)
        state = "complete" if record else "partial" if taken else "missing"
        return source_state(state, taken, folder, record.commit if record else "")

    def access(self, model: str) -> Access:
        return access(find_source(model), offline=self._offline)

    def delete_source(self, model: str) -> int:
        from ideogram_app.hub.record import delete_fetched

        if not self._store.components_status(model).usable:
            raise RequestError(
                "The download is still needed: text encoder and VAE are nowhere else yet",
                do="Prepare a precision first, which keeps them beside it",
            )
        return delete_fetched(self._fetched_folder(model))

    def _fetched_folder(self, model: str) -> Path:
        from ideogram_app.hub.record import source_folder

        return source_folder(self._data, find_source(model))

    def _source_folder(self, model: str) -> Path | None:
        """The folder to read weights from; None for what ships with the program, or is neither given nor fetched."""
        state = self.source_state(model)
        return state.folder if state.state in ("given", "complete") else None

    def status(self, model: str, recipe: str) -> Any:
        return self._store.status(model, recipe)

    def prepare(self, model: str, recipe: str) -> Iterator[Event]:
        """Fetch and keep what is missing, then write the recipe; one that is ready stays as it was tuned."""
        from ideogram_app.prepare.calibration.tuning import UNTUNED, calibration_at_hand, tuning_for
        from ideogram_app.prepare.transformers import prepare

        store = self._store
        usable, components = store.status(model, recipe).usable, store.components_status(model)
        is_other = components.state != "included" and self._encoder not in (None, components.recipe)
        if not usable or is_other:
            yield from self._fetch(model, recipe)
        if is_other or not (usable or components.usable):
            yield from self._components(model)
        folder = self._given.get(model) if usable else self._source_folder(model)
        tuning = UNTUNED
        if self._calibration or not usable:
            tuning = tuning_for(model, recipe, self._calibration or calibration_at_hand(self._data, model))
        yield from prepare(store, model, recipe, folder, tuning=tuning, device=self._device)

    def _fetch(self, model: str, recipe: str) -> Iterator[Event]:
        """Download the weights, with disk left for what is made from them; nothing where they are at hand."""
        from ideogram_app.hub.download import fetch

        state = self.source_state(model)
        if state.at_hand:
            return
        encoder = 0 if state.components_bytes else encoder_weights(find_model(model), 2)
        reserve = round((made_bytes(model, recipe) + encoder) * DISK_MARGIN)
        events = fetch(find_source(model), self._fetched_folder(model), offline=self._offline, reserve_bytes=reserve)
        yield from self._timed(events)

    def _timed(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events of a download; its rate is remembered for the next plan, also where it was stopped half-way."""
        rates = []
        try:
            for event in events:
                rates += [event.rate] if event.phase == "fetch" and event.rate else []
                yield event
        finally:
            if len(rates) >= RATES_SEEN:
                self._profiles.note_download(median(rates))

    def _components(self, model: str) -> Iterator[Event]:
        """Text encoder, tokenizer, scheduler and VAE of a pipeline folder; other sources hold none of them."""
        from ideogram_app.checkpoints.prepared.storage import ENCODER
        from ideogram_app.prepare.components import prepare_components

        folder = self._source_folder(model)
        if folder and (folder / ENCODER).is_dir():
            yield from prepare_components(self._store, model, folder, self._encoder or DEFAULT, self._device)

    def tokens(self, model: str, caption: str) -> tuple[int, ...]:
        return self._tokenized(model, caption)

    def _tokenize(self, model: str, caption: str) -> tuple[int, ...]:
        from ideogram_app.generation.encode_prompt import caption_tokens
        from ideogram_app.model.components import find_components

        return caption_tokens(find_components(model, store=self._store), caption)

    def compare(self, planned: PlannedRequest, output: Path) -> Iterator[Event]:
        from ideogram_app.comparison.compare import compare
        from ideogram_app.generation.session import Session
        from ideogram_app.model.cache import ModelCache
        from ideogram_app.model.text_encoder.features import FeatureCache

        if self._caches is None:
            self._caches = ModelCache(), FeatureCache()
        cache, features = self._caches
        observe = partial(self._profiles.note, planned.inputs.hardware)
        session = Session(self._store, output, cache, features, stays=True, observe=observe, lost=self._lost)
        yield from compare(planned, session)

    def write_sheet(self, comparison: Comparison, path: Path) -> None:
        from ideogram_app.comparison.contact_sheet import write_sheet

        write_sheet(comparison, path)

    def loaded(self) -> str:
        key = self._caches[0].key if self._caches else None
        return f"{find_recipe(key.recipe).title} of {find_model(key.model).title}" if key else ""

    def unload(self) -> None:
        if self._caches:
            self._caches[0].unload()


def quiet_library_logging() -> None:
    """Silence what a user can neither use nor change; errors still come through.

    torchao lists CUDA extensions that a CPU build lacks, torch a deprecation inside torchao, diffusers an optional
    class, transformers its loading bars.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
