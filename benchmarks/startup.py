"""How soon the page answers, beside an empty page of Gradio: `python benchmarks/startup.py`, on a machine at rest.

    answered    from the start of a fresh process until `GET /` gives the page
    described   until `GET /config` gives what the page is made of
    shown       until a fresh tab of a running Chromium shows the page; left out without Chromium and Playwright

Rounds start the two in turn, so that a drift of the machine's speed meets both; a first round fills the caches of the
file system and is not counted. The program starts as it does for a user, with folders of its own and without a history.
Prints a table and one JSON line, writes one JSON file.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402
from tools.chromium import find_chromium  # noqa: E402

LIMIT = 1.5  # times the empty page's time to answer
POLL_SECONDS = 0.005
PATIENCE_SECONDS = 120.0
MOMENTS = ("answered", "described", "shown")
EMPTY = """
import sys, threading
import gradio
with gradio.Blocks() as page:
    pass
page.launch(
    server_name="127.0.0.1", server_port=int(sys.argv[1]), prevent_thread_lock=True, ssr_mode=False, quiet=True
)
threading.Event().wait()
"""
# Name -> its arguments before the number of the port, and what a tab that shows it has.
PAGES = {
    "empty": (["-c", EMPTY], "footer"),
    "app": ([str(ROOT / "app.py"), "--no-browser", "--port"], "button:has-text('Generate')"),
}


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one that is not.")] = 7,
    out: Path = Path("benchmarks/results/startup.json"),
) -> None:
    """Measure and write."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PAGES}
    with a_browser() as browser, tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for name, (command, sign) in PAGES.items():
                seconds = start_once(command, sign, browser, Path(folder))
                if turn:
                    found[name].append(seconds)
    rows = [{"name": name, **summary(runs)} for name, runs in found.items()]
    ratios = {moment: rows[1][moment]["median"] / rows[0][moment]["median"] for moment in rows[0] if moment in MOMENTS}
    report = {
        "hardware": to_plain(detect(ROOT)),
        "versions": {**versions(), "gradio": metadata.version("gradio")},
        "commit": commit(),
        "rounds": rounds,
        "limit": LIMIT,
        "ratios": ratios,
        "rows": rows,
    }
    for row in rows:
        print(f"{row['name']:6s}" + "".join(f"  {moment} {row[moment]['median']:.2f} s" for moment in ratios))
    print("ratio " + "".join(f"  {moment} {ratio:.2f}x" for moment, ratio in ratios.items()))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"ratios": ratios}))


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and spread, (largest - smallest) / median, of the seconds to each moment."""
    made = {}
    for moment in runs[0]:
        values = [run[moment] for run in runs]
        median = statistics.median(values)
        made[moment] = {"median": median, "spread": (max(values) - min(values)) / median}
    return made


def start_once(command: list[str], sign: str, browser: Any, folder: Path) -> dict[str, float]:
    """Seconds from the start of a fresh process to each moment."""
    port = free_port()
    environment = {
        **os.environ,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "IDEOGRAM_APP_DATA": str(folder / "data"),
        "IDEOGRAM_APP_OUTPUT_DIR": str(folder / "outputs"),
        "IDEOGRAM_APP_OFFLINE": "1",
    }
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command, str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            seconds = {}
            for moment, address in (("answered", "/"), ("described", "/config")):
                wait_for(f"http://127.0.0.1:{port}{address}", process)
                seconds[moment] = time.perf_counter() - began
            if browser is not None:
                show(browser, f"http://127.0.0.1:{port}", sign)
                seconds["shown"] = time.perf_counter() - began
            return seconds
        finally:
            process.kill()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Ask until somebody answers."""
    end = time.perf_counter() + PATIENCE_SECONDS
    while time.perf_counter() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=PATIENCE_SECONDS) as answer:
                answer.read()
            return
        except OSError:
            time.sleep(POLL_SECONDS)
    raise SystemExit(f"{address} never answered; the process ended with {process.poll()}")


@contextmanager
def a_browser() -> Iterator[Any]:
    """A running Chromium, or None."""
    path = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if not path:
        yield None
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def show(browser: Any, address: str, sign: str) -> None:
    """Open a fresh tab and wait until it shows the sign."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(sign, state="visible")
    context.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
