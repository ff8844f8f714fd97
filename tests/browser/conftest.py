"""One browser for all tests here, one page on a fake backend for each module; each test gets a fresh tab.

The browser is the system's Chromium. A tab notes every request that leaves this machine and every complaint of the
page's scripts, and each test ends by finding neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlparse

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from playwright.sync_api import Browser, Page, sync_playwright

from ideogram_app.studio.studio import Studio
from ideogram_app.ui.page import build
from ideogram_app.ui.style import launch_options
from tests.fake_backend import Fake
from tests.serving import free_port
from tests.waiting import LIMIT, wait_until
from tools.chromium import find_chromium

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-renderer-backgrounding",
]
# Milliseconds that an assertion waits, and one for which models are loaded and pictures drawn: a machine whose cores
# are all taken by others needs more than a minute to show a first page. What comes earlier waits no longer.
PATIENCE, LONG = 300_000, 600_000


@dataclass(frozen=True)
class Site:
    """The page that is served, and what stands behind it."""

    url: str
    studio: Studio
    fake: Fake


@pytest.fixture(scope="module")  # what one file left on the fake disk must not be there in the next
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    fake = Fake()
    root = tmp_path_factory.mktemp("site")
    studio = Studio(fake, root / "outputs")
    page = build(studio)
    port = free_port()
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        **launch_options(studio.output, root / "data"),
    )
    studio.start(grace=3600)  # the first tab wakes it
    yield Site(f"http://127.0.0.1:{port}", studio, fake)
    studio.close()
    page.close(verbose=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if not path:
        pytest.skip("there is no Chromium on this machine; the environment variable CHROMIUM can name one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def rested(site: Site) -> Iterator[None]:
    """Every test begins and ends with a worker that rests and a fake that does as it should."""
    reset(site)
    yield
    reset(site)


def reset(site: Site) -> None:
    site.fake.let_pass()
    site.studio.stop()
    for job in site.studio.state.waiting:
        site.studio.stop(job.id)
    if site.studio.state.job:
        site.studio.wait(site.studio.state.job.id, LIMIT)
    fresh = Fake()
    for name in vars(fresh):
        if name != "prepared":
            setattr(site.fake, name, getattr(fresh, name))


def stopped_while_held(site: Site) -> None:
    """Stop was pressed while a step is held: let it pass once the worker knows."""
    wait_until(site.studio._work.stop.is_set, what="Stop to reach the worker")
    site.fake.let_pass()


@pytest.fixture
def tab(browser: Browser, site: Site) -> Iterator[Page]:
    """A tab of 1440 x 900 on the page."""
    yield from watched(browser, site.url, (1440, 900))


def watched(browser: Browser, url: str, size: tuple[int, int]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    strangers: list[str] = []
    complaints: list[str] = []
    host = urlparse(url).netloc
    page.on("request", lambda r: strangers.append(r.url) if leaves(r.url, host) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.get_by_text("Plan for Miniature").wait_for()
    yield page
    context.close()
    assert strangers == [] and complaints == []


def leaves(url: str, host: str) -> bool:
    parts = urlparse(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != host
