"""Whether weights can be had, asked of a Hub on this machine that turns people away as the real one does."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from ideogram_app.errors import AccessError, AppError
from ideogram_app.hub.access import CASES, SCOPE, STATES, access, is_harmless
from ideogram_app.hub.download import fetch
from ideogram_app.hub.record import delete_fetched, fetched, source_folder
from tests.replica import SOURCE, TOKEN, TOTAL, serving, write_repository
from tools.hub import Hub


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


GATED = [
    ("token", None, "no_token", "no Hugging Face token", "https://huggingface.co/settings/tokens"),
    ("licence", None, "no_token", "no Hugging Face token", "https://huggingface.co/settings/tokens"),
    ("revoked", TOKEN, "no_token", "does not accept the token", "https://huggingface.co/settings/tokens"),
    ("licence", TOKEN, "not_accepted", "not yet accepted the Ideogram Non-Commercial Model Agreement", SOURCE.url),
    ("review", TOKEN, "not_accepted", "owners have not answered yet", SOURCE.url),
    ("rejected", TOKEN, "not_accepted", "turned down", SOURCE.url),
    ("scope", TOKEN, "wrong_scope", SCOPE, "https://huggingface.co/settings/tokens"),
    ("missing", None, "not_found", "has no ideogram-ai/ideogram-4-fp8", SOURCE.url),
    ("missing", TOKEN, "not_found", "has no ideogram-ai/ideogram-4-fp8", SOURCE.url),
]


@pytest.mark.parametrize(("gate", "token", "state", "words", "page"), GATED)
def test_every_refusal_is_a_sentence_and_the_page_on_which_to_act(
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    gate: str,
    token: str | None,
    state: str,
    words: str,
    page: str,
) -> None:
    hub.faults.gate = gate
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    told = access(SOURCE)
    assert (told.state, told.url) == (state, page) and words in told.sentence and page in told.sentence
    with pytest.raises(AccessError) as refused:
        list(fetch(SOURCE, folder))
    assert str(refused.value) == told.sentence and not list(folder.rglob("*.safetensors"))


def test_with_a_token_that_may_the_gate_is_open(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.gate = "token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert access(SOURCE).state == "ready"
    list(fetch(SOURCE, folder))
    assert fetched(SOURCE, folder) and hub.strangers == [], "the token went to the storage host"


def test_a_gate_that_closes_on_the_way_is_told_and_keeps_what_came(hub: Hub, folder: Path) -> None:
    hub.faults.cut_every = 500_000
    events = fetch(SOURCE, folder)
    while next(events).done < 600_000:
        pass
    hub.faults.gate = "token"
    with pytest.raises(AccessError, match="no Hugging Face token"):
        list(events)
    hub.faults.gate = "none"
    list(fetch(SOURCE, folder))
    assert sum(hub.served.values()) == TOTAL


def test_every_state_has_words_and_every_word_a_state() -> None:
    assert {case.state for case in CASES.values()} | {"ready"} == set(STATES)


def test_offline_without_the_files_is_an_access_error(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert access(SOURCE, offline=True).state == "offline"
    with pytest.raises(AccessError, match="works offline"):
        list(fetch(SOURCE, folder, offline=True))
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert access(SOURCE).state == "offline"


def test_a_hub_that_is_gone_or_down_is_told_in_words(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.errors = 10**6
    told = access(SOURCE)
    assert told.state == "unreachable" and "503" in told.sentence
    with pytest.raises(AccessError, match="error of its own"):
        list(fetch(SOURCE, folder))
    hub.faults.errors = 2
    list(fetch(SOURCE, folder))
    assert fetched(SOURCE, folder)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of nobody
    told = access(SOURCE)
    assert told.state == "unreachable" and "cannot be reached" in told.sentence


def test_the_token_is_in_no_event_no_log_no_error_and_no_file(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said: list[str] = []
    for gate in ("token", "licence", "scope", "revoked"):
        hub.faults.gate = gate
        try:
            said += [repr(event) for event in fetch(SOURCE, folder)]
        except AppError as problem:
            said += [str(problem), repr(problem.__cause__)]
        delete_fetched(folder) if gate != "token" else shutil.copytree(folder, folder.with_name("copy"))
        if gate == "token":
            delete_fetched(folder)
    files = b"".join(path.read_bytes() for path in folder.parent.rglob("*") if path.is_file())
    assert len(said) > 8 and len(files) > TOTAL
    assert TOKEN not in "".join(said) + caplog.text and TOKEN.encode() not in files


@pytest.mark.parametrize(
    "path", ["../up.json", "/etc/x.json", "C:\\x.json", "a\\..\\x.json", "x.py", "x.bin", "x.pkl", "x.safetensors.exe"]
)
def test_paths_that_leave_the_folder_and_files_that_run_are_never_fetched(path: str) -> None:
    assert not is_harmless(path)
    assert is_harmless("transformer/model.safetensors") and is_harmless("LICENSE") and is_harmless("a/b.JSON")
