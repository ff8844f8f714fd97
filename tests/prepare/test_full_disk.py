"""A disk that is really full, at every moment of a first run: it is said in words, and what is done is kept.

The program looks before it begins, so here it is told that there is room, and the kernel says otherwise on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import DiskError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.hub.download import fetch
from ideogram_app.hub.record import fetched, source_folder
from ideogram_app.prepare.components import prepare_components
from ideogram_app.prepare.transformers import prepare
from ideogram_app.records import Request
from ideogram_app.studio.studio import Studio
from tests.conftest import MINIATURE
from tests.fake_backend import Fake
from tests.replica import SOURCE, TOTAL, holds, serving, write_repository
from tests.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.slow

RECIPE, MEGABYTE = "int8-w8a8-rotated", 2**20


@pytest.fixture
def told_it_is_roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


@pytest.fixture
def disk(tmp_path: Path, told_it_is_roomy: None) -> Iterator[SmallDisk]:
    """Room for 4 MB: less than the download, and less than what is made."""
    with small_disk(tmp_path / "disk", 4 * MEGABYTE) as disk:
        yield disk


def test_a_download_that_fills_the_disk_says_so_and_continues(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, folder = write_repository(tmp_path / "repository"), source_folder(disk.folder, SOURCE)
    with serving(repository, monkeypatch) as hub:
        with pytest.raises(DiskError, match=r"The disk filled up while .* was being fetched\. .* is kept\."):
            list(fetch(SOURCE, folder))
        assert not fetched(SOURCE, folder)
        disk.resize(16 * MEGABYTE)
        kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        hub.served.clear()
        list(fetch(SOURCE, folder))
        assert holds(folder, repository) and kept > 3 * MEGABYTE
        # What was under way when it filled up is all that comes again: a block of the line's, and the record.
        assert sum(hub.served.values()) < TOTAL - kept + MEGABYTE // 4


def test_a_download_for_which_there_is_no_room_at_all_says_so(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.fill()
    with serving(write_repository(tmp_path / "repository"), monkeypatch), pytest.raises(DiskError, match="filled up"):
        list(fetch(SOURCE, source_folder(disk.folder, SOURCE)))


@pytest.mark.parametrize("leave", [0, 60_000, 3 * MEGABYTE], ids=["nothing", "a little", "a part"])
def test_packing_that_fills_the_disk_says_so_and_continues(disk: SmallDisk, leave: int) -> None:
    disk.fill(leave)
    store = Store(disk.folder)
    with pytest.raises(DiskError, match=r"filled up while|no room left") as refused:
        list(prepare(store, "miniature", RECIPE))
    assert "Make room" in str(refused.value)
    assert store.status("miniature", RECIPE).state in ("missing", "partial")
    disk.resize(64 * MEGABYTE)
    messages = [event.message for event in prepare(store, "miniature", RECIPE)]
    assert store.status("miniature", RECIPE).usable
    assert leave < MEGABYTE or any(message.startswith("kept ") for message in messages)
    store.verify("miniature", RECIPE)


def test_keeping_the_text_encoder_fills_the_disk_and_continues(disk: SmallDisk) -> None:
    disk.fill(MEGABYTE)
    store = Store(disk.folder)
    with pytest.raises(DiskError, match="filled up"):
        list(prepare_components(store, "ideogram-4", MINIATURE))
    assert store.components_status("ideogram-4").state == "partial"
    disk.resize(64 * MEGABYTE)
    list(prepare_components(store, "ideogram-4", MINIATURE))
    assert store.components_status("ideogram-4").usable


def test_a_picture_that_finds_no_room_is_no_bug_and_can_be_drawn_again(disk: SmallDisk) -> None:
    studio = Studio(Fake(), disk.folder / "outputs")
    studio.start()
    disk.fill()
    asked = Request("miniature", wrap_plain("a red circle"), preset="turbo-12")
    try:
        failed = studio.wait(studio.submit_compare(asked), 20)
        assert failed.state == "failed" and "The disk filled up" in failed.error and "Make room" in failed.error
        disk.empty()
        assert studio.wait(studio.submit_compare(asked), 20).state == "done"
    finally:
        studio.close()
