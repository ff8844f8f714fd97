"""Memory in use now: one slim bar for the device and one for RAM, and which weights stay loaded in it.

The bars ask by themselves, every two seconds and only while the tab can be seen; the answer is empty unless a part has
moved by a hundredth of the whole, so that a page nobody looks at, or on which nothing happens, sends nothing.
On a machine without a GPU there is one bar. Left out: curves over time, and further devices.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ideogram_app.machine.memory import MemoryNow
from ideogram_app.studio.state import State
from ideogram_app.studio.studio import Studio
from ideogram_app.text import clock, size
from ideogram_app.ui.words import act, esc

MOVED = 0.01  # of the whole: less than a pixel on a phone, and not worth sending
POLL_MILLISECONDS = 2000
# The page's own clock runs in tabs that nobody sees; this one does not. A bar that was taken off the page stops.
MEMORY_SCRIPT = f"""
const poll = () => {{
  if (!element.isConnected) clearInterval(clock);
  else if (!document.hidden) trigger("tick");
}};
const clock = setInterval(poll, {POLL_MILLISECONDS});
poll();
document.addEventListener("visibilitychange", poll);
"""


def memory_bar(now: MemoryNow, reserve_bytes: int = 0) -> str:
    """The bars; the reserve is the end of the device's that plans leave to other programs."""
    device = _gauge("Device memory", now, "device", reserve_bytes)
    host = _gauge("RAM", now, "host")
    return f'<section class="memory" aria-label="Memory in use now">{device}{host}</section>'


def kept_loaded(state: State) -> str:
    """What stays loaded, until when, and the button that lets it go; apart, so that a moving bar takes no focus."""
    if not state.loaded:
        return ""
    until = f" until {clock(state.unloads_at)} unless it is used before" if state.unloads_at else ""
    button = act("unload", "all", "Unload", "Unload what is kept in memory")
    return f'<p class="kept-loaded"><span class="quiet">{esc(state.loaded)} stays loaded{until}.</span> {button}</p>'


def has_moved(before: MemoryNow, now: MemoryNow) -> bool:
    """Whether somebody would see the difference."""
    if (before.device_total, before.host_total) != (now.device_total, now.host_total):
        return True
    moves = [
        abs((getattr(now, f"{where}_{part}") or 0) - (getattr(before, f"{where}_{part}") or 0)) / (total or 1)
        for where, total in (("device", now.device_total), ("host", now.host_total))
        for part in ("free", "ours")
    ]
    return max(moves) > MOVED


def wire_memory(studio: Studio, pane: gr.HTML, **quiet: Any) -> None:
    """Keep the pane up to date. `quiet` are the options of an event that nobody should see."""
    shown = gr.State(None)  # the numbers that this tab has

    def poll(last: MemoryNow | None) -> tuple[Any, Any]:
        now = studio.memory()
        if last and not has_moved(last, now):
            return gr.skip(), gr.skip()
        return memory_bar(now, studio.reserve_bytes), now

    pane.tick(poll, shown, [pane, shown], **quiet)


def _gauge(name: str, now: MemoryNow, where: str, reserve: int = 0) -> str:
    """One bar: ours, the others', what is free and, at its end, what is left to others."""
    total, ours, others, free = (getattr(now, f"{where}_{part}") for part in ("total", "ours", "others", "free"))
    if not total or free is None or others is None:
        return ""
    ours = ours or 0
    reserved = f"{size(reserve)} reserved" if reserve else ""
    rest = f"{size(free)} of {size(total)} free"
    spoken = ", ".join(filter(None, (f"{size(ours)} this program", f"{size(others)} others", rest, reserved)))
    mark = f'<i class="reserve" style="width:{_percent(reserve, total)}"></i>' if reserve else ""
    return (
        f'<div class="gauge"><p><strong>{name}</strong> <span class="quiet words">'
        f'<i class="key ours"></i>{size(ours)} this program <i class="key others"></i>{size(others)} others '
        f"· {' · '.join(filter(None, (rest, reserved)))}</span></p>"
        f'<div class="track" role="meter" aria-label="{name} in use" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{total - free}" aria-valuetext="{esc(spoken)}">'
        f'<span class="fill" style="width:{_percent(ours, total)}"></span>'
        f'<span class="fill base" style="width:{_percent(others, total)}"></span>{mark}</div></div>'
    )


def _percent(part: int, total: int) -> str:
    return f"{min(100.0, 100 * part / total):.1f}%"
