"""From nothing to a picture: a replica of the published repository is fetched, packed, deleted and drawn with."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ideogram_app.catalog.models import MODELS
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.cli.prepare import prepare_by_stages
from ideogram_app.comparison.metrics import psnr
from ideogram_app.errors import AccessError, CheckpointError, RequestError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.generation.draw import SharedInputs, draw
from ideogram_app.generation.sampler import make_noise
from ideogram_app.model.components import Components, load_components
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder.encoder import PackedEmbedding
from ideogram_app.model.text_encoder.features import encode
from ideogram_app.prepare.components import prepare_components
from ideogram_app.records import Event, Request
from ideogram_app.studio.local_backend import LocalBackend
from ideogram_app.studio.state import Job
from ideogram_app.studio.studio import Studio
from ideogram_app.studio.worker import Backend
from tests.conftest import MINIATURE
from tests.replica import serving
from tools.hub import Faults, Hub
from tools.make_replica import make

pytestmark = pytest.mark.slow

NAME, RECIPE = "ideogram-4", "gguf-q8_0"
PHASES = ["fetch", "prepare", "smoke", "verify"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def published_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ideogram-4` have the miniature's shape and guidance."""
    shape = MODELS["miniature"]
    small = replace(
        MODELS[NAME], conditional=shape.conditional, unconditional=shape.unconditional, guidance=shape.guidance
    )
    monkeypatch.setitem(MODELS, NAME, small)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official FP8 repository, fused attention, FP8 text encoder and all, with the miniature's weights."""
    return make("fp8-fused", tmp_path_factory.mktemp("hub") / "repository", source=MINIATURE)


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Every connection ends after a megabyte."""
    with serving(repository, monkeypatch, Faults(cut_every=1_000_000)) as hub:
        yield hub


def picture(store: Store, model: str, recipe: str, parts: Components, folder: Path) -> Image.Image:
    """Drawn with what a store holds, from fixed noise."""
    request = Request(model, wrap_plain("a large red circle on a yellow background"), preset="turbo-12", seed=2)

    def load() -> Loaded:
        return load_transformers(store, model, recipe, CPU, torch.float32)

    features = read(parts, request)
    noise = make_noise(request.seed, request.width, request.height)
    start = SharedInputs(features, noise, 0.1, parts.vae, parts.shift)
    *_, last = draw(request, recipe, load, start, folder)
    assert last.result and last.result.image
    with Image.open(last.result.image) as image:
        return image.copy()


def read(parts: Components, request: Request) -> torch.Tensor:
    return encode(parts.tokenizer, parts.text_encoder, request.caption)


def phases(events: list[Event]) -> list[str]:
    return list(dict.fromkeys(event.phase for event in events))


def test_a_first_run_over_a_bad_line_ends_in_a_picture_that_needs_no_download(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    backend, store = LocalBackend(data), Store(data)
    with pytest.raises(RequestError, match="still needed"):
        backend.delete_source(NAME)

    events = list(backend.prepare(NAME, RECIPE))
    assert phases(events) == PHASES
    assert list(dict.fromkeys(event.recipe for event in events if event.phase == "prepare")) == ["encoder-q8_0", RECIPE]
    assert hub.served["text_encoder/model.safetensors"] > 0
    assert store.status(NAME, RECIPE).usable and store.components_status(NAME).recipe == "encoder-q8_0"

    assert backend.delete_source(NAME) > 10_000_000
    left = backend.source_state(NAME)
    assert (left.state, left.bytes) == ("missing", 0) and left.components_bytes > 1_000_000
    assert not list((data / "sources").rglob("*.safetensors"))
    parts = load_components(NAME, CPU, torch.float32, store=store)
    assert isinstance(parts.text_encoder.get_submodule("language_model.embed_tokens"), PackedEmbedding)
    drawn = picture(store, NAME, RECIPE, parts, tmp_path / "ours")
    truth = picture(
        store, "miniature", "reference", load_components("miniature", CPU, torch.float32), tmp_path / "truth"
    )
    assert psnr(drawn, truth) > 25


def test_the_first_run_on_the_command_line_tells_its_stages_and_refuses_at_a_closed_gate(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(MODELS["miniature"], name=NAME, title="Ideogram 4")  # which any machine can draw with
    monkeypatch.setitem(MODELS, NAME, small)

    def first_run() -> tuple[Job, str, list[str]]:
        stream = io.StringIO()
        try:
            job, recipe = prepare_by_stages(Studio(LocalBackend(tmp_path), tmp_path / "out"), NAME, stream=stream)
        finally:
            told = [line for line in stream.getvalue().splitlines() if line[1:3] == "/7"]
        return job, recipe, told

    hub.faults.gate = "licence"
    with pytest.raises(AccessError, match=r"Log in to Hugging Face first\. .*`hf auth login`"):
        first_run()
    assert hub.served.total() == 0
    hub.faults.gate = "none"
    job, recipe, told = first_run()
    assert job.state == "done" and recipe == "int8-w8a8-rotated" and [line[0] for line in told] == list("123456")
    assert "Passed" in told[-1] and "fetched and checked" in told[3]
    hub.requests.clear()
    _, _, told = first_run()
    assert len(told) == 6 and hub.requests == []  # what is there is not asked for again


def test_a_second_recipe_needs_the_download_again_but_not_the_companions(hub: Hub, tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    list(backend.prepare(NAME, RECIPE))
    made = (tmp_path / "checkpoints" / NAME / "companions" / "manifest.json").stat().st_mtime_ns
    backend.delete_source(NAME)
    events = list(backend.prepare(NAME, "int8-w8a8-rotated"))
    assert phases(events) == PHASES and "encoder-q8_0" not in {event.recipe for event in events}
    assert (tmp_path / "checkpoints" / NAME / "companions" / "manifest.json").stat().st_mtime_ns == made


def test_an_encoder_asked_for_replaces_the_one_that_is_kept_and_nothing_else_does(hub: Hub, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for encoder, kept in ((None, "encoder-q8_0"), ("encoder-int8", "encoder-int8"), (None, "encoder-int8")):
        list(LocalBackend(tmp_path, encoder=encoder).prepare(NAME, RECIPE))
        assert store.components_status(NAME).recipe == kept


def test_the_first_run_without_the_network_says_so_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="works offline"):
        list(LocalBackend(tmp_path, offline=True).prepare(NAME, RECIPE))


@pytest.mark.parametrize("encoder", ["encoder-int8", "encoder-q4_k", "encoder-dense"])
def test_companions_are_kept_in_the_encoder_recipe_asked_for(repository: Path, tmp_path: Path, encoder: str) -> None:
    store = Store(tmp_path)
    list(prepare_components(store, NAME, repository, encoder))
    assert store.components_status(NAME).recipe == encoder
    parts = load_components(NAME, CPU, torch.float32, store=store)
    published = load_components(NAME, CPU, torch.float32, repository)
    request = Request(NAME, wrap_plain("the word HELLO"))
    got, truth = (read(each, request) for each in (parts, published))
    assert float((got - truth).norm() / truth.norm()) < (
        0.002 if encoder == "encoder-dense" else 0.02
    )  # bf16 holds what FP8 was
    for name in ("vae", "tokenizer", "scheduler"):
        for path in (tmp_path / "checkpoints" / NAME / "companions" / name).iterdir():
            assert path.read_bytes() == (repository / name / path.name).read_bytes()


def test_a_folder_without_a_vae_cannot_be_kept(repository: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repository, tmp_path / "partial", ignore=shutil.ignore_patterns("vae")))
    with pytest.raises(CheckpointError, match="no vae"):
        list(prepare_components(Store(tmp_path / "data"), NAME, folder))


def test_a_damaged_companion_is_found_before_it_is_loaded(repository: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    list(prepare_components(store, NAME, repository))
    vae = store.components_folder(NAME).final / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-10])
    status = store.components_status(NAME)
    assert status.state == "damaged" and str(vae) in status.detail


def test_fetched_weights_give_the_hashes_of_the_folder_they_came_from(
    hub: Hub, repository: Path, tmp_path: Path
) -> None:
    def hashes(backend: Backend, root: Path) -> dict[str, Any]:
        list(backend.prepare(NAME, RECIPE))
        return {path.name: path.read_bytes() for path in (root / "checkpoints").rglob("*.gguf")}

    fetched = hashes(LocalBackend(tmp_path / "fetched"), tmp_path / "fetched")
    given = hashes(LocalBackend(tmp_path / "given", {NAME: repository}), tmp_path / "given")
    assert fetched == given and len(fetched) == 3


def test_the_bar_of_each_stage_never_runs_back(hub: Hub, tmp_path: Path) -> None:
    events = list(LocalBackend(tmp_path).prepare(NAME, RECIPE))
    for stage in dict.fromkeys((event.phase, event.recipe) for event in events):
        done = [event.done for event in events if (event.phase, event.recipe) == stage]
        assert done == sorted(done) and len(done) > 1
