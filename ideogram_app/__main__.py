"""`python -m ideogram_app`: what the page does, without the page.

Every command prints for people, or one JSON object on standard output with `--json`; progress goes to standard error.
What a user can act upon ends in one line on standard error and exit code 1, anything else keeps its traceback.

Left out: logic. A command reads its flags, calls one function of the package and prints what comes back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ideogram_app.architecture import MODELS
from ideogram_app.errors import AppError, RequestError
from ideogram_app.footprint import gb
from ideogram_app.hardware import Hardware, detect
from ideogram_app.planner import Plan, plan
from ideogram_app.recipes import RECIPES
from ideogram_app.wire import from_json, to_plain

app = typer.Typer(
    name="ideogram_app",
    help="Ideogram 4 on the card you own: what fits, why, and what each precision costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelFlag = Annotated[str, typer.Option(help=f"{' or '.join(MODELS)}.")]
RecipeFlag = Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)}; the plan chooses where none is named.")]
WidthFlag = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
HeightFlag = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DataFlag = Annotated[Path, typer.Option(help="The folder where weights rest; its disk is the one that is measured.")]


@app.command()
def doctor(
    model: ModelFlag = "ideogram-4",
    recipe: RecipeFlag = None,
    width: WidthFlag = None,
    height: HeightFlag = None,
    data: DataFlag = Path("data"),
    as_json: JsonFlag = False,
) -> None:
    """Say what this machine is and what would run on it. Fetches nothing."""
    print("Looking at this machine ...", file=sys.stderr)
    _report(detect(data), model, recipe, width, height, as_json)


@app.command("plan")
def plan_command(
    hardware: Annotated[Path, typer.Option(help="A JSON file that describes a machine, as `doctor --json` prints it.")],
    model: ModelFlag = "ideogram-4",
    recipe: RecipeFlag = None,
    width: WidthFlag = None,
    height: HeightFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Plan for a machine that a file describes: the one you may buy."""
    _report(_read_hardware(hardware), model, recipe, width, height, as_json)


def main() -> None:
    """Run a command; a problem the user can act upon becomes one line and exit code 1."""
    try:
        app()
    except AppError as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        sys.exit(1)


def _read_hardware(path: Path) -> Hardware:
    """A described machine: a Hardware object, or the whole object that `doctor --json` prints."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise RequestError(f"The hardware file {path} cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise RequestError(f"The hardware file {path} is not UTF-8 text") from problem
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None  # from_json names the line
    inner = whole.get("hardware") if isinstance(whole, dict) else None
    return from_json(Hardware, json.dumps(inner) if isinstance(inner, dict) else text)


def _report(
    hardware: Hardware, model: str, recipe: str | None, width: int | None, height: int | None, as_json: bool
) -> None:
    decided = plan(hardware, model, width=width, height=height, recipe=recipe)
    if as_json:
        _print_json({"hardware": to_plain(hardware), "plan": to_plain(decided)})
    else:
        print("\n".join([*_hardware_lines(hardware), "", *_plan_lines(decided)]))


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _hardware_lines(hardware: Hardware) -> list[str]:
    """The machine in a few lines; what is not known is left out."""
    capability = hardware.compute_capability
    mark = f" (sm_{capability[0]}{capability[1]})" if capability and hardware.kind == "cuda" else ""
    generation = f", {hardware.architecture}{mark}" if hardware.architecture else ""
    count = f", {hardware.device_count} of them" if hardware.device_count > 1 else ""
    lines = [f"Device   {hardware.name} [{hardware.kind}{generation}{count}]"]
    sizes = (
        ("Memory", hardware.device_free_bytes, hardware.device_memory_bytes, "of the device"),
        ("RAM", hardware.host_free_bytes, hardware.host_memory_bytes, ""),
        ("Disk", hardware.disk_free_bytes, None, ""),
    )
    for label, free, total, of in sizes:
        if free is not None or total is not None:
            parts = [f"{gb(free)} free" if free is not None else "", f"{gb(total)} in all" if total is not None else ""]
            lines.append(f"{label:<8} {', '.join(filter(None, parts))} {of}".rstrip())
    if hardware.cpu_name:
        features = f" ({' '.join(hardware.cpu_features)})" if hardware.cpu_features else ""
        lines.append(f"CPU      {hardware.cpu_name}, {hardware.cpu_cores} cores{features}")
    if hardware.problem:
        lines.append(f"Problem  {hardware.problem}")
    return lines


def _plan_lines(decided: Plan) -> list[str]:
    """The decision, then its reasons."""
    title = MODELS[decided.model].title
    lines = [f"Plan for {title}, {decided.width} x {decided.height}"]
    if decided.recipe is None:
        lines.append("  nothing fits" if not decided.requested_recipe else f"  {decided.requested_recipe} does not fit")
    else:
        lines.append(f"  {decided.recipe}, {decided.residency}, {decided.compute_dtype} on {decided.device}")
        expected = decided.predicted
        seconds = expected.seconds_per_step
        lines.append(f"  peak: {gb(expected.peak_device_bytes)} device, {gb(expected.peak_host_bytes)} RAM")
        lines.append(f"  download {gb(expected.download_bytes)}, disk {gb(expected.disk_bytes)} in all")
        lines.append(f"  about {seconds:.1f} s a step" if seconds else "  time a step: not known for this device")
    lines += [f"  - {reason}" for reason in decided.reasons]
    if decided.suggestion:
        lines.append(f"  > {decided.suggestion}")
    return lines


if __name__ == "__main__":
    main()
