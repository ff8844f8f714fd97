"""Fetching with the real huggingface_hub from a Hub on this machine, over lines that break, lie and crawl."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from ideogram_app.catalog.sources import SOURCES
from ideogram_app.errors import AccessError, CheckpointError, DiskError, RequestError
from ideogram_app.hub import download as fetching
from ideogram_app.hub.access import RemoteFile
from ideogram_app.hub.download import fetch
from ideogram_app.hub.record import RECORD, delete_fetched, fetched, source_folder
from ideogram_app.records import Event
from tests.replica import OTHERS, SIZES, SOURCE, TOTAL, WEIGHTS, holds, serving, turn_to, write_repository
from tests.waiting import wait_until
from tools.hub import Hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(repository, monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return source_folder(tmp_path, SOURCE)


def test_a_source_comes_whole_verified_and_without_what_could_run(hub: Hub, folder: Path, repository: Path) -> None:
    events = list(fetch(SOURCE, folder))
    assert holds(folder, repository)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*SIZES, RECORD}
    last = events[-1]
    assert (last.phase, last.done, last.total) == ("fetch", TOTAL, TOTAL) and "tokenization.py" in last.message
    assert {path for path in SIZES if any(event.message.startswith(path) for event in events)} == set(SIZES)
    done = [event.done for event in events]
    assert done == sorted(done)

    there = fetched(SOURCE, folder)
    assert there and there.commit == hub.commit and there.size == TOTAL
    for row in there.files:
        assert row.sha256 == hashlib.sha256((repository / row.path).read_bytes()).hexdigest()
    assert sum(hub.served[path] for path in SIZES) == TOTAL and hub.served["README.md"] == 0


def test_what_is_there_is_not_asked_for_again_and_works_offline(hub: Hub, folder: Path) -> None:
    list(fetch(SOURCE, folder))
    hub.requests.clear()
    (event,) = fetch(SOURCE, folder, offline=True)
    assert event.done == event.total == TOTAL and hub.requests == []
    pinned = replace(SOURCE, revision=hub.commit)
    assert fetched(pinned, folder)
    assert fetched(replace(SOURCE, revision="0" * 40), folder) is None
    assert fetched(replace(SOURCE, patterns=("*",)), folder) is None
    (folder / WEIGHTS).write_bytes(b"short")
    assert fetched(SOURCE, folder) is None


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_line_cut_every_200_kb_costs_no_byte_twice(hub: Hub, folder: Path, repository: Path, reset: bool) -> None:
    hub.faults.cut_every, hub.faults.reset = 200_000, reset
    list(fetch(SOURCE, folder))
    assert holds(folder, repository)
    cuts = sum(size // 200_000 for size in SIZES.values())
    assert len([line for line in hub.requests if line.startswith("GET /storage")]) > cuts // 2
    if not reset:  # a reset destroys what is under way
        assert sum(hub.served.values()) == TOTAL


@pytest.mark.slow
def test_a_killed_download_resumes_where_it_stopped(hub: Hub, folder: Path, repository: Path) -> None:
    hub.faults.rate, hub.faults.silent_after = 2_000_000, SIZES[WEIGHTS] - 100_000  # it cannot come to its end
    script = (
        "import sys; from pathlib import Path; from tests.replica import SOURCE\n"
        "from ideogram_app.hub.download import fetch\n"
        "for event in fetch(SOURCE, Path(sys.argv[1])):\n"
        "    print(event.done, flush=True)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    with process.stdout as lines:
        while int(next(lines)) < 2_600_000:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    hub.faults.silent_after = 0
    wait_until(lambda: not hub.sending, what="the hub to notice")
    before = sum(hub.served.values())
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    assert kept > 2_500_000 and not fetched(SOURCE, folder)

    hub.faults.rate = 0
    hub.served.clear()
    list(fetch(SOURCE, folder))
    assert holds(folder, repository)
    assert before > 2_500_000 and hub.served[OTHERS] == 0
    assert sum(hub.served.values()) == TOTAL - kept


def test_a_slow_line_shows_progress_and_stops_when_nobody_asks(hub: Hub, folder: Path, repository: Path) -> None:
    hub.faults.rate = 1_000_000
    events, seen = fetch(SOURCE, folder), list[Event]()
    for event in events:
        seen.append(event)
        if event.done > 600_000:
            break
    events.close()
    assert len(seen) > 3 and seen[-1].rate
    left = (TOTAL - seen[-1].done) / seen[-1].rate
    assert seen[-1].seconds_left == pytest.approx(left)

    wait_until(lambda: not hub.sending, what="the end of what was under way")
    assert sum(hub.served.values()) < TOTAL, "the download went on in the background"
    hub.faults.rate = 0
    list(fetch(SOURCE, folder))
    assert holds(folder, repository) and sum(hub.served.values()) < TOTAL + 200_000


def test_the_rate_is_bytes_by_seconds_and_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, events = [0.0], list[Event]()
    monkeypatch.setattr(fetching, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = fetching._Meter(events.append)
    meter.total, meter.count = 10_000_000, 1
    meter.begin(RemoteFile("weights", meter.total))
    for _ in range(10):
        now[0] += 0.5
        meter.move(500_000)
    rate = 5_000_000 / 4.5  # the clock runs from the first bytes on
    assert events[-1].rate == pytest.approx(rate) and events[-1].seconds_left == pytest.approx(5_000_000 / rate)


def test_a_silent_line_can_be_stopped_and_is_given_up_in_time(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.silent_after = 100_000
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    events = fetch(SOURCE, folder)
    while len(hub.sending) < 2:  # the first connection is still open when a second one is tried
        next(events)
    events.close()
    assert hub.sending, "stopping waits for no line to speak again"
    hub.faults.silent_after = 0
    list(fetch(SOURCE, folder))
    assert fetched(SOURCE, folder)


def test_two_downloads_into_one_folder_do_not_mix(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LOCK_SECONDS", 0.1)
    hub.faults.rate = 200_000
    first = fetch(SOURCE, folder)
    while next(first).done < 100_000:
        pass
    with pytest.raises(RequestError, match="by another process"):
        list(fetch(SOURCE, folder))
    with pytest.raises(RequestError, match="by another process"):
        delete_fetched(folder)
    first.close()


@pytest.mark.slow
def test_a_line_that_stays_dead_ends_in_words_and_resumes(hub: Hub, folder: Path) -> None:
    hub.faults.cut_every, hub.faults.rate = 1_000_000, 1_000_000  # slow, so that the faults come in time
    events = fetch(SOURCE, folder)
    while next(events).done < 1_000_000:
        pass
    hub.faults.errors = 10**6
    with pytest.raises(AccessError, match="error of its own"):
        list(events)
    hub.faults.errors = hub.faults.rate = 0
    list(fetch(SOURCE, folder))
    assert sum(hub.served.values()) == TOTAL


def test_wrong_bytes_are_noticed_and_fetched_once_more(hub: Hub, folder: Path, repository: Path) -> None:
    hub.faults.altered = {WEIGHTS: 1}
    events = list(fetch(SOURCE, folder))
    assert holds(folder, repository) and hub.served[WEIGHTS] == 2 * SIZES[WEIGHTS]
    assert any("damaged on the way" in event.message for event in events) and events[-1].done == TOTAL


@pytest.mark.parametrize(("path", "kind"), [(WEIGHTS, "sha256"), ("transformer/config.json", "git blob")])
def test_bytes_that_stay_wrong_are_refused_by_name(hub: Hub, folder: Path, path: str, kind: str) -> None:
    hub.faults.altered = {path: 2}
    with pytest.raises(CheckpointError) as refused:
        list(fetch(SOURCE, folder))
    row = hub.files[path]
    expected = row["lfs"]["sha256"] if "lfs" in row else row["blobId"]
    assert path in refused.value.what and refused.value.expected == f"{kind} {expected}"
    assert refused.value.got.startswith(kind) and refused.value.got != refused.value.expected
    assert not (folder / path).exists()


def test_a_file_that_is_shorter_than_announced_is_refused_with_both_sizes(hub: Hub, folder: Path) -> None:
    hub.faults.truncated = {WEIGHTS: 1000}
    with pytest.raises(CheckpointError, match="3,000,000") as refused:
        list(fetch(SOURCE, folder))
    assert "2999000" in refused.value.got


def test_a_server_that_cannot_continue_begins_again_and_the_file_is_right(
    hub: Hub, folder: Path, repository: Path
) -> None:
    events = fetch(SOURCE, folder)
    hub.faults.rate = 4_000_000
    while next(events).done < 700_000:
        pass
    events.close()
    hub.faults.rate, hub.faults.ignores_ranges = 0, True
    list(fetch(SOURCE, folder))
    assert holds(folder, repository)


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder.parents[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=TOTAL * 2))
    with pytest.raises(DiskError, match="for what is made of it") as refused:
        list(fetch(SOURCE, folder, reserve_bytes=TOTAL))
    assert "5.0 MB to fetch" in refused.value.expected and not hub.served
    list(fetch(SOURCE, folder))
    assert fetched(SOURCE, folder)


def test_files_put_there_by_hand_are_taken_and_changed_ones_replaced(hub: Hub, folder: Path, repository: Path) -> None:
    for path in (WEIGHTS, OTHERS):
        (folder / path).parent.mkdir(parents=True)
    shutil.copyfile(repository / WEIGHTS, folder / WEIGHTS)
    (folder / OTHERS).write_bytes(bytes(SIZES[OTHERS]))
    list(fetch(SOURCE, folder))
    assert holds(folder, repository) and hub.served[WEIGHTS] == 0 and hub.served[OTHERS] == SIZES[OTHERS]


def test_deleting_frees_what_it_says_and_only_what_was_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    list(fetch(SOURCE, folder))
    record = (folder / RECORD).stat().st_size
    assert delete_fetched(folder) == TOTAL + record and not folder.exists() and delete_fetched(folder) == 0
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "novel.txt").write_text("chapter one", encoding="utf-8")
    with pytest.raises(RequestError, match="was not fetched by this program"):
        delete_fetched(mine)
    assert (mine / "novel.txt").exists()


def test_a_record_that_cannot_be_read_only_costs_a_look_at_the_files(hub: Hub, folder: Path) -> None:
    list(fetch(SOURCE, folder))
    (folder / RECORD).write_text("{", encoding="utf-8")
    assert fetched(SOURCE, folder) is None
    hub.served.clear()
    list(fetch(SOURCE, folder))
    assert fetched(SOURCE, folder) and not hub.served
    assert json.loads((folder / RECORD).read_text(encoding="utf-8"))["commit"] == hub.commit


def test_a_new_commit_costs_only_what_changed(
    hub: Hub, folder: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(fetch(SOURCE, folder))
    newer = tmp_path / "newer"
    shutil.copytree(repository, newer)
    (newer / OTHERS).write_bytes(b"another" * 1000)
    with Hub(newer, SOURCE.repository).running() as later:
        turn_to(later.endpoint, monkeypatch)
        list(fetch(replace(SOURCE, revision=later.commit), folder))
        there = fetched(replace(SOURCE, revision=later.commit), folder)
    assert there and there.commit == later.commit != hub.commit
    assert set(later.served) == {OTHERS} and (folder / OTHERS).read_bytes() == b"another" * 1000


def test_no_two_sources_share_a_folder(tmp_path: Path) -> None:
    folders = [source_folder(tmp_path, source) for source in SOURCES if source.repository]
    assert len(set(folders)) == len(folders) and source_folder(tmp_path, SOURCE) in folders
