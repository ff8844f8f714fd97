"""The guided first run in a real browser: app.py as a process of its own, a Hub on this machine, a real picture.

The process believes that Ideogram 4 has the miniature's shape, so that all of it takes seconds; everything else is the
program's own. The line is cut every megabyte, the disk is really full, and the process is really killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from ideogram_app.catalog.sources import find_source
from ideogram_app.hub.access import TOKENS_PAGE
from ideogram_app.studio.setup_status import STAGE_NAMES
from tests.browser.conftest import LONG, PATIENCE, Site, leaves, stopped_while_held, watched
from tests.conftest import MINIATURE
from tests.fake_backend import MACHINE
from tests.replica import TOKEN
from tests.serving import LOCAL, free_port, wait_until_it_answers
from tests.small_disk import small_disk
from tests.studio.test_setup_stages import CARD as GPU
from tests.waiting import LIMIT
from tools.hub import Hub
from tools.make_replica import make

pytestmark = pytest.mark.slow

expect.set_options(timeout=PATIENCE)
ROOT = Path(__file__).resolve().parents[2]
SOURCE, RECIPE, TITLE = find_source("ideogram-4"), "int8-w8a8-rotated", "INT8 W8A8 rotated"
MEGABYTE = 2**20
# Started in place of app.py: the published model is small, its repository as large as the replica, waits are short,
# and packing takes as long as a person needs to press a button, where the environment says so.
ENTRY = """
import os, sys, time
from dataclasses import replace
sys.path.insert(0, sys.argv.pop(1))
from ideogram_app.catalog import models, sources
from ideogram_app.hub import download, resume
size = int(sys.argv.pop(1))
small = replace(models.MODELS["miniature"], name="ideogram-4", title="Ideogram 4")
models.MODELS["ideogram-4"] = small
sources.SOURCES = tuple(replace(row, size=size) if row.model == "ideogram-4" else row for row in sources.SOURCES)
resume.WAITS = download.WAITS = (0.01,) * 6
if pause := float(os.environ.get("PACKING_PAUSE", 0)):
    from ideogram_app.prepare import run
    event = run.ProgressMeter.event
    run.ProgressMeter.event = lambda *all, **named: (time.sleep(pause), event(*all, **named))[1]
import app
sys.exit(app.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official FP8 repository with the miniature's weights."""
    return make("fp8-fused", tmp_path_factory.mktemp("hub") / "repository", source=MINIATURE)


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with Hub(repository, SOURCE.repository).running() as hub:
        hub.faults.cut_every = 1_000_000
        yield hub


@dataclass
class Program:
    """app.py with folders of its own; `started` runs it until the block ends, or it is killed."""

    folder: Path
    hub: Hub
    data: Path
    size: int = 0
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def token(self) -> Path:
        return self.folder / "hub-home" / "token"

    @contextmanager
    def started(self, **environment: str) -> Iterator[str]:
        """The address of a fresh process."""
        port, entry = free_port(), self.folder / "entry.py"
        entry.write_text(ENTRY, encoding="utf-8")
        self.token.parent.mkdir(exist_ok=True)
        size = sum(path.stat().st_size for path in self.hub.folder.rglob("*") if path.is_file())
        line = [sys.executable, str(entry), str(ROOT), str(size), "--no-browser", "--port", str(port)]
        folders = ["--data-dir", str(self.data), "--output-dir", str(self.folder / "outputs"), "--model", "ideogram-4"]
        secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
        own = {name: value for name, value in os.environ.items() if name not in secrets}
        own |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.token.parent)}
        with subprocess.Popen([*line, *folders], cwd=ROOT, env={**own, **environment}, text=True) as process:
            self.processes.append(process)
            try:
                wait_until_it_answers(f"http://{LOCAL}:{port}", process)
                yield f"http://{LOCAL}:{port}"
            finally:
                process.terminate()

    def kill(self) -> None:
        """As a power cut does: no farewell."""
        self.processes[-1].send_signal(signal.SIGKILL)
        self.processes[-1].wait()


@pytest.fixture
def program(tmp_path: Path, hub: Hub) -> Program:
    return Program(tmp_path, hub, tmp_path / "data")


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Opens a tab on an address; nothing it asks for may leave this machine."""
    contexts, strangers = [], list[str]()

    def opened(url: str) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce"))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("request", lambda request: strangers.append(request.url) if leaves(request.url, url[7:]) else None)
        tab.goto(url)
        expect(tab.locator("#guide [data-stage]")).to_have_count(7, timeout=LONG)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert strangers == []


def at(tab: Page, name: str) -> Locator:
    """The stage to act on, once it is this one; those before it are done."""
    stage = tab.locator("#guide [aria-current=step]")
    expect(stage).to_have_attribute("data-stage", name, timeout=LONG)
    expect(tab.locator("#guide .done")).to_have_count(STAGE_NAMES.index(name))
    return stage


def press(stage: Locator, name: str) -> None:
    stage.get_by_role("button", name=re.compile(name)).click()


@pytest.fixture
def guided(browser: Browser, site: Site) -> Iterator[Page]:
    """The page on its fake backend, on a machine that could draw with the published model, which nobody fetched yet."""
    site.fake.machine = GPU
    site.studio.wait(site.studio.submit_prepare("miniature", ("reference",)), LIMIT)  # it looks at the machine again
    pages = watched(browser, site.url, (390, 844))
    tab = next(pages)
    tab.get_by_label("Ideogram 4").check()
    yield tab
    site.fake.fetched_bytes, site.fake.machine = 0, MACHINE
    site.fake.prepared -= {row for row in site.fake.prepared if row[0] == SOURCE.model}
    site.studio.stop()
    site.studio.wait(site.studio.submit_prepare("miniature", ("reference",)), LIMIT)
    next(pages, None)


def test_on_a_phone_by_keyboard_alone_and_the_focus_stays_while_the_card_changes(guided: Page, site: Site) -> None:
    site.fake.hold(15)
    begin = at(guided, "fetch").get_by_role("button", name="Fetch it and make")
    assert guided.evaluate("document.documentElement.scrollWidth") <= 390
    plan = guided.locator('#guide [data-stage="plan"] details')
    expect(plan).to_have_attribute("open", "")
    machine = guided.locator('#guide [data-stage="machine"] summary')
    machine.focus()
    guided.keyboard.press("Enter")
    expect(guided.locator('#guide [data-stage="machine"] details')).to_have_attribute("open", "")
    begin.focus()
    guided.keyboard.press("Enter")
    stop = at(guided, "fetch").get_by_role("button", name="Stop")
    expect(stop).to_be_focused()
    expect(guided.locator("#guide [role=progressbar]")).to_have_attribute("aria-valuenow", re.compile(r"\d\d"))
    expect(stop).to_be_focused()  # the card was replaced many times since
    expect(guided.locator('#guide [data-stage="machine"] details')).to_have_attribute("open", "")
    guided.keyboard.press("Enter")
    stopped_while_held(site)
    again = at(guided, "fetch").get_by_role("button", name="Continue")
    expect(again).to_be_focused()
    guided.keyboard.press("Enter")
    expect(at(guided, "picture").get_by_role("button", name="Draw the first picture")).to_be_focused()


def expect_first_picture(tab: Page) -> None:
    """Press the last button; a picture comes, and the guide goes."""
    press(at(tab, "picture"), "Draw the first picture")
    picture = tab.locator(f'#results article[data-recipe="{RECIPE}"] img[width]')
    expect(picture).to_be_visible(timeout=LONG)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    expect(tab.locator("#guide .guide")).to_have_count(0)


def test_by_clicks_from_the_machine_to_the_first_picture_over_a_line_that_is_cut(
    program: Program, hub: Hub, open_tab: Callable[[str], Page]
) -> None:
    hub.faults.gate = "licence"
    with program.started() as url:
        tab = open_tab(url)
        gate = at(tab, "licence")
        expect(tab.locator('#guide [data-stage="plan"]')).to_contain_text(re.compile("without the download.*Mbit/s"))
        expect(gate).to_contain_text("hf auth login")
        expect(gate.get_by_role("link", name="Make a token")).to_have_attribute("href", TOKENS_PAGE)
        program.token.write_text(TOKEN, encoding="utf-8")  # what `hf auth login` does
        press(gate, "Check again")
        expect(gate).to_contain_text("not yet accepted")
        expect(gate.get_by_role("link", name="Read and accept")).to_have_attribute("href", SOURCE.url)
        hub.faults.gate, hub.faults.rate = "none", 4_000_000.0
        press(gate, "Check again")

        press(at(tab, "fetch"), f"Fetch it and make {TITLE}")
        fetching = at(tab, "fetch")
        expect(fetching.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile("[1-9]"))
        expect(fetching).to_contain_text(re.compile(r"Fetching .* of .* MB · .*/s · .* left"))
        hub.faults.rate = 200_000.0  # so that it is not over when somebody has left and come back
        tab.close()
        tab = open_tab(url)
        press(at(tab, "fetch"), "Stop")
        expect(at(tab, "fetch")).to_contain_text("Stopped. What is done is kept.")
        hub.faults.rate = 0.0
        press(at(tab, "fetch"), "Continue: .* to go")

        ready = at(tab, "picture")
        expect(ready).to_contain_text("Everything is here")
        expect(tab.locator('#guide [data-stage="smoke"]')).to_contain_text(re.compile(r"Passed: \d+ parts compute"))
        assert TOKEN not in tab.content() and hub.strangers == []
        expect_first_picture(tab)


def test_a_disk_that_is_too_small_is_said_before_and_a_full_one_on_the_way(
    program: Program, hub: Hub, open_tab: Callable[[str], Page], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 24 * MEGABYTE) as disk:
        program.data = disk.folder / "data"
        with program.started() as url:
            tab = open_tab(url)
            plan = at(tab, "plan")
            expect(plan).to_contain_text(re.compile(r"of free disk are needed, .* are lacking\. Make room"))
            assert hub.served.total() == 0

            disk.resize(96 * MEGABYTE)
            hub.faults.rate = 3_000_000.0
            press(plan, "I made room")
            expect(at(tab, "fetch").get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile("[1-9]"))
            disk.fill()
            full = at(tab, "fetch")
            expect(full).to_contain_text(re.compile(r"The disk filled up while .* what has been fetched is kept"))
            expect(full).to_contain_text("Lacking")
            served = hub.served.total()

            disk.empty()
            hub.faults.rate = 0.0
            press(full, "I made room: continue")
            at(tab, "picture")
            replica = sum(path.stat().st_size for path in hub.folder.rglob("*") if path.is_file())
            assert served > 0 and hub.served.total() < replica + 2 * MEGABYTE  # what was kept did not come again
            expect_first_picture(tab)


def test_killed_while_fetching_and_while_packing_a_new_process_goes_on_where_it_stopped(
    program: Program, hub: Hub, open_tab: Callable[[str], Page]
) -> None:
    hub.faults.rate = 6_000_000.0
    with program.started() as url:
        tab = open_tab(url)
        press(at(tab, "fetch"), "Fetch it and make")
        expect(at(tab, "fetch")).to_contain_text(re.compile(r"Fetching \d\d\.\d+ MB of"))
        program.kill()
        tab.close()
    kept = sum(path.stat().st_size for path in program.data.rglob("*") if path.is_file())
    assert kept > 5 * MEGABYTE
    hub.served.clear()

    hub.faults.rate = 0.0
    with program.started(PACKING_PAUSE="0.02") as url:
        tab = open_tab(url)
        press(at(tab, "fetch"), "Continue: .* to go")
        expect(at(tab, "quantize").get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile("[1-9]"))
        replica = sum(path.stat().st_size for path in hub.folder.rglob("*") if path.is_file())
        assert hub.served.total() < replica - kept + 2 * MEGABYTE
        program.kill()
        tab.close()
    hub.served.clear()

    with program.started() as url:
        tab = open_tab(url)
        press(at(tab, "quantize"), f"Continue: make {TITLE}")
        at(tab, "picture")
        assert hub.served.total() == 0
        expect_first_picture(tab)
