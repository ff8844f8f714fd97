"""Memory in a real browser: what is offered when it runs out, what was given up, and the bars of what is in use."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from ideogram_app.machine.memory import MemoryNow
from tests.browser.conftest import PATIENCE, Site, watched
from tests.fake_backend import LIMIT

pytestmark = pytest.mark.slow

expect.set_options(timeout=PATIENCE)
GB = 10**9
SEEDS = itertools.count(500)
HUNGRY = "int8-w8a8-rotated"
CARD = MemoryNow(24 * GB, 13 * GB, 10 * GB, 32 * GB, 20 * GB, 6 * GB)


def card(tab: Page, title: str) -> Locator:
    return tab.locator("#results article", has=tab.get_by_role("heading", name=title, exact=True))


def draw(tab: Page, seed: int, prompt: str = "a red circle", adapt: bool = False) -> None:
    tab.get_by_label("Prompt").first.fill(prompt)
    tab.get_by_label("Turbo 12").check()
    for name in ("Width", "Height"):  # the form begins with the last comparison's
        tab.get_by_label(name).fill("128")
    for recipe, wanted in (("Reference", True), ("INT8 W8A8 rotated", True), ("GGUF Q4_K", False)):
        tab.get_by_role("checkbox", name=recipe, exact=True).set_checked(wanted)
    tab.get_by_label("When memory runs out, go on with less").set_checked(adapt)
    tab.get_by_label("Seed").fill(str(seed))
    tab.get_by_role("button", name="Generate").click()
    expect(tab.locator("#results")).to_contain_text(f"seed {seed}")
    expect(tab.locator('#results [data-running="false"]')).to_be_visible()


@pytest.fixture
def seed() -> int:
    """One of its own for each test: all look at one studio, and its last comparison."""
    return next(SEEDS)


@pytest.fixture
def ran_out(tab: Page, site: Site, seed: int) -> Page:
    """A tab on which INT8 ran out of memory."""
    site.fake.hungry = {HUNGRY}
    draw(tab, seed, "a <b>green</b> square")
    return tab


def test_running_out_of_memory_says_what_happened_and_offers_ways_to_go_on(ran_out: Page) -> None:
    failed = card(ran_out, "INT8 W8A8 rotated")
    expect(failed).to_contain_text(
        "The device ran out of memory while drawing (2.3 GB more were asked for, 1.1 GB were"
    )
    expect(failed).to_contain_text("Prompt and seed are kept.")
    ways = failed.get_by_role("list", name="Ways to draw INT8 W8A8 rotated with less memory")
    expect(ways.get_by_role("listitem")).to_have_count(3)
    expect(ways.get_by_role("listitem").first).to_contain_text("same picture")
    expect(ways.get_by_text("same picture", exact=True)).to_have_count(1)
    expect(card(ran_out, "Reference").get_by_role("img")).to_be_visible()


def test_an_offer_draws_the_same_prompt_and_seed_with_less(ran_out: Page, site: Site, seed: int) -> None:
    failed = card(ran_out, "INT8 W8A8 rotated")
    failed.get_by_role("button", name="Draw INT8 W8A8 rotated again: Stream 5.3 GB from RAM, the same picture").click()
    expect(card(ran_out, "INT8 W8A8 rotated").get_by_role("img")).to_be_visible()
    expect(ran_out.locator("#results")).to_contain_text(f"seed {seed}")
    expect(ran_out.locator("#results h2")).to_have_text("a <b>green</b> square")
    expect(ran_out.get_by_label("Seed")).to_have_value(str(seed))
    expect(ran_out.get_by_label("Prompt").first).to_have_value("a <b>green</b> square")
    job = site.studio.state.job
    assert job and job.request and job.request.device_limit_bytes == LIMIT and job.request.seed == seed


def test_an_offer_of_the_smallest_recipe_is_taken_by_keyboard_and_names_what_ran(ran_out: Page, site: Site) -> None:
    button = ran_out.get_by_role("button", name="Draw INT8 W8A8 rotated again: GGUF Q4_K, resident")
    button.focus()
    ran_out.keyboard.press("Enter")
    expect(card(ran_out, "GGUF Q4_K")).to_contain_text("ran as asked")
    expect(ran_out.locator("#results article")).to_have_count(2)
    job = site.studio.state.job
    assert job and job.request and job.request.recipes == ("reference", "gguf-q4_k")


def test_a_smaller_picture_is_drawn_at_its_size(ran_out: Page, seed: int) -> None:
    ran_out.get_by_role("button", name="Draw INT8 W8A8 rotated again: 64 × 64").click()
    expect(ran_out.locator("#results")).to_contain_text(f"64 × 64 · turbo-12 · seed {seed}")
    expect(card(ran_out, "INT8 W8A8 rotated").get_by_role("img")).to_have_attribute("width", "64")


def test_an_offer_of_an_opened_comparison_still_stands(ran_out: Page, seed: int) -> None:
    draw(ran_out, next(SEEDS), "something else")
    ran_out.get_by_role("tab", name="History").click()
    ran_out.locator("#gallery button", has_text=f"seed {seed}").click()
    ran_out.get_by_role("button", name="Draw INT8 W8A8 rotated again: 64 × 64").click()
    expect(ran_out.locator("#results")).to_contain_text(f"64 × 64 · turbo-12 · seed {seed}")


def test_who_lets_it_go_on_sees_what_was_asked_for_what_ran_and_why(tab: Page, site: Site) -> None:
    site.fake.hungry = {HUNGRY}
    draw(tab, next(SEEDS), adapt=True)
    drawn = card(tab, "INT8 W8A8 rotated")
    expect(drawn.get_by_role("img")).to_be_visible()
    expect(drawn).to_contain_text("asked: INT8 W8A8 rotated, resident · ran: GGUF Q4_K, streamed from RAM")
    drawn.get_by_text("Why?").click()
    expect(drawn).to_contain_text("Went on with less: stream 5.3 GB from RAM.")
    expect(card(tab, "Reference")).not_to_contain_text("asked:")
    tab.reload()
    expect(tab.get_by_label("When memory runs out, go on with less")).to_be_checked()


def test_expected_memory_stands_beside_the_measured(tab: Page, site: Site) -> None:
    draw(tab, next(SEEDS))
    expect(card(tab, "Reference").locator(".strip")).to_contain_text(re.compile(r"93\.5 MB\s+expected 97\.9 MB"))


def test_a_machine_without_a_gpu_has_one_bar_and_a_card_has_two_that_move(tab: Page, site: Site) -> None:
    bars = tab.locator("#memory").get_by_role("meter")
    expect(bars).to_have_count(1)
    expect(tab.get_by_role("meter", name="RAM in use")).to_have_attribute(
        "aria-valuetext", "2.00 GB this program, 6.00 GB others, 24.0 GB of 32.0 GB free"
    )
    site.fake.in_use = CARD
    expect(bars).to_have_count(2)
    device = tab.get_by_role("meter", name="Device memory in use")
    expect(device).to_have_attribute("aria-valuenow", str(11 * GB))
    expect(tab.locator("#memory")).to_contain_text("13.0 GB of 24.0 GB free")
    site.fake.in_use = replace(CARD, device_free=3 * GB, device_ours=20 * GB)
    expect(device).to_have_attribute("aria-valuenow", str(21 * GB))


def test_bars_are_not_sent_again_while_nothing_moves_nor_asked_for_while_nobody_looks(tab: Page, site: Site) -> None:
    expect(tab.locator("#memory").get_by_role("meter")).to_have_count(1)
    tab.evaluate(
        """() => {
          window.drawn = 0;
          const watch = new MutationObserver(() => { window.drawn += 1; });
          watch.observe(document.querySelector("#memory .html-container"), { childList: true, subtree: true });
        }"""
    )
    tab.wait_for_timeout(4500)
    assert tab.evaluate("window.drawn") == 0
    tab.evaluate("Object.defineProperty(document, 'hidden', { get: () => true, configurable: true })")
    site.fake.in_use = CARD
    tab.wait_for_timeout(4500)
    assert tab.evaluate("window.drawn") == 0, "the tab is not looked at"
    tab.evaluate("Object.defineProperty(document, 'hidden', { get: () => false, configurable: true })")
    expect(tab.locator("#memory").get_by_role("meter")).to_have_count(2)


def test_what_stays_loaded_is_named_and_let_go_by_a_button(tab: Page, site: Site) -> None:
    expect(tab.locator("#loaded")).not_to_contain_text("stays loaded")
    site.fake.title = "INT8 W8A8 rotated"
    draw(tab, next(SEEDS))
    expect(tab.locator("#loaded")).to_contain_text(re.compile(r"INT8 W8A8 rotated stays loaded until .*\d unless"))
    tab.get_by_role("button", name="Unload what is kept in memory").press("Enter")
    expect(tab.locator("#loaded")).not_to_contain_text("stays loaded")
    assert site.fake.title == ""


@pytest.fixture
def phone(browser: Browser, site: Site) -> Iterator[Page]:
    yield from watched(browser, f"{site.url}?__theme=dark", (390, 844))


def test_a_phone_in_the_dark_shows_offers_and_bars_without_scrolling_sideways(phone: Page, site: Site) -> None:
    site.fake.hungry, site.fake.in_use = {HUNGRY}, CARD
    draw(phone, next(SEEDS))
    expect(phone.locator("#memory").get_by_role("meter")).to_have_count(2)
    expect(phone.locator(".offers button")).to_have_count(3)
    overflowing = phone.evaluate(
        "[...document.querySelectorAll('#results *, #memory *')]"
        ".filter(e => e.getBoundingClientRect().right > 391).map(e => e.className)"
    )
    assert overflowing == [] and phone.evaluate("document.documentElement.scrollWidth") <= 390
