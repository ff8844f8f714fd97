"""The Hub on this machine, judged by the real client: what it lists, serves and refuses is what the Hub would."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.replica import turn_to
from tests.serving import wait_until_it_answers
from tools.hub import Hub

ROOT = Path(__file__).resolve().parents[2]
NAME = "somebody/something"
FILES = {"config.json": b"{}", "a/model.safetensors": bytes(range(256)) * 2000, "a/text.txt": b"words"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    with Hub(folder, NAME).running() as hub:
        turn_to(hub.endpoint, monkeypatch)
        yield hub
        huggingface_hub.close_session()


def test_the_client_fetches_everything_and_never_shows_its_token_to_the_storage(hub: Hub, tmp_path: Path) -> None:
    there = Path(snapshot_download(NAME, local_dir=tmp_path / "there", token="hf_x"))
    assert {path: (there / path).read_bytes() for path in FILES} == FILES and hub.strangers == []


def test_the_listing_has_sizes_and_the_hashes_of_git_and_of_large_files(hub: Hub) -> None:
    info = HfApi().model_info(NAME, files_metadata=True, token=False)
    rows = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    assert {path: row.size for path, row in rows.items()} == {path: len(data) for path, data in FILES.items()}
    large = rows["a/model.safetensors"].lfs
    assert large and large.sha256 == hashlib.sha256(FILES["a/model.safetensors"]).hexdigest()
    # what `printf 'words' | git hash-object --stdin` prints
    assert rows["a/text.txt"].blob_id == "f917a2c299cecfd1baa88af5f6e311ee56e529a8" and rows["a/text.txt"].lfs is None
    assert {entry.path for entry in HfApi().list_repo_tree(NAME, recursive=True, token=False)} == set(FILES)
    assert info.sha == hub.commit


def test_headers_of_a_file_are_those_the_client_reads(hub: Hub) -> None:
    large = get_hf_file_metadata(hf_hub_url(NAME, "a/model.safetensors"), token=False)
    assert large.etag == hashlib.sha256(FILES["a/model.safetensors"]).hexdigest()
    assert large.size == len(FILES["a/model.safetensors"]) and large.commit_hash == hub.commit
    assert large.location.startswith("http://localhost:")
    small = get_hf_file_metadata(hf_hub_url(NAME, "config.json"), token=False)
    assert (small.size, small.etag) == (2, hub.files["config.json"]["blobId"])


REFUSED = [
    ("token", False, GatedRepoError, 401, "Please log in"),
    ("licence", False, GatedRepoError, 401, "Please log in"),
    ("licence", "hf_x", GatedRepoError, 403, "not in the authorized list"),
    ("review", "hf_x", GatedRepoError, 403, "awaiting a review"),
    ("scope", "hf_x", HfHubHTTPError, 403, "fine-grained token settings"),
    ("revoked", "hf_x", HfHubHTTPError, 401, "Invalid credentials"),
    ("missing", "hf_x", RepositoryNotFoundError, 404, "Not Found"),
    ("missing", False, RepositoryNotFoundError, 401, "Not Found"),
]


@pytest.mark.parametrize(("gate", "token", "kind", "status", "words"), REFUSED)
def test_the_client_takes_every_refusal_for_what_it_is(
    hub: Hub, gate: str, token: str | bool, kind: type[HfHubHTTPError], status: int, words: str
) -> None:
    hub.faults.gate = gate
    for ask in (
        lambda: get_hf_file_metadata(hf_hub_url(NAME, "config.json"), token=token),
        lambda: HfApi().auth_check(NAME, token=token),
    ):
        with pytest.raises(HfHubHTTPError, match=words) as refused:
            ask()
        assert type(refused.value) is kind and refused.value.response.status_code == status


def test_what_is_not_there_is_said_to_be_missing(hub: Hub) -> None:
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(NAME, revision="0" * 40, token=False)
    with pytest.raises(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(NAME, "nothing.json"), token=False)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("nobody/nothing", token=False)


def test_who_am_i_tells_whether_the_token_may_read_gated_repositories(hub: Hub) -> None:
    for gate, may in (("scope", False), ("licence", True)):
        hub.faults.gate = gate
        token = HfApi().whoami(token="hf_x")["auth"]["accessToken"]
        assert token["fineGrained"]["canReadGatedRepos"] is may
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.faults.gate = "revoked"
        HfApi().whoami(token="hf_y")


def test_the_command_prints_where_it_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    command = [sys.executable, "tools/hub.py", str(tmp_path), "--repo", NAME, "--errors", "0", "--gate", "none"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and "1 files" in next(process.stdout)
            endpoint = next(process.stdout).strip()
            wait_until_it_answers(f"{endpoint}/api/models/{NAME}", process)
            wait_until_it_answers(f"{endpoint}/{NAME}/resolve/main/config.json", process)
        finally:
            process.terminate()
