"""Calibration: NumPy and SciPy see the same in the same inputs, and no way of stopping changes what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import kurtosis, spearmanr
from torch import Tensor, nn

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.presets import find_preset
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import AppError, CaptionError, CheckpointError, RequestError
from ideogram_app.machine.hardware import Hardware, detect
from ideogram_app.model.components import load_components
from ideogram_app.model.reference_model import ReferenceModel, load_reference_model
from ideogram_app.model.text_encoder.features import encode
from ideogram_app.model.transformer.layers import Fp8Linear
from ideogram_app.prepare.calibration import collect as driver
from ideogram_app.prepare.calibration.calibration import Calibration, read_calibration
from ideogram_app.prepare.calibration.collect import (
    Trajectory,
    calibrate,
    partial_file,
    read_captions,
    shortened,
    weight_rows,
)
from ideogram_app.prepare.calibration.statistics import InputStatistics, Recorder
from ideogram_app.quantization import fp8
from ideogram_app.quantization.rows import dequantize_rows
from ideogram_app.records import Event, Request
from tests.conftest import MINIATURE, ROOT

pytestmark = pytest.mark.slow

MODEL = MODELS["miniature"]
SHIPPED = MINIATURE / "calibration.safetensors"
REQUEST = Request("miniature", "", width=64, height=64, seed=3)
CAPTIONS = [
    json.dumps({"compositional_deconstruction": {"background": colour, "elements": []}}, separators=(",", ":"))
    for colour in ("red", "blue", "yellow")
]
STEPS = 4


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Hardware]:
    folder = tmp_path_factory.mktemp("data")
    return Store(folder), detect(folder)


def run(machine: tuple[Store, Hardware], path: Path, **changes: Any) -> Iterator[Event]:
    return calibrate(REQUEST, CAPTIONS, *machine, path, **({"steps": STEPS} | changes))


@pytest.fixture(scope="module")
def finished(machine: tuple[Store, Hardware], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    path = tmp_path_factory.mktemp("finished") / "calibration.safetensors"
    return path, list(run(machine, path))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_statistics_of_an_input_are_numpys_and_scipys() -> None:
    x = gaussian(1, 1500, 24) ** 3 * torch.linspace(0.1, 5, 24) + 0.3
    x[0, 100:400] = 0  # tokens of another kind
    found = InputStatistics(24)
    found.add(x, 0)
    truth = x[0].double().numpy()
    truth = truth[np.any(truth != 0, axis=1)]
    assert np.array_equal(found.maximum.numpy(), np.abs(truth).max(0).astype(np.float32))
    assert np.allclose(found.second_moment.numpy(), (truth**2).mean(0), rtol=1e-5)
    expected = kurtosis(truth, axis=None, fisher=False) * np.abs(truth).max()
    assert found.fragility() == pytest.approx(expected, rel=1e-4)
    assert found.fragility((1,)) == 0  # nothing was seen late


def test_calls_add_up_and_silence_or_a_constant_is_not_fragile() -> None:
    whole, parts = InputStatistics(8), InputStatistics(8)
    x, y = gaussian(20, 8), 2 * gaussian(30, 8, seed=1)
    whole.add(torch.cat((x, y)), 0)
    parts.add(x, 0)
    parts.add(y.bfloat16().float(), 1)
    parts.add(torch.zeros(5, 8), 1)
    assert torch.allclose(whole.second_moment, parts.second_moment, rtol=0.01)
    assert parts.reach[:, 2:].tolist() == [[1, 20], [1, 30]]
    constant = InputStatistics(8)
    constant.add(torch.full((4, 8), 3.0), 0)
    assert constant.fragility() == 0


def test_a_recorder_watches_only_while_it_is_attached_and_changes_nothing() -> None:
    layer = nn.Sequential(nn.Linear(8, 4))
    recorder = Recorder({"0": InputStatistics(8)})
    x = gaussian(3, 8)
    with recorder.attached(layer):
        watched = layer(x)
    assert torch.equal(layer(5 * x), nn.functional.linear(5 * x, layer[0].weight, layer[0].bias))
    assert torch.equal(watched, layer(x))
    assert torch.equal(recorder.inputs["0"].maximum, x.abs().amax(0))


def inputs_seen(loaded: ReferenceModel, number: int, linear: str, machine: tuple[Store, Hardware]) -> list[np.ndarray]:
    """What a Linear of the conditional transformer reads at every step of a caption, by a hook of our own."""
    parts = load_components("miniature", "cpu", torch.float32)
    features = encode(parts.tokenizer, parts.text_encoder, CAPTIONS[number])
    preset = shortened(find_preset(REQUEST.preset), STEPS)
    shift = parts.shift
    seen: list[np.ndarray] = []
    layer = loaded.conditional.get_submodule(linear)
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, -2).numpy()))
    list(Trajectory.of(REQUEST, preset, shift, torch.device("cpu")).steps(loaded, features, number))
    handle.remove()
    return seen


@pytest.mark.parametrize("linear", ["layers.2.feed_forward.w2", "llm_cond_proj"])
def test_a_calibration_holds_what_the_layers_read(
    machine: tuple[Store, Hardware], finished: tuple[Path, list[Event]], linear: str
) -> None:
    loaded = load_reference_model(machine[0], "miniature", "reference", "cpu", torch.float32)
    steps = [inputs_seen(loaded, number, linear, machine) for number in range(len(CAPTIONS))]
    loud = [[step[np.any(step != 0, axis=1)] for step in caption] for caption in steps]
    every = np.concatenate([step for caption in loud for step in caption])
    calibration = read_calibration(finished[0], MODEL)
    found = calibration.branches[0].of(linear)
    assert np.allclose(found.maximum.numpy(), np.abs(every).max(0), rtol=1e-5)
    moment = (every.astype(np.float64) ** 2).mean(0)
    assert np.allclose(calibration.branches[0].of(linear).second_moment.numpy(), moment, rtol=1e-4, atol=1e-9)
    early = [kurtosis(step, axis=None, fisher=False) for caption in loud for step in caption[: STEPS // 2]]
    late_maximum = max(np.abs(step).max() for caption in loud for step in caption[STEPS // 2 :])
    assert found.fragility((0,)) == pytest.approx(
        np.mean(early) * max(np.abs(step).max() for caption in loud for step in caption[: STEPS // 2]), rel=1e-3
    )
    assert float(found.reach[1, 0]) == pytest.approx(late_maximum, rel=1e-5)


def test_smoothing_in_the_file_follows_from_its_maxima_and_the_weights(finished: tuple[Path, list[Event]]) -> None:
    found = read_calibration(finished[0], MODEL).branches[1]
    weights = load_file(MINIATURE / "unconditional_transformer" / "diffusion_pytorch_model.safetensors")
    largest = found.of("layers.1.feed_forward.w2").maximum
    columns = weights["layers.1.feed_forward.w2.weight"].float().abs().amax(0)
    exact = 0.5 * (largest.log2() - columns.log2())
    assert ((found.powers["layers.1.feed_forward.w2"] - (exact - exact.median())).abs() < 0.501).all()
    assert not found.powers["llm_cond_proj"].any()  # this branch never sees text


def test_weights_of_an_fp8_model_are_read_widened_some_rows_at_a_time() -> None:
    weight = gaussian(20, 8)
    values, scale = fp8.quantize_rows(weight)
    read = partial(weight_rows, nn.Sequential(Fp8Linear(values, scale), nn.Linear(8, 3)))
    assert torch.equal(read("0.weight", slice(5, 9)), dequantize_rows(values, scale)[5:9])
    assert read("1.weight", slice(1, 3)).shape == (2, 8)


def test_streamed_blocks_are_watched_and_their_weights_read_as_resident_ones_are(
    machine: tuple[Store, Hardware], finished: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: Any
) -> None:
    chosen = driver.plan
    monkeypatch.setattr(driver, "plan", lambda *args, **names: replace(chosen(*args, **names), residency="streamed"))
    path = tmp_path / "calibration.safetensors"
    list(run(machine, path))
    assert path.read_bytes() == finished[0].read_bytes()


def test_progress_counts_steps_and_the_last_word_tells_the_ranking(finished: tuple[Path, list[Event]]) -> None:
    *events, last = finished[1]
    total = STEPS * len(CAPTIONS)
    assert [event.done for event in events] == list(range(1, total + 1))
    assert {(event.phase, event.total) for event in [*events, last]} == {("calibrate", total)}
    assert all(event.rate and event.rate > 0 for event in events)
    found = read_calibration(finished[0], MODEL).branches[0]
    early, late = (list(found.fragility((half,)).values()) for half in (0, 1))
    assert f"Spearman {spearmanr(early, late).statistic:.3f}" in last.message and "w2" in last.message


@pytest.mark.parametrize("stop", [STEPS, STEPS + 3])
def test_a_stopped_calibration_goes_on_after_its_last_whole_caption_to_the_same_bytes(
    machine: tuple[Store, Hardware], finished: tuple[Path, list[Event]], tmp_path: Path, stop: int
) -> None:
    path = tmp_path / "calibration.safetensors"
    events = run(machine, path)
    for _ in range(stop):
        next(events)
    del events
    assert not path.exists()
    events = list(run(machine, path))
    whole_captions = (stop - 1) // STEPS  # the one whose last event was being looked at is not saved yet
    assert events[0].done == STEPS * whole_captions + 1
    assert path.read_bytes() == finished[0].read_bytes() and not partial_file(path).exists()


def test_a_finished_calibration_is_reused_without_loading_anything(
    machine: tuple[Store, Hardware], finished: tuple[Path, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing needs to be loaded")

    monkeypatch.setattr(driver, "load_components", refuse)
    (event,) = run(machine, finished[0])
    assert event.done == event.total and "ready" in event.message
    with pytest.raises(AssertionError):  # other settings are another calibration
        list(run(machine, finished[0], steps=STEPS + 1))


def test_only_the_sources_precision_is_watched(machine: tuple[Store, Hardware], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"reference or fp8.*int8-w8a8"):
        list(calibrate(replace(REQUEST, recipes=("int8-w8a8",)), CAPTIONS, *machine, tmp_path / "x"))
    with pytest.raises(RequestError, match="2 to 100"):
        list(run(machine, tmp_path / "x", steps=1))


def test_a_file_of_another_model_is_refused_with_both_shapes(finished: tuple[Path, list[Event]]) -> None:
    with pytest.raises(CheckpointError, match=r'another model.*"num_layers": 34.*"num_layers": 6'):
        read_calibration(finished[0], MODELS["ideogram-4"])


def lose(tensors: dict[str, Tensor]) -> None:
    del tensors["transformer/layers.0.feed_forward.w2/maximum"]


def narrow(tensors: dict[str, Tensor]) -> None:
    name = "transformer/layers.0.feed_forward.w2/squares"
    tensors[name] = tensors[name][:-1].clone()


def add(tensors: dict[str, Tensor]) -> None:
    tensors["transformer/extra"] = torch.zeros(1)


@pytest.mark.parametrize(("damage", "named"), [(lose, "w2/maximum"), (narrow, "w2/squares"), (add, "extra")])
def test_a_file_that_does_not_fit_is_refused_by_the_tensors_name(
    finished: tuple[Path, list[Event]], tmp_path: Path, damage: Any, named: str
) -> None:
    from safetensors import safe_open

    with safe_open(finished[0], "pt") as file:
        metadata = file.metadata()
    tensors = load_file(finished[0])
    damage(tensors)
    save_file(tensors, tmp_path / "c", metadata)
    with pytest.raises(CheckpointError, match=named):
        read_calibration(tmp_path / "c", MODEL)


def test_anything_else_is_no_calibration(tmp_path: Path) -> None:
    for content in (b"", b"not safetensors at all" * 10):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a calibration"):
            read_calibration(tmp_path / "c", MODEL)
    save_file({"x": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="no calibration of this version"):
        read_calibration(tmp_path / "c", MODEL)
    with pytest.raises(CheckpointError):
        read_calibration(tmp_path / "missing", MODEL)


def test_the_protected_set_is_a_budget_of_the_worst_over_both_branches_that_would_be_packed() -> None:
    calibration = Calibration.empty(MODELS["ideogram-4"], {})
    loud = gaussian(64, 12288) ** 5
    for index in range(20):
        calibration.branches[index % 2].of(f"layers.{index}.feed_forward.w2").add((20 - index) * loud, 0)
    calibration.branches[0].of("t_embedding.mlp_out").add(1e6 * loud[:, :4608], 0)
    recipe = RECIPES["int8-w8a8"]
    found = calibration.protected(recipe.packs)
    assert found == tuple(f"layers.{index}.feed_forward.w2" for index in range(17))  # the published number
    assert calibration.ranking()[0][0] == "t_embedding.mlp_out"  # first, but one row an image: never packed
    chosen = recipe.protecting(found)
    names = [linear.name for linear in MODELS["ideogram-4"].conditional.linears()]
    assert [name for name in names if recipe.packs(name) and not chosen.packs(name)] == list(found)


def test_without_a_calibration_what_is_known_by_name_is_protected() -> None:
    chosen = RECIPES["int8-w8a8"].protecting()
    assert not chosen.packs("layers.3.feed_forward.w2") and chosen.packs("layers.3.feed_forward.w1")
    assert RECIPES["int8-w8a8-rotated"].protecting() == RECIPES["int8-w8a8-rotated"]


def test_the_shipped_captions_are_valid_varied_and_distinct() -> None:
    captions = read_captions()
    assert len(captions) == len(set(captions)) >= 12
    assert any('"photo"' in caption for caption in captions) and any('"art_style"' in caption for caption in captions)
    assert any('"type":"text"' in caption for caption in captions) and any("面" in caption for caption in captions)


def test_captions_that_cannot_be_used_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(f'{CAPTIONS[0]}\n\n{{"background": "red"}}\n', encoding="utf-8")
    with pytest.raises(CaptionError, match="Line 3"):
        read_captions(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(CaptionError, match="no captions"):
        read_captions(path)
    with pytest.raises(AppError, match="cannot be read"):
        read_captions(tmp_path / "missing")


def test_the_miniature_ships_with_a_calibration_that_protects_what_published_ones_do() -> None:
    calibration = read_calibration(SHIPPED, MODEL)
    assert SHIPPED.stat().st_size < 400_000
    assert calibration.protected(RECIPES["int8-w8a8"].packs)[0].endswith("feed_forward.w2")
    assert min(found.agreement() for found in calibration.branches) > 0.7
    sums = json.loads((MINIATURE / "sha256.json").read_text(encoding="utf-8"))
    assert calibration.sources == {name: digest for name, digest in sums.items() if "transformer/" in name}
    assert str(ROOT) not in SHIPPED.read_bytes()[:100_000].decode("latin-1")
