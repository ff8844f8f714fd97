"""The services that the worker calls, as a protocol: `Backend`; and what is on disk of a model's published weights.

Left out: doing any of it (studio/local_backend.py, and tests/fake_backend.py without a model).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ideogram_app.comparison.history import Comparison
from ideogram_app.hub.access import Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import Event


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


class Backend(Protocol):
    """What a studio has done for it. For the worker's thread alone, but for `access` and `memory`."""

    def detect(self) -> Hardware:
        """The machine as it is now."""

    def known(self, hardware: Hardware) -> MachineProfile | None:
        """What the machine has shown of itself."""

    def memory(self, hardware: Hardware | None) -> MemoryNow:
        """What of its memory is in use now."""

    def status(self, model: str, recipe: str) -> Any:
        """What of a recipe is on disk, as a `checkpoints.store.Status`."""

    def source_state(self, model: str) -> SourceState:
        """What of a model's published weights is on disk."""

    def access(self, model: str) -> Access:
        """Whether this user may fetch them, in plain words."""

    def delete_source(self, model: str) -> int:
        """Remove the download; says how many bytes that freed."""

    def prepare(self, model: str, recipe: str) -> Iterator[Event]:
        """Fetch what is missing and write the files of a recipe."""

    def tokens(self, model: str, caption: str) -> tuple[int, ...]:
        """Token ids of a caption."""

    def compare(self, planned: PlannedRequest, output: Path) -> Iterator[Event]:
        """Draw a request; PNGs go to `output`."""

    def write_sheet(self, comparison: Comparison, path: Path) -> None:
        """The contact sheet."""

    def loaded(self) -> str:
        """What stays in memory from one picture to the next, in words."""

    def unload(self) -> None:
        """Let it go."""
