"""What stands around the transformers: our modules and the libraries' give the same, and damage is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.errors import AccessError, CheckpointError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.interop.pipeline import stock_parts
from ideogram_app.model import components as parts_module
from ideogram_app.model.components import SCHEDULER_CONFIG, find_components, load_components, read_shift
from ideogram_app.model.text_encoder.features import encode

ROOT = Path(__file__).resolve().parents[2]
# Packages and modules that take seconds to import, and that no picture needs.
HEAVY = (
    "transformers",
    "diffusers",
    "torchao",
    "accelerate",
    "scipy",
    "skimage",
    "sympy",
    "numba",
    "gguf",
    "torch._dynamo",
)
LOAD = f"""
import sys, torch
import ideogram_app.comparison.compare
from ideogram_app.model.components import load_components
from ideogram_app.model.text_encoder.features import encode
parts = load_components("miniature", "cpu", torch.float32)
features = encode(parts.tokenizer, parts.text_encoder, "a red circle")
parts.vae.decode(torch.zeros(1, 32, 4, 4))
print([name for name in {HEAVY} if name in sys.modules])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline folder that may be damaged."""
    return Path(shutil.copytree(local_folder("miniature"), tmp_path / "miniature"))


@pytest.mark.slow
def test_what_draws_is_imported_loaded_and_run_without_what_takes_seconds_to_import() -> None:
    answer = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_the_libraries_give_the_same(dtype: torch.dtype) -> None:
    ours = load_components("miniature", "cpu", dtype)
    stock = SimpleNamespace(**stock_parts(find_components("miniature"), dtype))
    assert {type(part).__module__.split(".")[0] for part in vars(stock).values()} == {
        "transformers",
        "diffusers",
        "ideogram_app",  # the text encoder, around transformers' language model
    }
    assert type(stock.text_encoder.language_model).__name__ == "Qwen3VLTextModel"
    caption = wrap_plain("a red circle")
    features = [encode(parts.tokenizer, parts.text_encoder, caption) for parts in (ours, stock)]
    assert torch.equal(*features)
    latents = torch.randn(1, 32, 5, 7).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours.vae.decode(latents)[0], stock.vae.decode(latents, return_dict=False)[0])
    assert ours.shift == stock.scheduler.config.shift


def test_each_part_is_loaded_only_when_it_is_asked_for(folder: Path) -> None:
    for name in ("text_encoder", "scheduler"):
        shutil.rmtree(folder / name)
    where = find_components("miniature", folder)
    assert where.vae("cpu", torch.float32).dtype == torch.float32
    assert where.tokenizer() is not where.tokenizer()
    with pytest.raises(CheckpointError, match="text_encoder"):
        where.text_encoder("cpu", torch.float32)
    with pytest.raises(CheckpointError, match="scheduler"):
        where.shift()


def test_the_identity_is_that_of_the_text_encoder(folder: Path) -> None:
    where = find_components("miniature", folder)
    before = where.identity
    assert before == find_components("miniature", folder).identity != find_components("miniature").identity
    os.utime(folder / "vae" / "config.json", ns=(1, 1))
    assert where.identity == before
    os.utime(folder / "text_encoder" / "config.json", ns=(1, 1))
    assert where.identity != before


@pytest.mark.slow
@pytest.mark.parametrize("made_of", ["own", "stock"])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_damaged_weights_are_named(folder: Path, part: str, made_of: str) -> None:
    def load() -> None:
        if made_of == "own":
            load_components("miniature", "cpu", torch.float32, folder)
        else:
            stock_parts(find_components("miniature", folder), torch.float32)

    (path,) = (folder / part).glob("*.safetensors")
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{path} is truncated"):
        load()
    name = next(name for name in sorted(tensors) if (tensors[name].dim() and "decoder" in name) or part != "vae")
    save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=part):
        load()
    removed = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=part):
        load()
    if part == "vae":
        save_file({**tensors, name: removed.to(torch.int8)}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{path} is packed.*{name}"):
            load()
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{part} holds no weights"):
        load()


def test_what_ships_with_the_program_is_compared_with_its_sums(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "find_source", lambda name: SimpleNamespace(included=folder))
    find_components("miniature", folder)
    vocabulary = folder / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        find_components("miniature", folder)


def test_a_tokenizer_without_a_tokenizer_json_is_left_to_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "stock_tokenizer", lambda path: f"transformers reads {path.name}")
    where = find_components("miniature", folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert where.tokenizer() == "transformers reads tokenizer"


@pytest.mark.parametrize("text", ["{", "[]", '{"shift": "much"}', '{"shift": null}'])
def test_a_damaged_scheduler_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=SCHEDULER_CONFIG):
        read_shift(tmp_path)
    (tmp_path / SCHEDULER_CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{SCHEDULER_CONFIG} is damaged"):
        read_shift(tmp_path)


def test_a_scheduler_that_does_not_shift_leaves_levels_as_they_are(tmp_path: Path) -> None:
    (tmp_path / SCHEDULER_CONFIG).write_text("{}", encoding="utf-8")
    assert read_shift(tmp_path) == 1.0


def test_the_parts_of_the_published_model_need_a_folder() -> None:
    with pytest.raises(AccessError, match="gated"):
        find_components("ideogram-4")
