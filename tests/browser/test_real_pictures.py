"""The whole program in a real browser: app.py as a process, the shipped miniature, real preparation, real pictures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.comparison.history import Comparison
from ideogram_app.wire import from_plain
from tests.browser.conftest import LONG, watched
from tests.serving import free_port, wait_until_it_answers
from training.miniature.scenes import Scene, Thing
from training.miniature.score import score

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a large red circle at the top left and the word MOON in black letters on a yellow background"
SCENE = Scene("yellow", (Thing("circle", "red", "top left", "large"),), "MOON")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running app.py with folders of its own."""
    folder, port = tmp_path_factory.mktemp("program"), free_port()
    line = [sys.executable, "app.py", "--no-browser", "--port", str(port)]
    folders = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "outputs")]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*line, *folders], cwd=ROOT, env=os.environ, text=True) as process:
        try:
            wait_until_it_answers(address, process)
            yield address
        finally:
            process.terminate()


@pytest.fixture
def tab(browser: Browser, program: str) -> Iterator[Page]:
    yield from watched(browser, program, (1440, 900))


def fetch(tab: Page, path: str | None) -> bytes:
    assert path
    response = tab.request.get(urljoin(tab.url, path))
    assert response.ok
    return response.body()


def test_one_caption_in_five_precisions_from_first_use_to_download(tab: Page) -> None:
    tab.get_by_label("Prompt").first.fill(PROMPT)
    for recipe in RECIPES.values():
        tab.get_by_role("checkbox", name=recipe.title, exact=True).check()
    tab.get_by_label("Turbo 12").check()
    tab.get_by_role("button", name="Generate").click()
    expect(tab.locator("#download-json")).to_be_visible(timeout=LONG)

    comparison = from_plain(Comparison, json.loads(fetch(tab, tab.locator("#download-json").get_attribute("href"))))
    assert [result.recipe for result in comparison.results] == list(RECIPES)
    for result in comparison.results:
        assert result.error is None and result.engaged == result.recipe and result.seconds_per_step
        shown = tab.locator(f'#results article[data-recipe="{result.recipe}"] img')
        picture = fetch(tab, shown.get_attribute("src"))
        with Image.open(io.BytesIO(picture)) as image:
            assert score(SCENE, image).captions == (1, 1), f"{result.recipe} did not draw what was asked for"
    with Image.open(io.BytesIO(fetch(tab, tab.locator("#download-sheet").get_attribute("href")))) as sheet:
        assert sheet.format == "PNG" and "ideogram_app" in sheet.info


def test_stop_ends_a_real_drawing(tab: Page) -> None:
    tab.get_by_label("Prompt").first.fill("a small blue square at the right on a pink background")
    tab.get_by_label("Quality 48").check()
    tab.get_by_label("Width").fill("1024")
    tab.get_by_label("Height").fill("1024")
    tab.get_by_role("button", name="Generate").click()
    expect(tab.locator("#job")).to_contain_text("of 48", timeout=LONG)
    tab.locator("#stop").click()
    expect(tab.locator("#results")).to_contain_text("Stopped.", timeout=LONG)
    expect(tab.locator("#stop")).to_be_disabled()
