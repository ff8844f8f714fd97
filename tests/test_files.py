"""A file is there as a whole or not at all, one process holds a folder at a time, and hashes are those of sha256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from ideogram_app import files
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.errors import CheckpointError, DiskError, RequestError
from ideogram_app.files import (
    HASH_CHUNK,
    bytes_taken,
    cached_hash,
    data_folder,
    delete_folder,
    disk_free,
    full_disk_reported,
    hash_file,
    hash_span,
    identity,
    locked,
    output_folder,
    project_folder,
    replacing,
    size_of,
    write_json,
    write_png,
    write_text,
)

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("text_encoder", "tokenizer")


def running(code: str, *arguments: Path) -> subprocess.Popen[str]:
    """A process of its own that runs some lines, to be killed."""
    lines = f"import sys, time\nfrom pathlib import Path\nfrom ideogram_app.files import *\n{code}"
    command = [sys.executable, "-c", lines, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_the_default_folders_are_in_the_project_unless_the_environment_names_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("IDEOGRAM_APP_DATA", "IDEOGRAM_APP_OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert (project_folder(), data_folder(), output_folder()) == (ROOT, ROOT / "data", ROOT / "outputs")
    monkeypatch.setenv("IDEOGRAM_APP_DATA", str(tmp_path))
    monkeypatch.setenv("IDEOGRAM_APP_OUTPUT_DIR", "~/pictures")
    assert (data_folder(), output_folder()) == (tmp_path, Path.home() / "pictures")


def test_what_is_written_is_what_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "file.json"
    write_text(path, "naïve\n")
    assert path.read_text(encoding="utf-8") == "naïve\n"
    write_json(path, {"b": [1, None], "a": "ü"}, sort_keys=True)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü", "b": [1, None]}
    assert path.read_text(encoding="utf-8").endswith("}\n") and os.listdir(path.parent) == [path.name]


def test_a_picture_is_written_pixel_for_pixel_with_its_text(tmp_path: Path) -> None:
    picture = Image.frombytes("RGB", (5, 3), bytes(range(45)))
    write_png(tmp_path / "picture.png", picture, "made with ü")
    with Image.open(tmp_path / "picture.png") as found:
        assert found.tobytes() == picture.tobytes() and found.format == "PNG"
        assert found.text["ideogram_app"] == "made with ü"  # type: ignore[attr-defined]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "after \udc80")
    with pytest.raises(OSError, match="No space"), replacing(path) as draft:
        draft.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before" and os.listdir(tmp_path) == [path.name]


def test_a_writer_that_is_killed_leaves_what_was_there_and_the_next_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    code = "with replacing(Path(sys.argv[1])) as d: d.write_text('half'); print('half', flush=True); time.sleep(60)"
    with running(code, path) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half\n"
        writer.kill()
    assert path.read_text() == "before"
    write_text(path, "after")
    assert path.read_text() == "after"


def test_a_file_has_reached_the_disk_before_it_takes_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, seen = tmp_path / "file.txt", list[tuple[str, bool]]()
    monkeypatch.setattr(files, "sync", lambda draft: seen.append((draft.read_text(), path.exists())))
    write_text(path, "whole")
    assert seen == [("whole", False)] and path.read_text() == "whole"


def test_behind_a_link_the_file_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "file.txt")
    for text in ("first", "second"):
        write_text(tmp_path / "link.txt", text)
        assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real" / "file.txt").read_text() == text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "through")
    reader.join(60)
    assert got == ["through"] and pipe.is_fifo()


def test_a_folder_is_deleted_with_what_an_earlier_deletion_left(tmp_path: Path) -> None:
    for name in ("folder", "folder.old"):
        write_text(tmp_path / name / "file.txt", name)
    delete_folder(tmp_path / "folder")
    delete_folder(tmp_path / "never there")
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_told_in_words_and_other_failures_pass(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=r"^It filled up\. Got .*B free\. Make room\.$"),
        full_disk_reported("It filled up", tmp_path, "Make room"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), full_disk_reported("It filled up", tmp_path, "Make room"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("size", [0, 1, HASH_CHUNK, HASH_CHUNK + 1])
def test_hashes_are_those_of_sha256(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "file.bin", os.urandom(size)
    path.write_bytes(content)
    assert hash_file(path) == cached_hash(path) == hashlib.sha256(content).hexdigest()
    with path.open("rb") as file:
        for start, stop in ((0, size), (size // 3, size // 2), (size, size), (size // 2, size + 9)):
            assert hash_span(file, start, stop) == hashlib.sha256(content[start:stop]).hexdigest()


def test_a_file_is_hashed_once_until_it_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, hashed = tmp_path / "file.bin", list[Path]()
    monkeypatch.setattr(files, "hash_file", lambda path: hashed.append(path) or path.read_text())
    for text in ("one", "other"):
        path.write_text(text)
        assert cached_hash(path) == cached_hash(path) == text
    assert hashed == [path, path]
    path.unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        cached_hash(path)


def test_a_folder_is_held_by_one_at_a_time_and_let_go_by_a_holder_that_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    with (
        locked(folder, "it is being made"),
        pytest.raises(RequestError, match="made by another process") as refused,
        locked(folder, "it is being made"),
    ):
        pass
    assert refused.value.do == "Wait until that has finished, or stop it"
    code = "with locked(Path(sys.argv[1]), 'it is being made'): print('held', flush=True); time.sleep(60)"
    with running(code, folder) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RequestError), locked(folder, "it is being made"):
            pass
        holder.kill()
    with locked(folder, "it is being made", 60):
        assert not folder.exists()


def test_free_disk_is_known_before_the_folder_exists(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    assert 0 < disk_free(tmp_path / "not" / "yet") <= total


def test_a_file_being_filled_takes_what_was_written(tmp_path: Path) -> None:
    assert bytes_taken(tmp_path / "not yet") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "small.txt").write_bytes(bytes(100))
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.write(bytes(5000))
        file.truncate(2**30)
    assert 5100 <= bytes_taken(tmp_path) < 2**20
    assert (size_of(tmp_path / "sparse.bin"), size_of(tmp_path / "a"), size_of(tmp_path / "none")) == (2**30, -1, -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in (*PARTS, "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_an_encoder_is_another_when_a_file_of_it_changes(folder: Path) -> None:
    seen = {identity(folder, PARTS)}
    assert identity(folder, PARTS) in seen
    (folder / "vae" / "config.json").write_text("{ }", encoding="utf-8")
    assert identity(folder, PARTS) in seen, "the VAE has no part in features"
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"weights")
    assert identity(folder, PARTS) not in seen
    seen.add(identity(folder, PARTS))
    os.utime(folder / "tokenizer" / "config.json", ns=(1, 1))
    assert identity(folder, PARTS) not in seen
    seen.add(identity(folder, PARTS))
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model-Q4_K.gguf")
    assert identity(folder, PARTS) not in seen


def test_encoders_in_two_folders_are_two(folder: Path) -> None:
    assert identity(folder, PARTS) != identity(local_folder("miniature"), PARTS)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_names_of_any_bytes_have_an_identity(folder: Path) -> None:
    before = identity(folder, PARTS)
    (folder / "tokenizer" / os.fsdecode(b"\xff.json")).write_text("{}")
    assert identity(folder, PARTS) != before
