"""Text output of the command line: the machine, a plan, progress on one line, a result.

Standard error for progress, standard output for answers. Left out: colours and bars, which logs and pipes cannot show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from typing import TextIO, TypeVar

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.errors import RequestError
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.intervals import held
from ideogram_app.planning.planner import Plan, Predicted
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import IN_BYTES, Event, Fallback, Result
from ideogram_app.studio.state import Job, State
from ideogram_app.studio.studio import Studio
from ideogram_app.text import between, decibels, duration, gb, remaining

Answer = TypeVar("Answer")


def run_job(studio: Studio, submit: Callable[[], str]) -> Job:
    """Do one job in the same worker as the page's; RequestError where it failed as a whole, or was stopped."""
    studio.start()
    try:
        job = follow(studio, submit())
    finally:
        studio.close()
    if job.state != "done" and not job.results:
        raise RequestError(job.error or "Stopped before anything was done")
    return job


def describe_hardware(hardware: Hardware) -> list[str]:
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
    if hardware.self_check:
        lines.append(f"Checked  {hardware.self_check}")
    if hardware.problem:
        lines.append(f"Problem  {hardware.problem}")
    return lines


def describe_plan(decided: Plan) -> list[str]:
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
        lines.append(f"  about {duration(seconds)} a step" if seconds else "  time a step: not known for this device")
        lines += describe_ranges(expected)
    lines += [f"  - {reason}" for reason in decided.reasons]
    if decided.suggestion:
        lines.append(f"  > {decided.suggestion}")
    return lines


def describe_ranges(expected: Predicted) -> list[str]:
    """The 90 % intervals of a plan's numbers, in one line; none where nothing has one."""
    rows = (
        ("a step", expected.seconds_per_step_range, duration),
        ("a picture", expected.seconds_per_picture_range, duration),
        ("device", expected.peak_device_bytes_range, gb),
        ("RAM", expected.peak_host_bytes_range, gb),
        ("download", expected.download_seconds_range, remaining),
    )
    said = [f"{name} {between(within.low, within.high, shown)}" for name, within, shown in rows if within]
    return [f"  nine times in ten: {', '.join(said)}"] if said else []


def describe_held(known: MachineProfile | None) -> str:
    """How often the intervals of plans held on this machine."""
    rows = held(known.outcomes) if known else {}
    if not rows:
        return "Ranges   none of this machine was put to the test yet"
    each = ", ".join(f"{name} {row.held} of {row.of}" for name, row in rows.items())
    of = sum(row.of for row in rows.values())
    return f"Ranges   held {sum(row.held for row in rows.values())} of the last {of} numbers measured here: {each}"


class ProgressLine:
    """Progress in the last line of a terminal; in a file or a pipe one line for each phase."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.shown = stream or sys.stderr, ""

    def show(self, event: Event) -> None:
        line, before = describe_event(event), self.shown
        if not line or line == before:
            return
        self.shown = line
        if self.stream.isatty():
            print("\r" + line.ljust(len(before)), end="", file=self.stream, flush=True)
        elif line.split()[:2] != before.split()[:2]:
            print(line, file=self.stream, flush=True)

    def print_above(self, lines: list[str]) -> None:
        """Print lines that stay, where progress may stand in the last one."""
        if self.shown and self.stream.isatty():
            lines, self.shown = ["", *lines], ""
        print("\n".join(lines), file=self.stream, flush=True)


def follow(
    studio: Studio, job_id: str, stream: TextIO | None = None, report: Callable[[State], list[str]] | None = None
) -> Job:
    """Print a job's progress until it is over, and return it. Ctrl-C stops the job and waits for it to end.

    `report` gives lines of its own about every state, printed above the progress.
    """
    progress, version = ProgressLine(stream), -1
    while True:
        try:
            state = studio.watch(version, timeout=1.0)
            version, job = state.version, studio.wait(job_id, timeout=0)
            if lines := report(state) if report else []:
                progress.print_above(lines)
            if job.stage:
                progress.show(job.stage)
            if job.is_over:
                print(file=progress.stream)
                return job
        except KeyboardInterrupt:
            print("\nstopping ...", file=progress.stream)
            studio.stop(job_id)


def drain(events: Generator[Event, None, Answer]) -> Answer:
    """Print the progress of an iterator of events to its end, and return what it returns."""
    progress = ProgressLine()
    while True:
        try:
            progress.show(next(events))
        except StopIteration as end:
            print(file=progress.stream)
            answer: Answer = end.value
            return answer


def finish(events: Iterator[Event]) -> Event:
    """`drain`, for an iterator whose last event says what came of it."""
    progress, event = ProgressLine(), Event("")
    for event in events:
        progress.show(event)
    print(file=progress.stream)
    return event


def describe_event(event: Event) -> str:
    """One line: what is being done, how far it is and how long it will take."""
    parts = [f"{event.recipe}:" if event.recipe else "", event.phase]
    if event.total:
        parts.append(
            f"{event.done} of {event.total}" if event.phase == "denoise" else f"{event.done / event.total:.0%}"
        )
    if event.phase in IN_BYTES and event.rate:
        parts.append(f"{gb(event.rate)}/s")
    if event.seconds_left is not None:
        parts.append(f"{remaining(event.seconds_left)} left")
    return " ".join(part for part in parts if part)


def describe_result(result: Result) -> str:
    """A row of the table of recipes; below it the fallbacks taken, or those that can be tried."""
    title = f"{find_recipe(result.recipe).title:<12}"
    further = [f"\n  - {sentence}" for sentence in result.given_up]
    if result.error:
        further += [f"\n  > {describe_offer(fallback)}" for fallback in result.offers]
        return f"{title} failed: {result.error}{''.join(further)}"
    step = f"{(result.seconds_per_step or 0) * 1000:7.0f} ms/step"
    memory = f"weights {gb(result.weight_bytes or 0):>8}, peak {gb(result.peak_memory_bytes or 0):>8}"
    distance = f"PSNR {decibels(result.psnr):>8}, SSIM {result.ssim:.4f}" if result.psnr is not None else ""
    ran = f"  ran: {result.engaged}, {result.residency}" if result.given_up else ""
    row = f"{title} {result.seconds.total:7.2f} s {step}, {memory}  {distance}".rstrip()
    return f"{row}{ran}{''.join(further)}"


def describe_offer(fallback: Fallback) -> str:
    """A way to draw with less, and the flags that take it."""
    flags = [f"--recipe {fallback.recipe}", f"--width {fallback.width}", f"--height {fallback.height}"]
    for name, limit in (("device", fallback.device_limit_bytes), ("host", fallback.host_limit_bytes)):
        flags += [f"--{name}-limit {limit / 1e9:.2f}"] if limit is not None else []
    same = " (the same picture)" if fallback.same_picture else ""
    return f"{fallback.title}{same}: {' '.join(flags)}"
