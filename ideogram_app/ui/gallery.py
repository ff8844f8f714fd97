"""Earlier comparisons as a list of small pictures; one click opens one again.

Left out: search and deletion; each comparison is a folder, and folders can be sorted and deleted as folders.
"""

from __future__ import annotations

from ideogram_app.comparison.history import Entry
from ideogram_app.text import clock
from ideogram_app.ui.words import esc, file_url, gist, recipe_title, settings


def gallery(entries: tuple[Entry, ...], opened: str | None) -> str:
    """Newest first."""
    if not entries:
        return '<section class="empty"><p>Comparisons are kept here, each in a folder of its own.</p></section>'
    items = "".join(_item(entry, entry.id == opened) for entry in entries)
    return f'<section aria-label="Earlier comparisons"><ul class="kept">{items}</ul></section>'


def _item(entry: Entry, is_open: bool) -> str:
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
