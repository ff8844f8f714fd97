"""Commands of `python -m ideogram_app`: doctor, plan, prepare, quantize, calibrate, generate, compare, check ...

Every command prints for people, or one JSON object on standard output with `--json`; progress goes to standard error.
What a user can act upon ends in one line on standard error and exit code 1, anything else keeps its traceback.

Left out: logic. A command reads its flags, calls one function of the package and prints what comes back.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ideogram_app.benchmark.command import benchmark
from ideogram_app.benchmark.receipts import receipt_of_comparison, write_receipt
from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.text_encoder import find_encoder_recipe
from ideogram_app.cli import flags
from ideogram_app.cli.check import check
from ideogram_app.cli.flags import DATA, FIRST_RUN, OUTPUTS, in_bytes, run_program, split_names
from ideogram_app.cli.output import (
    describe_hardware,
    describe_held,
    describe_plan,
    describe_result,
    drain,
    finish,
    run_job,
)
from ideogram_app.cli.prepare import draw_command, prepare_by_stages
from ideogram_app.cli.receipts import receipts
from ideogram_app.comparison.history import SHEET_FILE, find_entry
from ideogram_app.errors import RequestError
from ideogram_app.files import write_text
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.kernels.self_check_record import with_check
from ideogram_app.machine.clocks import read_clocks
from ideogram_app.machine.hardware import Hardware, detect
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.intervals import held
from ideogram_app.planning.planner import plan
from ideogram_app.planning.profile import ProfileStore
from ideogram_app.records import Request
from ideogram_app.studio.local_backend import LocalBackend, quiet_library_logging
from ideogram_app.studio.state import Job
from ideogram_app.studio.studio import Studio
from ideogram_app.text import gb
from ideogram_app.wire import from_json, to_json, to_plain

app = typer.Typer(
    name="ideogram_app",
    help="Ideogram 4 on the card you own: what fits, why, and what each precision costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def doctor(
    model: flags.ModelFlag = "ideogram-4",
    recipe: flags.RecipeFlag = None,
    width: flags.SideFlag = None,
    height: flags.SideFlag = None,
    reserve: flags.ReserveFlag = 0.0,
    data: flags.DataFlag = DATA,
    as_json: flags.JsonFlag = False,
) -> None:
    """Say what this machine is and what would run on it. Fetches nothing."""
    print("Looking at this machine ...", file=sys.stderr)
    wishes = {"recipe": recipe, "reserve_bytes": in_bytes(reserve) or 0}
    hardware = with_check(detect(data), data)
    known = ProfileStore(data).recorded(hardware)
    inputs = PlanInputs.of(hardware, model, width, height, known=known, **wishes)
    counts = {name: to_plain(row) for name, row in held(known.outcomes if known else ()).items()}
    _report(inputs, as_json, [describe_held(known)], {"ranges_held": counts})


@app.command("plan")
def plan_command(
    hardware: Annotated[Path, typer.Option(help="A JSON file that describes a machine, as `doctor --json` prints it.")],
    model: flags.ModelFlag = "ideogram-4",
    recipe: flags.RecipeFlag = None,
    width: flags.SideFlag = None,
    height: flags.SideFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Plan for a machine that a file describes: the one you may buy."""
    _report(PlanInputs.of(_read_hardware(hardware), model, width, height, recipe=recipe), as_json)


@app.command()
def prepare(
    recipe: flags.RecipesArgument = None,
    model: flags.FirstRunModelFlag = None,
    source: Annotated[Path | None, typer.Option(help="A folder that already holds the weights to start from.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False,
    calibration: flags.CalibrationFlag = None,
    encoder: flags.EncoderFlag = None,
    device: flags.DeviceFlag = "cpu",
    data: flags.DataFlag = DATA,
    output: flags.OutputFlag = OUTPUTS,
) -> None:
    """The first run: fetch what is missing, make the files of a recipe and try them; stopped, it continues."""
    encoder = find_encoder_recipe(encoder).name if encoder else None
    chosen = find_model(model or ("miniature" if recipe else FIRST_RUN))
    given = {chosen.name: source} if source else None
    backend = LocalBackend(data, given, offline=offline, calibration=calibration, encoder=encoder, device=device)
    studio = Studio(backend, output)
    job, first = prepare_by_stages(studio, chosen.name, split_names(recipe or ""))
    print(f"{', '.join(job.recipes)} ready for {chosen.title}")
    print(f"First picture: {draw_command(chosen.name, first, data, output)}", file=sys.stderr)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A folder or file with the weights, in any published layout.")],
    recipe: Annotated[str, typer.Option(help=", ".join(RECIPES))],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    unconditional: flags.UnconditionalFlag = None,
    calibration: flags.CalibrationFlag = None,
    device: flags.DeviceFlag = "cpu",
    as_json: flags.JsonFlag = False,
) -> None:
    """Pack weights you have into a folder of your choice; stopped or killed, the same command continues."""
    from ideogram_app.checkpoints.published.transformer import open_source
    from ideogram_app.machine.meter import HostPeak
    from ideogram_app.prepare.calibration.tuning import tuning_for
    from ideogram_app.prepare.transformers import model_of
    from ideogram_app.prepare.transformers import quantize as write

    quiet_library_logging()
    with HostPeak() as memory:
        tuning = tuning_for(model_of(open_source(source, unconditional)), recipe, calibration)
        report = drain(write(source, recipe, out, unconditional=unconditional, tuning=tuning, device=device))
    if as_json:
        _print_json({**to_plain(report), "peak_resident_bytes": memory.highest})
    else:
        speed = f"{report.weights_per_second / 1e6:.1f} M weights/s packed"
        print(f"{report.folder}: {report.seconds:.1f} s, {speed}, peak resident memory {gb(memory.highest)}")


@app.command("calibrate")
def calibrate_command(
    model: flags.ModelFlag = "miniature",
    captions: Annotated[Path | None, typer.Option(help="JSON captions, one a line; those of the program else.")] = None,
    steps: Annotated[int | None, typer.Option(help="For each caption, in place of the preset's.")] = None,
    preset: flags.PresetFlag = "default-20",
    recipe: Annotated[str, typer.Option(help="reference or fp8: the precision of the source.")] = "reference",
    width: flags.SideFlag = None,
    height: flags.SideFlag = None,
    seed: int = 0,
    out: Annotated[
        Path | None, typer.Option(help="The file to make, in place of the one later preparations use.")
    ] = None,
    source: Annotated[Path | None, typer.Option(help="A pipeline folder with text encoder and tokenizer.")] = None,
    data: flags.DataFlag = DATA,
) -> None:
    """Watch the model draw a few captions: smoothing, protection and GGUF's search go by what its layers read."""
    from ideogram_app.checkpoints.prepared.store import Store
    from ideogram_app.prepare.calibration.collect import CAPTIONS, OF_MINIATURE, calibrate, read_captions
    from ideogram_app.prepare.calibration.tuning import calibration_file

    quiet_library_logging()
    shipped = OF_MINIATURE if model == "miniature" else CAPTIONS
    path, default = out or calibration_file(data, model), find_model(model).default_size
    request = Request(model, "", (recipe,), preset, width or default[0], height or default[1], seed)
    asked, machine = read_captions(captions or shipped), detect(data)
    events = calibrate(request, asked, Store(data), machine, path, steps=steps, source=source)
    print(f"{path}: {finish(events).message}")


@dataclass(frozen=True)
class DrawingFlags:
    """The flags that `generate` and `compare` share."""

    preset: flags.PresetFlag = "default-20"
    width: flags.SideFlag = None
    height: flags.SideFlag = None
    seed: int = 0
    guidance: flags.GuidanceFlag = None
    saving: flags.SavingFlag = None
    compiled: flags.CompileFlag = False
    adapt: flags.AdaptFlag = False
    device_limit: flags.LimitFlag = None
    host_limit: flags.HostLimitFlag = None
    reserve: flags.ReserveFlag = 0.0
    data: flags.DataFlag = DATA
    output: flags.OutputFlag = OUTPUTS

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
            width=self.width or default[0],
            height=self.height or default[1],
            savings=tuple(self.saving or ()),
            device_limit_bytes=in_bytes(self.device_limit),
            host_limit_bytes=in_bytes(self.host_limit),
            **{name: getattr(self, name) for name in ("preset", "seed", "guidance", "compiled", "adapt")},
        )
        studio = Studio(LocalBackend(self.data), self.output, reserve_bytes=in_bytes(self.reserve) or 0)
        return run_job(studio, lambda: studio.submit_compare(request))


def with_drawing_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command with the flags of `DrawingFlags` in the place of its parameter `drawing`."""
    shared = inspect.signature(DrawingFlags, eval_str=True).parameters
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += shared.values() if parameter.name == "drawing" else [parameter]

    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        command(drawing=DrawingFlags(**{name: given.pop(name) for name in shared}), **given)

    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    gathered.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    return gathered


@app.command()
@with_drawing_flags
def generate(
    prompt: flags.PromptFlag,
    out: Annotated[Path, typer.Option(help="Where the PNG goes.")],
    *,
    model: flags.ModelFlag = "miniature",
    recipe: flags.RecipeFlag = None,
    drawing: DrawingFlags,
    as_json: flags.JsonFlag = False,
) -> None:
    """Draw one picture with one recipe; the plan chooses it where none is named."""
    if recipe is None:
        recipe = plan(drawing.plan_inputs(model)).recipe
    job = drawing.draw(prompt, model, (recipe or "reference",))
    result = job.results[0]
    if result.image:
        _copy(Path(result.image), out)
    _print_json(to_plain(result)) if as_json else print(describe_result(result))
    _insist(job)


@app.command()
@with_drawing_flags
def compare(
    prompt: flags.PromptFlag,
    recipes: Annotated[str, typer.Option(help=f"With commas, in the order of display: {', '.join(RECIPES)}.")],
    out: Annotated[Path | None, typer.Option(help="Where the contact sheet (PNG) goes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go, as JSON.")] = None,
    receipt: flags.ReceiptFlag = None,
    model: flags.ModelFlag = "miniature",
    *,
    drawing: DrawingFlags,
) -> None:
    """Draw one caption in several precisions and put them side by side."""
    from ideogram_app.checkpoints.prepared.manifest import fingerprint
    from ideogram_app.checkpoints.prepared.store import Store

    job = drawing.draw(prompt, model, split_names(recipes))
    if job.entry:
        entry = find_entry(drawing.output.absolute(), job.entry)
        if out and (entry.folder / SHEET_FILE).is_file():  # else the job says why it could not be written
            _copy(entry.folder / SHEET_FILE, out)
        if json_file:
            write_text(json_file, to_json(entry.comparison))
        if receipt:
            store = Store(drawing.data)
            weights = {row.engaged: fingerprint(store.path(model, row.engaged)) for row in job.results if row.engaged}
            write_receipt(receipt, receipt_of_comparison(entry.comparison, weights, read_clocks()))
    print("\n".join(describe_result(result) for result in job.results))
    _insist(job)


app.command()(benchmark)
app.command()(check)
app.command()(receipts)


def _copy(file: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out)


def _insist(job: Job) -> None:
    """Exit code 1 unless everything asked for was drawn."""
    failed = [f"{result.recipe}: {result.error}" for result in job.results if result.error]
    if job.state != "done" or failed:
        raise RequestError(job.error or f"Not everything was drawn. {' '.join(failed) or job.state}")


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
    inputs: PlanInputs, as_json: bool, of_machine: Sequence[str] = (), more: Mapping[str, Any] | None = None
) -> None:
    """Print machine and plan; of_machine: further lines for people, more: further fields of the JSON."""
    hardware, decided = inputs.hardware, plan(inputs)
    if as_json:
        _print_json({"hardware": to_plain(hardware), "plan": to_plain(decided), **(more or {})})
    else:
        print("\n".join([*describe_hardware(hardware), *of_machine, "", *describe_plan(decided)]))


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command named in `sys.argv`."""
    run_program(app)
