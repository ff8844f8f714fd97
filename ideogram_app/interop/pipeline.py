"""Prepared weights in stock diffusers: a loader for `Ideogram4Pipeline`, and GGUF for `from_single_file`.

    pipe = load_pipeline("data/checkpoints/ideogram-4/gguf-q4_k", source)        Ideogram4Pipeline
    pipe("…", max_sequence_length=512, num_inference_steps=20, guidance_schedule=[7.0] * 18 + [3.0] * 2, std=1.75)

    register_gguf()                                                              or any GGUF, file by file
    transformer = Ideogram4Transformer2DModel.from_single_file(
        "ideogram4-Q4_0.gguf",
        config="transformer",  # a folder with config.json
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    )

diffusers 0.42 reads GGUF but has no entry for this model in its table of single files: `from_single_file` refuses.
`register_gguf` adds the entry, and with it the one function that such an entry needs, from the names in files to those
in modules. Nothing is replaced or patched. Published files need three things of it: `qkv` is split into thirds of its
rows (blocks run along columns, so packed rows split like any others), `o` is renamed, and what is no matrix of a Linear
is decoded, because diffusers passes packed and BF16 norms, biases and embeddings on as bytes. It refuses what it does
not know; diffusers alone would leave what is missing on the meta device and drop, with a warning, what is too much.

    storage        in stock diffusers
    dense          from_pretrained
    int8           from_pretrained: config.json and torchao's metadata in the file say how
    gguf           from_single_file, once registered; decoded to half precision at every use
    fp8, convrot   not: no released loader applies these scales

diffusers calls the entry's function only where a file's names are not already its own, so a GGUF of diffusers' names
must hold F32 or F16 for all that is no Linear. Left out: saving, which diffusers cannot do with GGUF weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import torch
from torch import Tensor, nn

from ideogram_app.catalog.models import Branch
from ideogram_app.catalog.recipes import RECIPES, find_recipe
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prepared.manifest import Manifest, expect_size, read_manifest
from ideogram_app.checkpoints.prepared.storage import branch_file
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.tensor_names import WEIGHT, diffusers_names, parse
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.model.components import (
    SCHEDULER,
    TOKENIZER,
    VAE,
    ComponentsFolder,
    dense_tensors,
    find_components,
    load_offline,
    stock_tokenizer,
)

if TYPE_CHECKING:
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel

MODEL_CLASS = "Ideogram4Transformer2DModel"
READ_BY_DIFFUSERS = ("dense", "int8", "gguf")  # storages


class TextSide(nn.Module):
    """All that `Ideogram4Pipeline` uses of a text encoder: transformers' language model, its device and dtype.

    It has no `forward` and no vision tower, so that prompt upsampling fails rather than writes nonsense.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    @property
    def config(self) -> Any:
        return self.language_model.config

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.language_model.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.language_model.dtype)


def register_gguf() -> Mapping[str, Any]:
    """Have `Ideogram4Transformer2DModel.from_single_file` read GGUF files of this model, from now on in this process.

    Calling it again changes nothing, and neither does calling it in a diffusers that knows the model by itself. Returns
    the entry now in diffusers' table.
    """
    from diffusers.loaders import single_file_model

    row = {"checkpoint_mapping_fn": to_diffusers, "default_subfolder": BRANCHES[0]}
    entry: Mapping[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.setdefault(MODEL_CLASS, row)
    return entry


def to_diffusers(
    checkpoint: Mapping[str, Tensor], config: Mapping[str, Any], branch: str | None = None
) -> dict[str, Tensor]:
    """A file's tensors under diffusers' names, ready for the module that `config`, as in config.json, describes.

    Args:
        checkpoint: stored name to tensor; packed ones are diffusers' `GGUFParameter`, (rows, bytes of a row).
        branch: "transformer" or "unconditional_transformer", for a file that holds both under prefixes;
            `from_single_file(..., branch=...)` passes it on.

    Raises:
        CheckpointError: a tensor is missing, unknown, doubled, of another shape or packed in another way.
        RequestError: the file holds both transformers and none was named.
    """
    shape_of = Branch(**{item.name: int(config[item.name]) for item in fields(Branch)})
    shapes = shape_of.shapes()
    linears = {f"{linear.name}.weight" for linear in shape_of.linears()}
    found: dict[str, Tensor] = {}
    for stored, base, tensor in _of_one_branch(checkpoint, branch):
        names = diffusers_names(base)
        parts = (tensor,) if len(names) == 1 else tensor.chunk(len(names))
        for name, part in zip(names, parts, strict=False):  # fewer rows than parts: the last are missing, and said so
            _check(stored, name, part, shapes, found)
            kind = getattr(part, "quant_type", None)  # of diffusers' `GGUFParameter`
            keeps = kind is None or (name in linears and kind != gguf.GGMLQuantizationType.BF16)
            found[name] = part if keeps else _decoded(part, kind)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise CheckpointError(f"This file lacks {len(missing)} tensors of the transformer", got=f"no {missing[0]}")
    return found


def load_pipeline(
    folder: Path | str, source: Path | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Ideogram4Pipeline:
    """A stock `Ideogram4Pipeline` whose transformers come from a folder that this program prepared.

    Everything is in host memory; `.to("cuda")` and diffusers' own offloading follow. The text encoder is the text side
    alone, so there is no prompt upsampling.

    Args:
        folder: of one recipe, such as "data/checkpoints/ideogram-4/int8-w8a8".
        source: the pipeline folder that has text encoder, tokenizer, VAE and scheduler; where None, those prepared
            beside the folder, or else those of the source that it was prepared from.

    Raises:
        RequestError: stock diffusers cannot read this recipe.
        AccessError: the source is not there any more, and none was named.
        CheckpointError: a file is missing or damaged; the message names it.
    """
    from diffusers import Ideogram4Pipeline

    folder = Path(folder)
    manifest = read_manifest(folder)
    for row in manifest.files:
        expect_size(folder / row.path, row.size)
    transformers = {name: _transformer(folder, manifest, name, dtype) for name in BRANCHES}
    store, recorded = Store(folder.absolute().parents[2]), Path(manifest.source)
    if source is None and recorded.is_dir() and not store.components_status(manifest.model).usable:
        source = recorded
    where = find_components(manifest.model, Path(source) if source else None, store)
    return Ideogram4Pipeline(**stock_parts(where, dtype), **transformers)


def stock_parts(where: ComponentsFolder, dtype: torch.dtype) -> dict[str, Any]:
    """Tokenizer, text encoder, VAE and scheduler of transformers and diffusers, by their names in a pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "tokenizer": stock_tokenizer(where.folder / TOKENIZER),
        "text_encoder": TextSide(where.text_encoder("cpu", dtype, build=_stock_language_model).language_model),
        "vae": _stock_vae(where.folder / VAE, dtype),
        "scheduler": load_offline(FlowMatchEulerDiscreteScheduler.from_pretrained, where.folder / SCHEDULER),
    }


def _transformer(folder: Path, manifest: Manifest, branch: str, dtype: torch.dtype) -> Ideogram4Transformer2DModel:
    from diffusers import GGUFQuantizationConfig, Ideogram4Transformer2DModel

    recipe = find_recipe(manifest.recipe)
    if recipe.storage not in READ_BY_DIFFUSERS:
        readable = (name for name, row in RECIPES.items() if row.storage in READ_BY_DIFFUSERS)
        raise RequestError(f"Stock diffusers does not read {recipe.name}", expected=" or ".join(readable))
    if recipe.storage != "gguf":
        module = Ideogram4Transformer2DModel.from_pretrained(folder / branch, torch_dtype=dtype, local_files_only=True)
        return cast("Ideogram4Transformer2DModel", module)
    register_gguf()
    module = Ideogram4Transformer2DModel.from_single_file(
        str(folder / branch_file(manifest.model, recipe, branch)),
        config=str(folder / branch),  # a Path is refused
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )
    return cast("Ideogram4Transformer2DModel", module)


def _stock_language_model(config: Mapping[str, Any]) -> nn.Module:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    text = {key: value for key, value in config.get("text_config", config).items() if key != "dtype"}
    with init_empty_weights():  # buffers stay real: the rotary frequencies are in no file
        model: nn.Module = Qwen3VLTextModel._from_config(Qwen3VLTextConfig(**text))
    model.norm = nn.Identity()  # the transformer does not see it
    return model


def _stock_vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    """diffusers' own; libraries fill missing tensors with random numbers and a warning, which is an error here."""
    from diffusers import AutoencoderKLFlux2

    dense_tensors(folder)
    settings = {"output_loading_info": True, "use_safetensors": True}
    module, report = load_offline(AutoencoderKLFlux2.from_pretrained, folder, **settings)
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        wrong = missing[0] if missing else str(next(iter(report["mismatched_keys"])))
        raise CheckpointError(f"The weights in {folder} do not fill an AutoencoderKLFlux2", got=f"nothing for {wrong}")
    filled: nn.Module = module.to(dtype)
    return filled.eval().requires_grad_(False)


def _of_one_branch(checkpoint: Mapping[str, Tensor], branch: str | None) -> Iterator[tuple[str, str, Tensor]]:
    """(stored name, name without prefix, tensor) of one transformer's tensors."""
    names = {stored: parse(stored) for stored in checkpoint}
    if len({name.branch for name in names.values() if name.branch is not None}) > 1 and branch not in BRANCHES:
        expected = f"branch={' or '.join(BRANCHES)}"
        raise RequestError("This file holds both transformers", expected=expected, got=f"{branch!r:.60}")
    for stored, name in names.items():
        if name.branch is not None and branch in BRANCHES and BRANCHES[name.branch] != branch:
            continue
        if name.role != WEIGHT:
            raise CheckpointError(
                f"{stored} is the {name.role} of a packed weight, which diffusers would not apply",
                do="Prepare the file with this program first",
            )
        yield stored, name.base, checkpoint[stored]


def _check(
    stored: str, name: str, part: Tensor, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]
) -> None:
    """Refuse a tensor that is unknown, doubled or of another shape."""
    if name not in shapes:
        raise CheckpointError(f"{stored} is no tensor of this transformer", do="Check that config is that of the file")
    if name in found:
        raise CheckpointError(f"{stored} is there twice", got=f"{name} under two names")
    shape = tuple(getattr(part, "quant_shape", part.shape))
    if shape != shapes[name]:
        raise CheckpointError(f"{stored} does not fit the transformer", expected=str(shapes[name]), got=str(shape))


def _decoded(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    packed = tensor.detach().as_subclass(Tensor)
    return torch.from_numpy(gguf.dequantize(packed.view(torch.uint8).numpy(), kind))
