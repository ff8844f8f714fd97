"""What a user names is opened, or refused in words: pipelines, files, pairs, folders of a publication, pickles."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.sources import BRANCHES, SOURCES, find_source
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.transformer import TransformerCheckpoint, open_source
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.errors import CheckpointError
from tools.make_replica import TINY, make
from tools.replica_layouts import REPLICAS

MODEL = replace(MODELS["ideogram-4"], conditional=TINY[0], unconditional=TINY[1])
Tensors = dict[str, torch.Tensor]
LINEAR = "layers.0.feed_forward.w2"
LAB = "conditional.layers.0.attention.o"  # there, w2 is not packed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A replica of a layout, written once and not to be changed."""
    there: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in there:
            there[name] = make(name, tmp_path_factory.mktemp(name) / "it", parts="transformers")
        return there[name]

    return of


def files(folder: Path, name: str) -> tuple[Path, Path]:
    first, second = REPLICAS[name].files
    return folder / first, folder / second


@pytest.mark.parametrize("name", REPLICAS)
def test_a_folder_of_any_publication_is_both_transformers_of_the_model(made, name) -> None:
    folder = made(name)
    source = open_source(folder, expected=MODEL)
    assert tuple(branch.branch for branch in source.branches) == TINY
    assert source.folder == folder == local_folder("ideogram-4", folder)
    assert all(file.is_relative_to(folder) and file.is_file() for file in source.files)
    assert len(set(source.files)) == len(source.files)


def test_two_files_are_a_source_in_the_order_in_which_they_are_named(made) -> None:
    first, second = files(made("gguf-rectangleworm"), "gguf-rectangleworm")
    source = open_source(first, second)
    assert [branch.branch for branch in source.branches] == list(TINY)
    assert source.files == (first, second) and source.folder == made("gguf-rectangleworm") / "diffusion"
    assert local_folder("ideogram-4", first) == first
    with pytest.raises(CheckpointError, match=r"describes another model.*num_layers 2.*Got 1"):
        open_source(second, first, expected=MODEL)


def test_a_file_of_both_is_a_source_alone(made) -> None:
    path = files(made("transformerlab-int8"), "transformerlab-int8")[0]
    source = open_source(path)
    assert source.files == (path,) and source.folder == path.parent
    assert not torch.equal(source.branches[0].tensor("adaln_proj.bias"), source.branches[1].tensor("adaln_proj.bias"))
    with pytest.raises(CheckpointError, match="holds both transformers"):
        TransformerCheckpoint(path)


def test_a_file_of_both_is_found_in_a_folder_of_any_name(made, tmp_path) -> None:
    shutil.copy(files(made("transformerlab-gguf-q8_0"), "transformerlab-gguf-q8_0")[0], tmp_path / "renamed.gguf")
    assert open_source(tmp_path).layout == "transformerlab-gguf"


def test_one_of_two_files_alone_is_refused_with_what_helps(made) -> None:
    for path in files(made("gguf-leejet"), "gguf-leejet"):
        with pytest.raises(CheckpointError, match="Name the file of the unconditional one as well"):
            open_source(path)


def test_one_file_named_for_both_is_refused(made) -> None:
    path = files(made("gguf-leejet"), "gguf-leejet")[0]
    with pytest.raises(CheckpointError, match="same weights"):
        open_source(path, path.parent / ".." / path.parent.name / path.name)


def test_files_that_say_what_they_are_may_not_be_swapped(made) -> None:
    first, second = files(made("comfy-fp8"), "comfy-fp8")
    assert open_source(first, second).layout == "comfy-fp8"
    with pytest.raises(CheckpointError, match=r"was named as the conditional transformer\. Got the unconditional one"):
        open_source(second, first)


def test_a_folder_with_the_files_of_two_publications_is_refused_with_both(made, tmp_path) -> None:
    for name in ("comfy-fp8", "comfy-int8"):
        shutil.copytree(made(name), tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"cannot be told.*_fp8_scaled.*_int8_convrot"):
        open_source(tmp_path)
    assert open_source(*files(tmp_path, "comfy-int8")).layout == "comfy-int8"


def test_two_files_of_unknown_names_are_not_guessed_at(made, tmp_path) -> None:
    for number, path in enumerate(files(made("gguf-leejet"), "gguf-leejet")):
        shutil.copy(path, tmp_path / f"{number}.gguf")
    with pytest.raises(CheckpointError, match=r"cannot be told.*Got 0\.gguf, 1\.gguf.*Name the file"):
        open_source(tmp_path)


def test_an_empty_folder_and_none_at_all_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match="There is no file"):
        open_source(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_it_is_called(tmp_path, name, zipped) -> None:
    path = tmp_path / name
    if zipped:
        torch.save({"adaln_proj.bias": torch.zeros(3)}, path)
    else:
        path.write_bytes(pickle.dumps({"adaln_proj.bias": [0.0] * 3}))
    with pytest.raises(CheckpointError, match="is a pickle, which may run any program"):
        open_source(path)


def test_a_folder_of_pickles_says_that_they_are_never_opened(tmp_path) -> None:
    for name in BRANCHES:
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles .* are never opened\. Got pytorch_model\.bin"):
        open_source(tmp_path)


def test_another_model_in_a_file_is_refused_by_what_it_lacks(tmp_path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}, tmp_path / "qwen.safetensors")
    with pytest.raises(CheckpointError, match=r"no Ideogram 4 transformer.*llm_cond_norm\.weight.*up_proj"):
        TransformerCheckpoint(tmp_path / "qwen.safetensors")


def test_heads_of_an_unknown_size_need_a_config(tmp_path) -> None:
    branch = Branch(1, 32, 8, 256, 256, 13 * 64)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in branch.shapes().items()}
    save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=r"it\.safetensors.*heads of 256 or 64\. Got 32.*config\.json"):
        TransformerCheckpoint(tmp_path / "it.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**vars(branch), "rope_theta": 7}))
    assert TransformerCheckpoint(tmp_path).config["rope_theta"] == 7


def test_the_published_size_gets_the_published_position_encoding() -> None:
    config = MODELS["ideogram-4"].conditional.config()
    assert (config["rope_theta"], config["mrope_section"]) == (5_000_000, [24, 20, 20])


def test_a_blocks_number_left_out_is_a_missing_tensor(made, tmp_path) -> None:
    def without_first(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.startswith("layers.0.attention")]:
            tensors[key.replace("layers.0", "layers.2")] = tensors.pop(key)

    assert "layers.0.attention.norm_q.weight" in refused(made("dense-fused"), tmp_path, without_first)


# What may be wrong beside a packed weight: layout, change, words of the error.
WRONG: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("fp8-fused", lambda t: t.pop(f"{LINEAR}.weight"), f"{LINEAR}.weight (256, 256). Got only {LINEAR}.weight_scale"),
    ("fp8-fused", lambda t: t.update({f"{LINEAR}.weight_scale": torch.ones(7)}), "scales, F32 (256,). Got"),
    ("fp8-fused", lambda t: t.update({f"{LINEAR}.weight_scale": torch.ones(256).half()}), "F16 (256,)"),
    ("comfy-fp8", lambda t: note(t, {"format": "nvfp4"}), "noted as nvfp4"),
    ("comfy-fp8", lambda t: t.update({f"{LINEAR}.weight_scale_2": torch.ones(())}), f"{LINEAR}.weight_scale_2, F32 ()"),
    ("comfy-int8", lambda t: note(t, {"format": "float8_e4m3fn"}), "noted as float8_e4m3fn"),
    ("comfy-int8", lambda t: note(t, ["int8"]), "Expected a JSON object"),
    ("comfy-int8", lambda t: t.update({f"{LINEAR}.comfy_quant": blank(4)}), "Expected JSON"),
    ("comfy-int8", lambda t: note(t, rotated(128)), "groups of a power of 4, not 128"),
    ("comfy-int8", lambda t: note(t, rotated(1024)), "rows of a multiple of 1024"),
    ("comfy-int8", lambda t: note(t, rotated(10**12)), "groups of a power of 4"),
    ("transformerlab-int8", lambda t: t.update({f"{LAB}.smooth": torch.ones(9)}), "smoothing factors"),
    ("transformerlab-int8", lambda t: t.pop(f"{LAB}.ws"), f"{LAB}.wq, I8 (256, 256)"),
    ("nf4-split", lambda t: t.pop(f"{LINEAR}.weight.absmax"), "U8 with .weight.absmax, .weight.quant_map"),
    ("nf4-split", lambda t: t.pop(f"{LINEAR}.weight.nested_quant_map"), "nested levels as F32, 256"),
    ("nf4-split", lambda t: t.update({f"{LINEAR}.weight.absmax": blank(3)}), "absmax as U8, 1,024"),
    ("nf4-split", lambda t: state(t, {"shape": [256, 256]}), "a state with shape, blocksize"),
    ("nf4-fused", lambda t: state(t, {"quant_type": "fp4", "shape": [256, 256], "blocksize": 64}), "an NF4 matrix"),
    ("nf4-fused", lambda t: state(t, {"shape": [256, 128], "blocksize": 64, "quant_type": "nf4"}), "16,384 of them"),
    ("nf4-fused", lambda t: fp4(t), "quant_state.bitsandbytes__fp4"),
    ("dense-split", lambda t: t.update({f"{LINEAR}.comfy_quant": blank(4)}), "cannot be read"),
    ("dense-split", lambda t: t.update({"cond.adaln_proj.bias": torch.ones(256)}), "bias is there twice"),
]  # fmt: skip


def blank(length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.uint8)


def rotated(group: int) -> dict[str, object]:
    return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}


def note(tensors: Tensors, value: object, suffix: str = "comfy_quant") -> None:
    tensors[f"{LINEAR}.{suffix}"] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def state(tensors: Tensors, value: object) -> None:
    note(tensors, value, "weight.quant_state.bitsandbytes__nf4")


def fp4(tensors: Tensors) -> None:
    name = f"{LINEAR}.weight.quant_state.bitsandbytes__"
    tensors[f"{name}fp4"] = tensors.pop(f"{name}nf4")


def refused(folder: Path, tmp_path: Path, change: Callable[[Tensors], object]) -> str:
    """The error of reading a conditional transformer after a change to its tensors."""
    path = next(folder.rglob("*.safetensors"))
    path = next((file for file in sorted(folder.rglob("*.safetensors")) if "uncond" not in str(file)), path)
    tensors = {}
    for file in sorted(path.parent.glob("*.safetensors")) if path.parent.name in BRANCHES else [path]:
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    which = 0 if any(name.startswith("conditional.") for name in tensors) else None
    with pytest.raises(CheckpointError) as caught:
        TransformerCheckpoint(tmp_path / "changed.safetensors", which=which)
    assert "changed.safetensors" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "change", "words"), WRONG, ids=[f"{row[0]}: {row[2][:30]}" for row in WRONG])
def test_what_does_not_fit_its_weight_is_named(made, tmp_path, name, change, words) -> None:
    assert words in refused(made(name), tmp_path, change)


def test_nvfp4_is_refused_as_what_it_is(tmp_path, made) -> None:
    def packed(tensors: Tensors) -> None:
        tensors[f"{LINEAR}.weight"] = torch.zeros(256, 128, dtype=torch.uint8)
        tensors[f"{LINEAR}.weight_scale"] = torch.zeros(256, 16).to(torch.float8_e4m3fn)
        tensors[f"{LINEAR}.weight_scale_2"] = torch.ones(())
        note(tensors, {"format": "nvfp4"})

    message = refused(made("comfy-fp8"), tmp_path, packed)
    assert "does not read" in message and "noted as nvfp4" in message and "weight_scale_2" in message


def test_rotation_noted_only_in_the_metadata_is_undone_too(tmp_path, made) -> None:
    path = files(made("comfy-int8"), "comfy-int8")[0]
    tensors = load_file(path)
    notes = {name.removesuffix(".comfy_quant"): rotated(256) for name in tensors if name.endswith(".comfy_quant")}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    save_file(kept, tmp_path / "it.safetensors", {"_quantization_metadata": json.dumps({"layers": notes})})
    plain, noted = TransformerCheckpoint(path), TransformerCheckpoint(tmp_path / "it.safetensors")
    assert noted.layout == plain.layout == "comfy-int8"
    assert all(torch.equal(plain.tensor(name), noted.tensor(name)) for name in plain.dtypes)


def test_scales_may_have_any_of_the_three_published_shapes(tmp_path, made) -> None:
    path = made("fp8-fused") / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, truth = load_file(path), TransformerCheckpoint(path)
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name] = tensors[name].unsqueeze(-1)
    save_file(tensors, tmp_path / "columns.safetensors")
    columns = TransformerCheckpoint(tmp_path / "columns.safetensors")
    assert all(torch.equal(truth.tensor(name), columns.tensor(name)) for name in list(truth.dtypes)[:30])
    for shape in ((), (1,)):
        tensors["layers.0.attention.qkv.weight_scale"] = torch.full(shape, 0.5)
        save_file(tensors, tmp_path / "one.safetensors")
        got = TransformerCheckpoint(tmp_path / "one.safetensors").tensor(
            "layers.0.attention.qkv.weight", slice(515, 521)
        )
        assert torch.equal(got, tensors["layers.0.attention.qkv.weight"][515:521].float() * 0.5)


def test_reading_rows_reads_no_more_of_the_file_than_they_take(made, monkeypatch) -> None:
    read: list[int] = []
    original = SafetensorsFile.tensor

    def counted(self: SafetensorsFile, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = original(self, name, rows)
        read.append(tensor.nbytes)
        return tensor

    for name, most in (("fp8-fused", 10 * 260), ("nf4-split", 10 * 128 + 10 * 4 + 64 + 1024 + 4 * 64)):
        branch = open_source(made(name)).branches[0]
        monkeypatch.setattr(SafetensorsFile, "tensor", counted)
        read.clear()
        branch.tensor("layers.1.attention.qkv.weight", slice(276, 286))
        assert sum(read) <= most
        monkeypatch.undo()


def test_the_first_source_of_the_published_model_is_the_official_fp8() -> None:
    source = find_source("ideogram-4")
    assert (source.repository, source.layout, source.gated) == ("ideogram-ai/ideogram-4-fp8", "fp8", True)


def test_every_source_fetches_what_its_transformers_need_and_no_pickles() -> None:
    from fnmatch import fnmatchcase

    assert len({(source.repository, source.branches) for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        for place in source.branches:
            wanted = f"{place}/it.safetensors" if source.branches == BRANCHES else place
            assert any(fnmatchcase(wanted, pattern) for pattern in source.patterns), source.repository
        for pickled in ("transformer/model.bin", "model.pt", "vae/x.ckpt"):
            assert not any(fnmatchcase(pickled, pattern) for pattern in source.patterns)
