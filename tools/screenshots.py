"""Photograph the page: wide and narrow, light and dark, with real pictures of the miniature.

    python tools/screenshots.py [--prompt TEXT] [--seed N] [--to assets/screenshots]

It starts a page of its own on a free port, with folders of its own, draws one comparison and drives the system's
Chromium. Left out: other browsers, and any comparison with earlier screenshots; a person looks at them.
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.recipes import RECIPES  # noqa: E402
from ideogram_app.studio.local_backend import LocalBackend  # noqa: E402
from ideogram_app.studio.studio import Studio  # noqa: E402
from ideogram_app.ui.form import request_of  # noqa: E402
from ideogram_app.ui.page import build  # noqa: E402
from ideogram_app.ui.style import launch_options  # noqa: E402
from tools.chromium import find_chromium  # noqa: E402

LARGEST = 400_000  # bytes of one screenshot
PROMPT = (
    "a large red circle at the center and a small blue triangle at the top left and the word MOON in black letters "
    "on a white background"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WIDE, NARROW = (1440, 900), (390, 844)
CALM = "* { animation: none !important; transition: none !important; caret-color: transparent !important }"


def main() -> None:
    """Draw, photograph, and say what was written."""
    parser = argparse.ArgumentParser(description="Photograph the page.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--to", type=Path, default=ROOT / "assets" / "screenshots")
    flags = parser.parse_args()
    flags.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photograph(Path(folder), flags.prompt, flags.seed, flags.to)


def photograph(folder: Path, prompt: str, seed: int, to: Path) -> None:
    """One comparison of every recipe, then every picture of the page."""
    studio = Studio(LocalBackend(folder / "data"), folder / "outputs")
    page, port = build(studio), free_port()
    options = launch_options(studio.output, folder / "data")
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, **options)
    studio.start()
    request = request_of(
        "miniature", prompt, "default-20", 128, 128, seed, [name for name, recipe in RECIPES.items() if recipe.everyday]
    )
    warm_up = replace(request, preset="turbo-12")  # pays for imports and for preparing
    for job in [studio.wait(studio.submit_compare(each)) for each in (warm_up, request)]:
        print(f"compared with {job.request.preset if job.request else ''}: {job.state} {job.error}", flush=True)
    if job.state != "done":
        raise SystemExit(f"The comparison failed: {job.error}")
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        url = f"http://127.0.0.1:{port}"
        for theme in ("light", "dark"):
            wide(browser, f"{url}?__theme={theme}", to, theme)
            narrow(browser, f"{url}?__theme={theme}", to, theme)
        browser.close()
    studio.close()
    page.close(verbose=False)


def wide(browser: Browser, url: str, to: Path, theme: str) -> None:
    """The comparison, its divider and charts, the plan's reasons and the precisions on disk."""
    tab = opened(browser, url, WIDE)
    shoot(tab, to / f"compare-{theme}.png")
    tab.locator("#slider").scroll_into_view_if_needed()
    tab.evaluate("document.querySelector('#download-sheet').scrollIntoView()")
    shoot(tab, to / f"divider-{theme}.png")
    tab.evaluate("scrollTo(0, 0)")
    tab.get_by_text("Why?").click()
    tab.get_by_role("tab", name="Precisions on disk").click()
    shoot(tab, to / f"plan-{theme}.png")
    tab.context.close()


def narrow(browser: Browser, url: str, to: Path, theme: str) -> None:
    """What a phone shows of the comparison."""
    tab = opened(browser, url, NARROW)
    tab.evaluate("document.querySelector('#results').scrollIntoView()")
    shoot(tab, to / f"phone-{theme}.png")
    tab.context.close()


def opened(browser: Browser, url: str, size: tuple[int, int]) -> Page:
    """A tab in which everything has arrived."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
    tab = context.new_page()
    tab.goto(url)
    tab.locator("#download-sheet").wait_for()
    tab.add_style_tag(content=CALM)
    tab.wait_for_function("[...document.images].every(image => image.complete)")
    tab.wait_for_timeout(700)  # the form is filled after the page has loaded
    return tab


def shoot(tab: Page, path: Path) -> None:
    """Save what the window shows; too large a file is an error, because it goes into the repository."""
    tab.wait_for_timeout(300)
    with Image.open(io.BytesIO(tab.screenshot())) as picture:
        picture.convert("RGB").save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.name}: {size / 1000:.0f} kB", flush=True)
    if size > LARGEST:
        raise SystemExit(f"{path.name} is larger than {LARGEST / 1000:.0f} kB")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
