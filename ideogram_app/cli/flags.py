"""Flag types that commands share, as typer reads them, and how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.catalog.text_encoder import ENCODER_RECIPES
from ideogram_app.errors import AppError
from ideogram_app.files import DATA_VARIABLE, OUTPUT_VARIABLE, data_folder, output_folder

FIRST_RUN = "ideogram-4"  # the model whose weights do not ship with the program
DATA, OUTPUTS = data_folder(), output_folder()  # of the page and of every command
ModelFlag = Annotated[str, typer.Option(help=f"{' or '.join(MODELS)}.")]
RecipeFlag = Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)}; the plan chooses where none is named.")]
SideFlag = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_DATA_HELP, _OUTPUT_HELP = "Where weights rest; the disk that is measured.", "The history, the page's too."
DataFlag = Annotated[Path, typer.Option("--data-dir", "--data", envvar=DATA_VARIABLE, help=_DATA_HELP)]
OutputFlag = Annotated[Path, typer.Option("--output-dir", "--output", envvar=OUTPUT_VARIABLE, help=_OUTPUT_HELP)]
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
_RECEIPT_HELP = "A JSON file of what was measured and on what, without caption or names, to send to others."
ReceiptFlag = Annotated[Path | None, typer.Option("--receipt", help=_RECEIPT_HELP)]
LimitFlag = Annotated[float | None, typer.Option("--device-limit", min=0, help="GB of device memory to plan with.")]
HostLimitFlag = Annotated[float | None, typer.Option("--host-limit", min=0, help="GB of RAM to plan with.")]
_RESERVE = {"envvar": "IDEOGRAM_APP_RESERVE_VRAM", "help": "GB of device memory to leave to others."}
ReserveFlag = Annotated[float, typer.Option("--reserve-vram", min=0, **_RESERVE)]
_RECIPES_HELP = f"One or several, with commas: {', '.join(RECIPES)}. The plan chooses where none is named."
RecipesArgument = Annotated[str | None, typer.Argument(help=_RECIPES_HELP)]
_MODEL_HELP = f"{' or '.join(MODELS)}: {FIRST_RUN} where no recipe is named, else the miniature."
FirstRunModelFlag = Annotated[str | None, typer.Option(help=_MODEL_HELP)]


def split_names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def in_bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else round(gigabytes * 1e9)


def run_program(program: Callable[[], object]) -> None:
    """Run a command; a problem the user can act upon becomes one line on standard error and exit code 1."""
    try:
        program()
    except AppError as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        sys.exit(1)
