"""Flags that commands share, as typer reads them, and the group of flags of the commands that draw."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ideogram_app.catalog.models import MODELS, find_model
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.catalog.text_encoder import ENCODER_RECIPES
from ideogram_app.cli.output import run_job
from ideogram_app.cli.serve import DATA, OUTPUTS
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.machine.hardware import detect
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.records import Request
from ideogram_app.studio.local_backend import LocalBackend
from ideogram_app.studio.state import Job
from ideogram_app.studio.studio import Studio

ModelFlag = Annotated[str, typer.Option(help=f"{' or '.join(MODELS)}.")]
RecipeFlag = Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)}; the plan chooses where none is named.")]
SideFlag = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DataFlag = Annotated[
    Path,
    typer.Option(
        "--data-dir", "--data", envvar="IDEOGRAM_APP_DATA", help="Where weights rest; the disk that is measured."
    ),
]
OutputFlag = Annotated[
    Path,
    typer.Option("--output-dir", "--output", envvar="IDEOGRAM_APP_OUTPUT_DIR", help="The history, the page's too."),
]
PromptFlag = Annotated[str, typer.Option(help="Plain text or a JSON caption; `-` reads it from standard input.")]
PresetFlag = Annotated[str, typer.Option(help=", ".join(PRESETS))]
CalibrationFlag = Annotated[Path | None, typer.Option(help="A calibration file, in place of the model's own.")]
DeviceFlag = Annotated[str, typer.Option(help="Where rows are packed: cpu, or a GPU as torch names it.")]
EncoderFlag = Annotated[str | None, typer.Option(help=f"How the text encoder is kept: {', '.join(ENCODER_RECIPES)}.")]
UnconditionalFlag = Annotated[Path | None, typer.Option(help="The second transformer's file, where it lies apart.")]
SavingFlag = Annotated[list[str] | None, typer.Option(help=f"What may be left out: {', '.join(SPEEDUPS)}; repeatable.")]
CompileFlag = Annotated[bool, typer.Option("--compile", help="Compile kernels first; seconds, once on a machine.")]
GuidanceFlag = Annotated[float | None, typer.Option(help="One guidance for every step, in place of the preset's.")]
AdaptFlag = Annotated[bool, typer.Option("--adapt", help="When memory runs out, go on with less, and say with what.")]
LimitFlag = Annotated[float | None, typer.Option("--device-limit", min=0, help="GB of device memory to plan with.")]
HostLimitFlag = Annotated[float | None, typer.Option("--host-limit", min=0, help="GB of RAM to plan with.")]
ReserveFlag = Annotated[
    float,
    typer.Option(
        "--reserve-vram", min=0, envvar="IDEOGRAM_APP_RESERVE_VRAM", help="GB of device memory to leave to others."
    ),
]


@dataclass(frozen=True)
class DrawingFlags:
    """The flags that `generate` and `compare` share."""

    preset: PresetFlag = "default-20"
    width: SideFlag = None
    height: SideFlag = None
    seed: int = 0
    guidance: GuidanceFlag = None
    saving: SavingFlag = None
    compiled: CompileFlag = False
    adapt: AdaptFlag = False
    device_limit: LimitFlag = None
    host_limit: HostLimitFlag = None
    reserve: ReserveFlag = 0.0
    data: DataFlag = DATA
    output: OutputFlag = OUTPUTS

    def plan_inputs(self, model: str) -> PlanInputs:
        """Inputs of the plan that chooses a recipe on this machine."""
        limits = {"limit_bytes": in_bytes(self.device_limit), "host_limit_bytes": in_bytes(self.host_limit)}
        reserve = in_bytes(self.reserve) or 0
        return PlanInputs.of(detect(self.data), model, self.width, self.height, reserve_bytes=reserve, **limits)

    def draw(self, prompt: str, model: str, recipes: tuple[str, ...]) -> Job:
        """Draw in the same worker as the page's; sizes left out are the model's own."""
        typed = sys.stdin.read() if prompt == "-" else prompt
        default = find_model(model).default_size
        request = Request(
            model=model,
            caption=parse_prompt(typed).caption,
            recipes=recipes,
            preset=self.preset,
            width=self.width or default[0],
            height=self.height or default[1],
            seed=self.seed,
            guidance=self.guidance,
            savings=tuple(self.saving or ()),
            compiled=self.compiled,
            adapt=self.adapt,
            device_limit_bytes=in_bytes(self.device_limit),
            host_limit_bytes=in_bytes(self.host_limit),
        )
        studio = Studio(LocalBackend(self.data), self.output, reserve_bytes=in_bytes(self.reserve) or 0)
        return run_job(studio, lambda: studio.submit_compare(request))


def with_drawing_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command with the flags of `DrawingFlags` in the place of its parameter `drawing`."""
    shared = inspect.signature(DrawingFlags, eval_str=True).parameters
    flags: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        flags += shared.values() if parameter.name == "drawing" else [parameter]

    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        command(drawing=DrawingFlags(**{name: given.pop(name) for name in shared}), **given)

    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flags]
    gathered.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    return gathered


def split_names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def in_bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else round(gigabytes * 1e9)
