"""First use of the published weights: what the page says at every gate, while bytes come, and when the line drops.

The Hub is a replica on this machine, the client is the real huggingface_hub, the download is the program's own. Only
the machine is made up, so that the disk has room wherever this runs. The offer to delete is tested on the fake backend.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from playwright.sync_api import Browser, Locator, Page, expect

from ideogram_app.catalog.sources import find_source
from ideogram_app.hub import download as fetching
from ideogram_app.hub import resume as transferring
from ideogram_app.hub.access import TOKENS_PAGE
from ideogram_app.hub.record import fetched, source_folder
from ideogram_app.machine.hardware import Hardware
from ideogram_app.studio.local_backend import LocalBackend
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.page import build
from ideogram_app.ui.style import launch_options
from tests.browser.conftest import PATIENCE, Site, watched
from tests.fake_backend import MACHINE, SOURCE_BYTES
from tests.replica import TOKEN, TOTAL, holds, turn_to, write_repository
from tests.serving import LOCAL, free_port
from tests.waiting import LIMIT
from tools.hub import BLOCK, Hub

pytestmark = pytest.mark.slow

expect.set_options(timeout=PATIENCE)
SOURCE = find_source("ideogram-4")
ROOMY = 10**12  # bytes free on the made-up machine's disk


@dataclass(frozen=True)
class First:
    """A page whose Hub is a replica, and where its user's token and its weights lie."""

    url: str
    hub: Hub
    token: Path
    data: Path


class Roomy(LocalBackend):
    """On a made-up machine."""

    def detect(self) -> Hardware:
        return replace(MACHINE, disk_free_bytes=ROOMY)


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[First]:
    token = tmp_path / "token"
    for module in (transferring, fetching):
        monkeypatch.setattr(module, "WAITS", (0.01,) * 6)
    usage = shutil.disk_usage(tmp_path)._replace(free=ROOMY)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with Hub(write_repository(tmp_path / "repository"), SOURCE.repository).running() as hub:
        turn_to(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token))
        studio, port = Studio(Roomy(tmp_path / "data"), tmp_path / "outputs"), free_port()
        page = build(studio)
        options = launch_options(studio.output, tmp_path / "data")
        page.launch(server_name=LOCAL, server_port=port, prevent_thread_lock=True, **options)
        studio.start()
        yield First(f"http://{LOCAL}:{port}", hub, token, tmp_path / "data")
        studio.close()
        page.close(verbose=False)
        huggingface_hub.close_session()


@pytest.fixture
def tab(browser: Browser, first: First) -> Iterator[Page]:
    yield from watched(browser, first.url, (1440, 900))


def at_the_weights(tab: Page) -> Locator:
    """The card of the published weights."""
    tab.get_by_label("Ideogram 4").check()
    tab.get_by_role("tab", name="Precisions on disk").click()
    card = tab.get_by_role("region", name="The published weights")
    expect(card).to_be_visible()
    return card


def expect_gate(card: Locator, words: str, act: str, url: str) -> None:
    """The gate in plain words, with the page on which to act."""
    gate = card.locator('[data-stage="licence"].blocked')
    expect(gate).to_contain_text(words)
    expect(gate.get_by_role("link", name=act)).to_have_attribute("href", url)
    expect(card.get_by_role("button", name=re.compile("Fetch"))).to_have_count(0)


def test_every_gate_says_what_to_do_and_the_last_one_opens(tab: Page, first: First) -> None:
    first.hub.faults.gate = "licence"
    assert first.hub.requests == []  # nobody has looked at the published weights yet
    card = at_the_weights(tab)
    for said in ("27.5 GB", "INT8 W8A8", "1000.0 GB", SOURCE.licence, "non-commercial"):
        expect(card).to_contain_text(said)
    expect(card.get_by_role("link", name=SOURCE.url)).to_have_attribute("href", SOURCE.url)

    expect_gate(card, "hf auth login", "Make a token", TOKENS_PAGE)
    assert tab.locator("input[type=password]").count() == 0 and tab.get_by_label("token").count() == 0
    first.token.write_text(TOKEN, encoding="utf-8")  # what `hf auth login` does
    again = card.get_by_role("button", name="Check again")
    again.click()
    expect_gate(card, "not yet accepted", "Read and accept the licence", SOURCE.url)
    first.hub.faults.gate = "scope"
    again.click()
    expect_gate(card, "not allowed to read gated repositories", "Edit the token", TOKENS_PAGE)

    first.hub.faults.gate, first.hub.faults.rate = "none", 200_000.0  # seconds enough to see it come and to stop it
    again.click()
    expect(card.locator('[data-stage="licence"].done')).to_contain_text("Your account may fetch it.")
    card.get_by_role("button", name="Fetch it and make").click()
    expect(card.get_by_role("progressbar")).to_be_visible()
    expect(card).to_contain_text(re.compile(r"Fetching .* of 5\.04 MB · .*/s · .* left"))
    expect(card).to_contain_text(re.compile(r"diffusion_pytorch_model\.safetensors: .* of .* MB, file \d of 6"))
    assert TOKEN not in tab.content() and first.hub.strangers == []
    card.get_by_role("button", name="Stop").click()
    expect(card.get_by_role("button", name="Continue")).to_be_visible()


def test_a_dropped_line_says_so_and_continue_takes_up_where_it_stopped(tab: Page, first: First) -> None:
    faults = first.hub.faults
    faults.rate = 300_000.0
    card = at_the_weights(tab)
    card.get_by_role("button", name="Fetch it and make").click()
    expect(card).to_contain_text(re.compile(r"Fetching [12]\.\d+ MB of"))
    faults.errors, faults.cut_every = 10**6, 1  # from now on every connection ends, and no new one is answered
    expect(tab.locator("#weights")).to_contain_text("Hugging Face answers with an error of its own")
    expect(card.get_by_role("button", name="Continue")).to_be_visible()

    faults.errors = faults.cut_every = 0
    faults.rate = 0.0
    card.get_by_role("button", name="Continue").click()
    expect(card.locator("h2 .chip")).to_have_text("on this disk")
    folder = source_folder(first.data, SOURCE)
    there = fetched(SOURCE, folder)
    assert there and there.commit == first.hub.commit and holds(folder, first.hub.folder)
    assert sum(first.hub.served.values()) <= TOTAL + 4 * BLOCK  # what was under way when the line broke, no more
    # These files are random bytes. The second half of the job finds that out, and says which file it is.
    expect(tab.get_by_role("alert")).to_contain_text("diffusion_pytorch_model.safetensors")


@pytest.fixture
def fake_tab(browser: Browser, site: Site) -> Iterator[Page]:
    yield from watched(browser, site.url, (1440, 900))
    site.fake.prepared -= {row for row in site.fake.prepared if row[0] == SOURCE.model}


def test_after_preparing_the_download_can_be_deleted_and_the_precision_stays(fake_tab: Page, site: Site) -> None:
    card = at_the_weights(fake_tab)
    card.get_by_role("button", name="Fetch it and make INT8 W8A8").click()
    expect(card).to_contain_text("Delete the 27.5 GB download? INT8 W8A8 rotated stays usable")
    fake_tab.get_by_role("button", name="Prepare GGUF Q4_K").click()
    expect(card).to_contain_text("INT8 W8A8 rotated and GGUF Q4_K stay usable; other precisions would need it again.")
    assert site.fake.fetched_bytes == SOURCE_BYTES
    sure = card.get_by_role("button", name="Delete the download of 27.5 GB")
    expect(sure).to_be_hidden()  # one press is not enough
    card.get_by_text("Delete the download …").click()
    sure.click()
    expect(card.locator("h2 .chip")).to_have_text("not on this disk")
    assert site.fake.fetched_bytes == 0
    expect(fake_tab.locator('#weights tr[data-recipe="gguf-q4_k"]')).to_contain_text("ready")


def test_where_the_disk_is_too_small_nothing_can_be_begun(fake_tab: Page, site: Site) -> None:
    site.fake.machine = replace(MACHINE, disk_free_bytes=30_000_000_000)
    site.studio.wait(site.studio.submit_prepare("miniature", ("reference",)), LIMIT)  # it looks at the disk again
    card = at_the_weights(fake_tab)
    expect(card.get_by_role("alert")).to_contain_text("30.0 GB are free")
    expect(fake_tab.locator("#weights").get_by_role("button", name=re.compile("Fetch"))).to_have_count(0)
