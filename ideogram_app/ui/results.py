"""Results: pictures side by side with their numbers, live while they are drawn; charts; running job; history.

A finished picture is an <img> on the PNG file itself, so what the page shows are the file's pixels; enlarged ones are
not smoothed. gr.Image and gr.Gallery would send a lossy WebP instead. Charts are HTML tables whose cells are drawn as
bars, so that they are read aloud as numbers. Left out: axes; search in the history and deletion, since each comparison
is a folder, and folders can be sorted and deleted as folders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ideogram_app.catalog.models import find_model
from ideogram_app.comparison.history import COMPARISON_FILE, SHEET_FILE, Entry
from ideogram_app.records import REFERENCE, Event, Interval, Request, Result
from ideogram_app.studio.state import Job
from ideogram_app.text import between, clock, decibels, duration, size
from ideogram_app.ui.offers import gave_up, offers, tried
from ideogram_app.ui.words import act, bar, esc, file_url, gist, progress_words, recipe_title, settings

VERBS = {"prepare": "Preparing", "compare": "Comparing", "delete": "Deleting"}  # of each kind of job
CHARTED_PHASES = (("load", "Load"), ("encode", "Text"), ("denoise", "Draw"), ("decode", "Decode"))
WIDEST = 5  # pictures in a row: narrower columns cut their numbers off at 1440 pixels


@dataclass(frozen=True)
class Shown:
    """The comparison that a tab looks at: a job, or an entry of the history."""

    request: Request
    results: tuple[Result, ...]
    progress: Mapping[str, Event]
    running: bool = False
    state: str = "done"
    error: str = ""
    entry: Entry | None = None


def columns(pictures: int) -> int:
    """Of the grid, so that its rows are evenly filled: six pictures stand in two rows of three."""
    return math.ceil(pictures / math.ceil(pictures / WIDEST)) if pictures else 1


def from_job(job: Job, entry: Entry | None) -> Shown:
    assert job.request is not None
    running = not job.is_over
    return Shown(job.request, job.results, job.progress, running, state=job.state, error=job.error, entry=entry)


def from_entry(entry: Entry) -> Shown:
    return Shown(entry.comparison.request, entry.comparison.results, {}, entry=entry)


def results_grid(shown: Shown | None) -> str:
    """A heading with the settings, then one card a recipe in the order asked for."""
    if shown is None:
        return (
            '<section class="empty" aria-label="Results"><h2>No picture yet</h2>'
            "<p>Describe something, choose the precisions to compare and press Generate. "
            "Every precision starts from the same noise and the same text, so what differs is the precision.</p>"
            "</section>"
        )
    request = shown.request
    known = {result.recipe: result for result in shown.results}
    cards = "".join(
        _card(known[recipe], request) if recipe in known else _pending(recipe, shown.progress.get(recipe), shown)
        for recipe in request.recipes
    )
    error = f'<p class="note bad" role="alert">{esc(shown.error)}</p>' if shown.error else ""
    if shown.state == "stopped":
        error = '<p class="note" role="status">Stopped.</p>'
    ratio = f"{request.width} / {request.height}"
    return (
        f'<section aria-label="Results"><header class="over"><h2>{esc(gist(request.caption))}</h2>'
        f'<p class="quiet">{esc(settings(request))} · {_guidance(shown)}</p></header>{error}'
        f'<div class="grid" style="--ratio:{ratio};--count:{columns(len(request.recipes))}" '
        f'data-running="{str(shown.running).lower()}">{cards}</div></section>'
    )


def _guidance(shown: Shown) -> str:
    """The guidance that ran, as a range of its steps."""
    used = next((result.guidance for result in shown.results if result.guidance), ())
    if not used:
        return esc(shown.request.model)
    ends = f"{used[0]:g}" if used[0] == used[-1] else f"{used[0]:g} to {used[-1]:g}"
    return f"guidance {ends} · {esc(shown.request.model)}"


def _card(result: Result, request: Request) -> str:
    title = esc(recipe_title(result.recipe))
    if result.error or not result.image:
        picture = f'<div class="picture"><p>{esc(result.error or "No picture.")}</p></div>'
        chip, below = '<span class="chip bad">failed</span>', f"{tried(result)}{offers(result)}"
        return _article(result.recipe, " failed", ", failed", picture, chip, below)
    url = esc(file_url(result.image))
    text = esc(f"{recipe_title(result.recipe)}: {gist(result.caption)}")
    picture = (
        f'<a class="picture" href="{url}" target="_blank" rel="noopener" aria-label="Open the PNG of {title}">'
        f'<img src="{url}" width="{result.width}" height="{result.height}" alt="{text}"></a>'
    )
    below = f"{gave_up(result, request)}{_numbers(result)}"
    return _article(result.recipe, "", "", picture, _engaged(result), below)


def _article(recipe: str, look: str, status: str, picture: str, chip: str = "", below: str = "") -> str:
    title = esc(recipe_title(recipe))
    return (
        f'<article class="result{look}" data-recipe="{esc(recipe)}" aria-label="{title}{status}">'
        f"{picture}<header><h3>{title}</h3>{chip}</header>{below}</article>"
    )


def _engaged(result: Result) -> str:
    """What really ran, where it is not simply what was asked for."""
    if result.recipe == REFERENCE and result.engaged == REFERENCE:
        return '<span class="chip">baseline</span>'
    if result.engaged == result.recipe:
        attention = f", {result.attention} attention" if result.attention else ""
        how = f"What was asked for is what ran: {result.arithmetic}, {result.kernels} kernels{attention}"
        return f'<span class="chip ok" title="{esc(how)}">ran as asked</span>'
    return f'<span class="chip" title="What really ran">ran: {esc(recipe_title(result.engaged))}</span>'


def _numbers(result: Result) -> str:
    """What was measured, and below it what the plan expected, with the interval that should hold nine of ten."""
    memory = size(result.peak_memory_bytes)
    expected = result.predicted_host_bytes if result.peak_device_bytes is None else result.predicted_device_bytes
    said = result.predicted
    in_range = said.host_bytes_range if result.peak_device_bytes is None else said.device_bytes_range
    memory_beside = _beside(expected, in_range, size)
    peak = "Peak of the device, or of the process where there is no device; beside it what the plan expected"
    step = _beside(said.seconds_per_step, said.seconds_per_step_range, duration)
    picture = _beside(said.seconds_per_picture, said.seconds_per_picture_range, duration)
    warm = "weights were loaded" if result.warm else ""
    of_total = " · ".join(part for part in (warm, f"{picture} without loading" if picture else "") if part)
    rows = [
        ("A step", "Median of the steps after the first", duration(result.seconds_per_step), step),
        ("Total", "Loading, reading the caption, drawing and decoding", duration(result.seconds.total), of_total),
        ("Memory", peak, memory, memory_beside),
        ("Weights", "Of both transformers, as held while drawing", size(result.weight_bytes), ""),
        ("PSNR", "To the reference's picture; higher is closer", decibels(result.psnr), ""),
        ("SSIM", "To the reference's picture; 1 is the same", "–" if result.ssim is None else f"{result.ssim:.4f}", ""),
    ]
    inside = "".join(
        f'<div><dt title="{esc(meaning)}">{name}</dt><dd>{esc(value)}'
        f"{f' <small>{esc(note)}</small>' if note else ''}</dd></div>"
        for name, meaning, value, note in rows
    )
    return f'<dl class="strip">{inside}</dl>'


def _beside(expected: float | None, within: Interval | None, shown: Callable[[float], str]) -> str:
    """What the plan expected, with its 90 % interval; "" where nobody knew."""
    if not expected:
        return ""
    return f"expected {shown(expected)}{f' ({between(within.low, within.high, shown)})' if within else ''}"


def _pending(recipe: str, event: Event | None, shown: Shown) -> str:
    """A card whose picture is still to come."""
    if not shown.running:
        return _article(recipe, " failed undrawn", ", not drawn", '<div class="picture"><p>Not drawn.</p></div>')
    preview = ""
    if event and event.preview:
        title = esc(recipe_title(recipe))
        preview = f'<img src="data:image/png;base64,{esc(event.preview)}" alt="Preview of {title}">'
    if event and event.phase == "prepare" and event.done >= event.total:
        event = None  # prepared, and now it waits for its turn
    progress = bar(f"{recipe_title(recipe)}: progress", event) if event else ""
    words = f'{progress}<p class="quiet words">{esc(progress_words(event)) if event else "Waiting"}</p>'
    return _article(recipe, " live", ", in progress", f'<div class="picture">{preview}</div>', below=words)


def job_bar(job: Job | None, waiting: int) -> str:
    """One line about what the worker does; empty when it rests."""
    if job is None or job.is_over:
        return ""
    names = recipe_title(job.recipes[0]) if len(job.recipes) == 1 else f"{len(job.recipes)} precisions"
    if job.kind == "delete":
        names = f"the download of {find_model(job.model).title}"
    now = ""
    if job.stage:
        who = f"{recipe_title(job.stage.recipe)}: " if job.stage.recipe and len(job.recipes) > 1 else ""
        now = esc(who + progress_words(job.stage))
    more = f' <span class="chip">{waiting} waiting</span>' if waiting else ""
    return (
        f'<div class="job"><header><div><p role="status"><strong>{VERBS[job.kind]} {esc(names)}</strong>{more}</p>'
        f'<p class="quiet words">{now or "Starting …"}</p></div>'
        f"{act('stop', job.id, 'Stop', 'Stop this job')}</header>{bar(f'{VERBS[job.kind]} {names}', job.stage)}</div>"
    )


def downloads(shown: Shown | None) -> str:
    """Links to the files of a saved comparison: the contact sheet and the JSON."""
    if shown is None or shown.entry is None:
        return ""
    files = (("sheet", SHEET_FILE, "contact sheet"), ("json", COMPARISON_FILE, "JSON"))
    links = "".join(
        f'<a class="button" id="download-{key}" href="{esc(file_url(shown.entry.folder / file))}" '
        f'download="{esc(shown.entry.id)}-{file}">Download {title}</a>'
        for key, file, title in files
    )
    return f'<p class="links">{links}</p>'


def charts(shown: Shown | None) -> str:
    """Four small charts of the pictures that were drawn."""
    drawn = [result for result in shown.results if result.image] if shown else []
    if not drawn:
        return ""
    return (
        '<section class="card charts" aria-label="Time and memory">'
        f"{_bars('Time a step', [(r, r.seconds_per_step, duration(r.seconds_per_step)) for r in drawn])}"
        f"{_phases(drawn)}"
        f"{_bars('Peak memory', [(r, r.peak_memory_bytes, size(r.peak_memory_bytes)) for r in drawn])}"
        f"{_bars('Weights in memory', [(r, r.weight_bytes, size(r.weight_bytes)) for r in drawn])}</section>"
    )


def _bars(title: str, rows: list[tuple[Result, float | None, str]]) -> str:
    longest = max((value or 0 for _, value, _ in rows), default=0) or 1
    inside = "".join(
        f"{_name(result)}"
        f'<td><div class="track"><span class="fill{" base" if result.recipe == REFERENCE else ""}" '
        f'style="width:{100 * (value or 0) / longest:.1f}%"></span></div></td><td class="number">{esc(text)}</td></tr>'
        for result, value, text in rows
    )
    return f'<table class="bars"><caption>{esc(title)}</caption><tbody>{inside}</tbody></table>'


def _phases(drawn: list[Result]) -> str:
    """Total time, each bar cut into its phases."""
    longest = max(result.seconds.total for result in drawn) or 1
    inside = ""
    for result in drawn:
        parts = "".join(
            f'<span class="fill {key}" style="width:{100 * getattr(result.seconds, key) / longest:.1f}%" '
            f'title="{label}: {duration(getattr(result.seconds, key))}"></span>'
            for key, label in CHARTED_PHASES
        )
        total = duration(result.seconds.total)
        inside += f'{_name(result)}<td><div class="track">{parts}</div></td><td class="number">{esc(total)}</td></tr>'
    legend = "".join(f'<span><i class="fill {key}"></i>{label}</span>' for key, label in CHARTED_PHASES)
    return (
        '<table class="bars"><caption>Total time '
        f'<span class="legend">{legend}</span></caption><tbody>{inside}</tbody></table>'
    )


def _name(result: Result) -> str:
    return f'<tr><th scope="row">{esc(recipe_title(result.recipe))}</th>'


def gallery(entries: tuple[Entry, ...], opened: str | None) -> str:
    """The history, the newest comparison first."""
    if not entries:
        return '<section class="empty"><p>Comparisons are kept here, each in a folder of its own.</p></section>'
    items = "".join(_earlier(entry, entry.id == opened) for entry in entries)
    return f'<section aria-label="Earlier comparisons"><ul class="kept">{items}</ul></section>'


def _earlier(entry: Entry, is_open: bool) -> str:
    request = entry.comparison.request
    images = [result.image for result in entry.comparison.results if result.image][:3]
    thumbs = "".join(f'<img src="{esc(file_url(image))}" alt="" loading="lazy">' for image in images)
    recipes = ", ".join(recipe_title(recipe) for recipe in request.recipes)
    current = ' aria-current="true"' if is_open else ""
    return (
        f'<li><button type="button" data-act="open" data-name="{esc(entry.id)}"{current}>'
        f'<span class="thumbs">{thumbs}</span><strong>{esc(gist(request.caption))}</strong>'
        f'<span class="quiet">{esc(recipes)}</span>'
        f'<span class="quiet">{esc(clock(entry.created))} · {esc(settings(request))}</span></button></li>'
    )
