"""Our loop against stock diffusers: the same noise gives the same latents, at every size and preset."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import norm

from ideogram_app.catalog.presets import PRESETS, Preset
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import AppError, RequestError
from ideogram_app.generation import draw as drawing
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.generation.draw import SharedInputs, draw
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import decode, denoise, make_noise, schedule, times
from ideogram_app.generation.validate import check_request
from ideogram_app.model.components import Components, load_components
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder.features import encode
from ideogram_app.model.vae import Autoencoder
from ideogram_app.records import Event, Request

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROMPTS = [
    parse_prompt("a red circle on a yellow background").caption,
    '{"compositional_deconstruction":{"background":"blue","elements":[{"type":"text","text":"SKY","desc":"white"}]}}',
    "a small green triangle at the left on a white background",  # never wrapped, and of another length
]


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("miniature", CPU, torch.float32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    store = Store(tmp_path_factory.mktemp("data"))
    return load_transformers(store, "miniature", "reference", CPU, torch.float32)


def ours(
    parts: Components, loaded: Loaded, prompt: str, noise: torch.Tensor, preset: Preset, size: tuple[int, int]
) -> torch.Tensor:
    features = encode(parts.tokenizer, parts.text_encoder, prompt)
    sigmas = schedule(preset, *size, parts.shift)
    velocity = GuidedModel(loaded, features, size[1] // 16, size[0] // 16, times(sigmas))
    steps = list(denoise(velocity, noise, sigmas, preset.guidance))
    assert len(steps) == preset.steps
    return steps[-1].latents


@pytest.mark.parametrize(
    ("name", "size"), [*((name, (128, 128)) for name in PRESETS), ("turbo-12", (160, 96)), ("turbo-12", (64, 208))]
)
def test_latents_equal_stock_diffusers(
    stock: Any, parts: Components, loaded: Loaded, name: str, size: tuple[int, int]
) -> None:
    """Stock draws the prompts as one batch padded to the longest; ours one at a time, not padded at all."""
    preset = PRESETS[name]
    width, height = size
    noise = torch.cat([make_noise(seed, width, height) for seed in range(len(PROMPTS))])
    theirs = stock(
        PROMPTS,
        height=height,
        width=width,
        num_inference_steps=preset.steps,
        guidance_schedule=preset.guidance,
        mu=preset.mu,
        std=preset.std,
        max_sequence_length=64,
        latents=noise,
        output_type="latent",
    ).images
    for index, prompt in enumerate(PROMPTS):
        mine = ours(parts, loaded, prompt, noise[index : index + 1], preset, size)
        worst = (mine[0] - theirs[index]).abs().max().item()
        assert worst < 1e-4


def test_decoded_pictures_equal_stock_diffusers(stock: Any, parts: Components, loaded: Loaded) -> None:
    preset, noise = PRESETS["turbo-12"], make_noise(3, 128, 128)
    call = {"num_inference_steps": 12, "guidance_schedule": preset.guidance, "mu": preset.mu, "std": preset.std}
    theirs = stock(PROMPTS[0], height=128, width=128, max_sequence_length=64, latents=noise, **call).images[0]
    mine = decode(parts.vae, ours(parts, loaded, PROMPTS[0], noise, preset, (128, 128)), 8, 8)
    difference = numpy.asarray(mine, dtype=int) - numpy.asarray(theirs, dtype=int)
    assert numpy.abs(difference).max() <= 1


@pytest.mark.parametrize("name", PRESETS)
def test_the_schedule_is_a_logit_normal_distribution(name: str) -> None:
    """Against SciPy: quantiles of a normal distribution through the logistic function, noisiest first."""
    preset = PRESETS[name]
    sigmas = schedule(preset, 1024, 1024, 1.0).numpy()
    assert len(sigmas) == preset.steps + 1 and sigmas[-1] == 0 and (numpy.diff(sigmas) < 0).all()
    mean = preset.mu + 0.5 * math.log(1024 * 1024 / 512**2)
    quantiles = numpy.linspace(1, 0, preset.steps + 1)[1:-1]
    expected = 1 / (1 + numpy.exp(-norm.ppf(quantiles, mean, preset.std)))
    assert numpy.allclose(sigmas[1:-1], expected, atol=1e-6)


def run(request: Request, parts: Components, loaded: Loaded, folder: Path) -> list[Event]:
    return list(draw(request, "reference", lambda: loaded, shared(parts, request), folder))


def shared(parts: Components, request: Request) -> SharedInputs:
    features = encode(parts.tokenizer, parts.text_encoder, request.caption)
    noise = make_noise(request.seed, request.width, request.height)
    return SharedInputs(features, noise, 0.1, parts.vae, parts.shift)


def test_a_seed_gives_the_same_picture_to_the_bit(parts: Components, loaded: Loaded, tmp_path: Path) -> None:
    request = Request("miniature", PROMPTS[0], preset="turbo-12", seed=7)
    first = run(request, parts, loaded, tmp_path / "a")[-1].result
    second = run(request, parts, loaded, tmp_path / "b")[-1].result
    assert first and second and first.image and second.image
    assert Path(first.image).read_bytes()[:-1] and numpy.array_equal(_pixels(first.image), _pixels(second.image))
    other = run(Request("miniature", PROMPTS[0], preset="turbo-12", seed=8), parts, loaded, tmp_path / "c")[-1].result
    assert other and other.image and not numpy.array_equal(_pixels(first.image), _pixels(other.image))


def test_events_tell_every_step_and_the_result_every_number(parts: Components, loaded: Loaded, tmp_path: Path) -> None:
    events = run(Request("miniature", PROMPTS[0], preset="turbo-12"), parts, loaded, tmp_path)
    steps = [event for event in events if event.phase == "denoise"]
    assert [event.done for event in steps] == list(range(13)) and steps[-1].seconds_left == 0
    result = events[-1].result
    assert result and result.steps == 12 and result.engaged == "reference"
    assert result.attention == "flash", "what PyTorch says that it takes on a processor"
    seconds = result.seconds
    assert 0 < seconds.first_step < seconds.denoise < seconds.total and seconds.encode > 0 and seconds.decode > 0
    assert result.weight_bytes == sum(
        held.numel() * 4 for module in loaded.modules for held in (*module.parameters(), *module.buffers())
    )
    assert result.peak_host_bytes is not None and result.peak_device_bytes is None
    assert result.peak_memory_bytes == result.peak_host_bytes and result.versions["torch"]


def test_the_picture_carries_its_result_as_text(parts: Components, loaded: Loaded, tmp_path: Path) -> None:
    from PIL import Image

    from ideogram_app.records import Result
    from ideogram_app.wire import from_json

    result = run(Request("miniature", PROMPTS[0], preset="turbo-12", seed=5), parts, loaded, tmp_path)[-1].result
    assert result and result.image
    with Image.open(result.image) as picture:
        inside = from_json(Result, picture.text["ideogram_app"])  # type: ignore[attr-defined]
    assert inside.seed == 5 and inside.caption == PROMPTS[0] and inside.seconds == result.seconds


def test_stopping_is_not_asking_for_the_next_event(parts: Components, loaded: Loaded, tmp_path: Path) -> None:
    request = Request("miniature", PROMPTS[0], preset="quality-48")
    events = draw(request, "reference", lambda: loaded, shared(parts, request), tmp_path)
    for event in events:
        if event.done == 2:
            break
    events.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_denoising_is_held_while_the_picture_is_decoded(
    parts: Components, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, alive, rested = [], [], []

    begin, decoded = GuidedModel.__init__, Autoencoder.decode

    def watched(self: GuidedModel, *given: Any) -> None:
        begin(self, *given)
        made.append(weakref.ref(self))

    def watching(*given: Any, **named: Any) -> Any:
        alive.append(made[-1]() is not None)
        return decoded(*given, **named)

    monkeypatch.setattr(GuidedModel, "__init__", watched)
    monkeypatch.setattr(Autoencoder, "decode", watching)
    monkeypatch.setattr(drawing, "PREVIEW_SECONDS", 1e9)  # previews come while it is needed
    monkeypatch.setattr(Loaded, "release_scratch", lambda self: rested.append(len(alive)))
    run(Request("miniature", PROMPTS[0], preset="turbo-12"), parts, loaded, tmp_path)
    assert alive == [False]
    assert rested == [0, 0]  # before the text is projected and before the picture is decoded


@pytest.mark.parametrize(("width", "height"), [(100, 128), (128, 0), (8192, 8192), (1024, 64)])
def test_sizes_off_the_grid_or_absurd_are_refused_with_what_works(width: int, height: int) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(Request("miniature", PROMPTS[0], width=width, height=height))
    assert "xpected" in str(caught.value)


def test_a_caption_longer_than_the_encoder_reads_is_refused(parts: Components) -> None:
    with pytest.raises(AppError, match="2048 tokens"):
        encode(parts.tokenizer, parts.text_encoder, "Q" * 3000)


def _pixels(path: str) -> numpy.ndarray[Any, Any]:
    from PIL import Image

    with Image.open(path) as picture:
        return numpy.asarray(picture)
