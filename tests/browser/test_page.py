"""The page in a real browser: what a person can see, press and read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import PATIENCE, Site, stopped_while_held, watched

pytestmark = pytest.mark.slow

expect.set_options(timeout=PATIENCE)
PIXELS = """async (image) => {
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return Array.from(pen.getImageData(0, 0, canvas.width, canvas.height).data);
}"""


def card(tab: Page, title: str) -> Locator:
    return tab.locator("#results article", has=tab.get_by_role("heading", name=title, exact=True))


def hold_at_step(site: Site, step: int) -> None:
    """Let the next picture come so far and no further."""
    site.fake.prepared.add(("miniature", "int8-w8a8-rotated"))  # whose preparation takes steps too
    site.fake.hold(step)


def compare(tab: Page, site: Site, seed: int, wait: bool = True) -> None:
    """Draw the reference and INT8 with the fewest steps."""
    tab.get_by_label("Turbo 12").check()
    tab.get_by_label("Seed").fill(str(seed))
    tab.get_by_role("button", name="Generate").click()
    if wait:
        expect(tab.locator("#results")).to_contain_text(re.compile(rf"seed {seed}\b"))  # 5 is not 500
        expect(tab.locator('#results [data-running="false"]')).to_be_visible()
        expect(tab.locator("#download-json")).to_be_visible()


def last_folder(site: Site) -> Path:
    return site.studio.state.history[0].folder


def test_the_machine_the_plan_and_every_reason_are_shown(tab: Page, site: Site) -> None:
    machine = tab.locator("#machine")
    expect(machine).to_contain_text("Example processor")
    expect(machine.get_by_role("heading", name="INT8 W8A8")).to_be_visible()
    machine.get_by_text("Why?").click()
    plan = site.studio.state.machine.plans["miniature"]  # type: ignore[union-attr]
    for reason in (*plan.reasons, *(row.reason for row in plan.rejected)):
        expect(machine.get_by_text(reason.text)).to_be_visible()


def test_where_the_real_model_cannot_run_the_page_says_what_helps(tab: Page, site: Site) -> None:
    tab.get_by_label("Ideogram 4").check()
    expect(tab.locator("#machine")).to_contain_text("Cannot run here")
    expect(tab.locator("#machine")).to_contain_text("Use the miniature")
    expect(tab.get_by_role("button", name="Generate")).to_be_disabled()
    expect(tab.get_by_label("Width")).to_have_value("1024")


def test_a_comparison_shows_exactly_the_pixels_of_its_files(tab: Page, site: Site) -> None:
    compare(tab, site, 5)
    for title, name in (("Reference", "reference.png"), ("INT8 W8A8 rotated", "int8-w8a8-rotated.png")):
        shown = card(tab, title).get_by_role("img").evaluate(PIXELS)
        with Image.open(last_folder(site) / name) as picture:
            assert bytes(shown) == picture.convert("RGBA").tobytes()
        answer = tab.request.get(card(tab, title).get_by_role("img").evaluate("image => image.src"))
        assert answer.body() == (last_folder(site) / name).read_bytes()
    expect(card(tab, "INT8 W8A8 rotated")).to_contain_text("dB")
    expect(card(tab, "INT8 W8A8 rotated")).to_contain_text("ran as asked")
    expect(tab.locator("#charts table")).to_have_count(4)


def test_the_sheet_and_the_json_are_the_files_on_disk(tab: Page, site: Site) -> None:
    compare(tab, site, 6)
    for button, name in (("#download-sheet", "contact-sheet.png"), ("#download-json", "comparison.json")):
        with tab.expect_download() as caught:
            tab.locator(button).click()
        content = Path(caught.value.path()).read_bytes()
        assert caught.value.suggested_filename.endswith(name)
        assert content == (last_folder(site) / name).read_bytes()
    assert json.loads(content)["request"]["seed"] == 6
    with Image.open(io.BytesIO((last_folder(site) / "contact-sheet.png").read_bytes())) as sheet:
        assert sheet.format == "PNG"


def test_stop_acts_within_one_step(tab: Page, site: Site) -> None:
    hold_at_step(site, 3)
    compare(tab, site, 9, wait=False)
    expect(card(tab, "Reference")).to_contain_text("Step 3 of 12")
    tab.locator("#stop").click()
    stopped_while_held(site)
    expect(tab.locator("#results")).to_contain_text("Stopped.")
    assert len(site.fake.steps_done) <= 4
    assert site.studio.state.job and site.studio.state.job.state == "stopped"
    expect(tab.locator("#stop")).to_be_disabled()


def test_a_reload_and_a_second_tab_find_the_running_job_and_its_results(tab: Page, site: Site) -> None:
    hold_at_step(site, 3)
    compare(tab, site, 11, wait=False)
    expect(card(tab, "Reference")).to_contain_text(re.compile(r"Step \d+ of 12"))
    tab.reload()
    expect(card(tab, "Reference")).to_contain_text(re.compile(r"Step \d+ of 12"))
    expect(tab.get_by_label("Seed")).to_have_value("11")
    second = tab.context.new_page()
    second.goto(site.url)
    expect(second.locator("#job")).to_contain_text("Comparing 2 precisions")
    site.fake.let_pass()
    for page in (tab, second):
        expect(page.locator("#results article img")).to_have_count(2)
        expect(page.locator("#download-sheet")).to_be_visible()
        expect(page.locator("#results")).to_contain_text("seed 11")


def test_preparing_shows_bytes_and_can_be_cancelled_and_taken_up_again(tab: Page, site: Site) -> None:
    site.fake.prepared.discard(("miniature", "gguf-q8_0"))
    site.fake.step_seconds = 0.01
    site.fake.hold(3)
    tab.get_by_role("tab", name="Precisions on disk").click()
    row = tab.locator('#weights tr[data-recipe="gguf-q8_0"]')
    row.get_by_role("button", name="Prepare GGUF Q8_0").click()
    expect(row.get_by_role("progressbar")).to_be_visible()
    expect(row).to_contain_text(re.compile(r"MB of 12\.0 MB · 8\.00 MB/s · .* left"))
    row.get_by_role("button", name="Cancel preparing GGUF Q8_0").click()
    stopped_while_held(site)
    expect(row.get_by_role("button", name="Prepare GGUF Q8_0")).to_be_visible()
    site.fake.step_seconds = 0.0
    row.get_by_role("button", name="Prepare GGUF Q8_0").click()
    expect(row).to_contain_text("ready")
    expect(row.get_by_role("button")).to_have_count(0)


def test_a_preparation_that_fails_says_why(tab: Page, site: Site) -> None:
    site.fake.unpreparable = {"fp8"}
    tab.get_by_role("tab", name="Precisions on disk").click()
    tab.get_by_role("button", name="Prepare FP8").click()
    alert = tab.locator("#weights").get_by_role("alert")
    expect(alert).to_contain_text("The disk is full. Free some of it.")
    site.fake.unpreparable = set()
    alert.get_by_role("button", name="Try again").click()
    expect(tab.locator('#weights tr[data-recipe="fp8"]')).to_contain_text("ready")
    expect(alert).to_have_count(0)


def test_the_divider_moves_by_keyboard_and_names_its_place(tab: Page, site: Site) -> None:
    compare(tab, site, 12)
    divider = tab.get_by_role("slider", name="Divider between the pictures")
    divider.focus()
    tab.keyboard.press("ArrowRight")
    expect(divider).to_have_value("51")
    expect(divider).to_have_attribute("aria-valuetext", "51 % Reference, 49 % INT8 W8A8 rotated")
    tab.keyboard.press("End")
    expect(divider).to_have_value("100")
    assert tab.locator(".stage").evaluate("stage => stage.style.getPropertyValue('--split')") == "100%"
    tab.get_by_label("Zoom").select_option("4")
    assert tab.locator(".stage").evaluate("stage => stage.clientWidth") == 512
    rendering = tab.locator(".stage img.left").evaluate("image => getComputedStyle(image).imageRendering")
    assert rendering == "pixelated"
    tab.get_by_label("Show").select_option("difference")
    blend = tab.locator(".stage img.left").evaluate("image => getComputedStyle(image).mixBlendMode")
    assert blend == "difference"


def test_what_cannot_be_used_becomes_a_note_that_says_what_to_do(tab: Page, site: Site) -> None:
    tab.get_by_label("Prompt").fill('{"compositional_deconstruction": {"elements": []}}')
    tab.get_by_role("button", name="Generate").click()
    expect(tab.get_by_text("The caption breaks the schema").last).to_be_visible()
    tab.get_by_label("Prompt").fill("a <b>red</b> circle ${1} {{2}}")
    tab.get_by_label("Width").fill("130")
    tab.get_by_label("Width").press("Tab")
    tab.get_by_role("button", name="Generate").click()
    expect(tab.get_by_text(re.compile("multiple of 16")).last).to_be_visible()


def test_a_prompt_is_shown_as_text_and_as_the_caption_the_model_reads(tab: Page, site: Site) -> None:
    typed = "a <b>red</b> circle ${1+1} {{2}} `x`"
    tab.get_by_label("Prompt").fill(typed)
    tab.get_by_text("The caption that the model reads").click()
    expect(tab.locator("#caption pre")).to_contain_text(f'"desc":"{typed}"')
    compare(tab, site, 13)
    expect(tab.locator("#results h2")).to_have_text(typed)
    assert tab.locator("#results b").count() == 0


def test_a_recipe_that_fails_says_why_beside_the_others(tab: Page, site: Site) -> None:
    site.fake.broken = {"int8-w8a8-rotated"}
    compare(tab, site, 14)
    expect(card(tab, "INT8 W8A8 rotated")).to_contain_text("The device ran out of memory. Try gguf-q4_k.")
    expect(card(tab, "Reference").get_by_role("img")).to_be_visible()


def test_a_bug_is_named_and_the_page_goes_on(tab: Page, site: Site) -> None:
    site.fake.bug = ZeroDivisionError("by nought")
    compare(tab, site, 15, wait=False)
    expect(tab.locator("#results")).to_contain_text("This is a bug in the program: ZeroDivisionError: by nought")
    site.fake.bug = None
    compare(tab, site, 16)


def test_an_earlier_comparison_opens_again_with_its_settings(tab: Page, site: Site) -> None:
    compare(tab, site, 17)
    compare(tab, site, 18)
    tab.get_by_role("tab", name="History").click()
    tab.locator("#gallery button", has_text="seed 17").click()
    expect(tab.locator("#results")).to_contain_text("seed 17")
    expect(tab.get_by_label("Seed")).to_have_value("17")
    expect(tab.locator("#results article img")).to_have_count(2)


@pytest.fixture
def phone(browser: Browser, site: Site) -> Iterator[Page]:
    yield from watched(browser, f"{site.url}?__theme=dark", (390, 844))


def test_a_phone_in_the_dark_shows_everything_without_scrolling_sideways(phone: Page, site: Site) -> None:
    compare(phone, site, 19)
    phone.get_by_label("Ideogram 4").check()  # whose precisions have more to show
    for name in ("Compare", "Precisions on disk", "History"):
        phone.get_by_role("tab", name=name, exact=True).click()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        overflowing = phone.evaluate(
            "[...document.querySelectorAll('#results *, .asking *, #machine *, #weights *')]"
            ".filter(e => e.getBoundingClientRect().right > 391).map(e => e.className)"
        )
        assert overflowing == []
    red, green, blue = (int(part) for part in re.findall(r"\d+", background(phone))[:3])
    assert max(red, green, blue) < 60


def background(page: Page) -> str:
    return str(
        page.evaluate(
            "getComputedStyle(document.querySelector('#results').closest('.gradio-container')).backgroundColor"
        )
    )


def test_every_control_has_a_name_and_the_page_a_language(tab: Page, site: Site) -> None:
    compare(tab, site, 20)
    assert tab.evaluate("document.documentElement.lang") == "en"
    nameless = tab.evaluate(
        """() => [...document.querySelectorAll("main button, main input, main textarea, main select, main a")]
          .filter((e) => e.offsetParent && !e.disabled)
          .filter((e) => !(e.getAttribute("aria-label") || e.title || e.innerText.trim() || (e.labels || []).length))
          .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    assert tab.evaluate("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
