"""What the studio has work done by: five functions, and the real ones.

The real ones import the rooms below when they are first called, so that the page is up before torch is loaded, and
tests put functions of their own in their place.

Left out: logic.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ideogram_app.comparison import Comparison
from ideogram_app.flow import Event, Request
from ideogram_app.hardware import Hardware
from ideogram_app.planner import Plan


@dataclass(frozen=True)
class Backend:
    """What does the work. `status` answers with an object that has `state`, `path`, `bytes` and `detail`."""

    detect: Callable[[], Hardware]
    status: Callable[[str, str], Any]
    prepare: Callable[[str, str], Iterator[Event]]
    compare: Callable[[Request, Hardware, Plan, Path], Iterator[Event]]
    write_sheet: Callable[[Comparison, Path], None]


def real_backend(data: Path, source: Path | None = None) -> Backend:
    """The rooms below, each imported when it is first needed: torch comes with the first of them.

    Args:
        data: where prepared weights rest.
        source: a folder with the weights to prepare from; what ships with the program where None.
    """
    _hush()

    def detect() -> Hardware:
        from ideogram_app import hardware

        return hardware.detect(data)

    def store() -> Any:
        from ideogram_app.checkpoints.store import Store

        return Store(data)

    def prepare(model: str, recipe: str) -> Iterator[Event]:
        from ideogram_app.quantization.writer import prepare as write

        return write(store(), model, recipe, source)

    def compare(request: Request, hardware: Hardware, sized: Plan, folder: Path) -> Iterator[Event]:
        from ideogram_app import compare as comparing

        return iter(comparing.compare(request, store(), hardware, sized, folder))

    def write_sheet(comparison: Comparison, path: Path) -> None:
        from ideogram_app import sheet

        sheet.write_sheet(comparison, path)

    return Backend(detect, lambda model, recipe: store().status(model, recipe), prepare, compare, write_sheet)


def _hush() -> None:
    """Keep libraries from reporting on the terminal what a user can neither use nor change.

    torchao lists CUDA extensions that a CPU build lacks, torch a deprecation inside torchao, diffusers an optional
    class, transformers its loading bars. Errors still come through.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
