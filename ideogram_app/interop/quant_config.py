"""Recipe API for diffusers scripts: which layers to protect, and the `PipelineQuantizationConfig` that does it.

    >>> from ideogram_app.recipe_api import available_recipes, ideogram4_quant_recipe
    >>> available_recipes()
    ('int8-w8a8', 'int8-weight-only', 'fp8-w8a8', 'fp8-weight-only', 'nf4')
    >>> recipe = ideogram4_quant_recipe("int8-w8a8")
    >>> len(recipe.protected_layers)
    74
    >>> recipe.protected_layers[:3]
    ('input_proj', 't_embedding.mlp_in', 't_embedding.mlp_out')

    pipe = Ideogram4Pipeline.from_pretrained(
        folder, quantization_config=build_pipeline_quant_config(recipe), torch_dtype=torch.bfloat16
    )

A precision is a row: a configuration class of torchao or bitsandbytes and whether it also needs the feed-forward
outputs protected. Weights are quantized by stock diffusers while it loads them from a *dense* checkpoint in diffusers'
names, and the same names are kept in both transformers.

Two ways lead stock diffusers to a layer that stays as it is. `modules_to_not_convert` is used here: it is written
into config.json as a plain list, bitsandbytes takes the same list, and the prepared INT8 folders carry one. It matches
by substring, "x." anywhere in a weight's name, so that "linear" or "w2" would keep far more than meant and bitsandbytes
also skips every layer whose last name equals an entry. Hence whole names only: `layers.1.feed_forward.w2` is no part of
`layers.11.feed_forward.w2`. torchao's `FqnToConfig` keeps the same layers (a test compares) but hides them inside a
nested object, and its `_default` is deprecated.

Unlike the program's own recipes (catalog/recipes.py), nothing here is smoothed, rotated or calibrated: from_pretrained
cannot. Left out: 4-bit torchao, whose kernels need a further package; GGUF, which is read rather than made
(interop/pipeline.py). Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import ONE_ROW_LAYERS
from ideogram_app.errors import RequestError, choose

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig

PUBLISHED_BRANCH = MODELS["ideogram-4"].conditional
TRANSFORMERS = ("transformer", "unconditional_transformer")
TEXT_ENCODER = "text_encoder"
COMPONENTS = (*TRANSFORMERS, TEXT_ENCODER)  # of `Ideogram4Pipeline`, those made of Linears
OVERRIDABLE = ("components", "protected_layers")  # of a recipe, beside the arguments of configuration classes
FEED_FORWARD_OUTPUT = "feed_forward.w2"
FINAL_LAYER = "final_layer."


@dataclass(frozen=True)
class Precision:
    """One way in which stock diffusers quantizes while it loads."""

    backend: str  # the package, torchao or bitsandbytes
    method: str = ""  # torchao's configuration class
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of `BitsAndBytesConfig`
    granularity: str = ""  # what shares one scale, where torchao's default is the whole tensor
    # torchao's class for the text encoder. Its inputs are never rounded: language models have outlier channels
    # (arXiv 2208.07339), and it runs once a picture.
    encoder_method: str = ""
    protects_ffn_down: bool = False  # whether the feed-forward outputs stay, the Linears that INT8 inputs hurt most
    needs: str = ""  # what the machine must have beyond the pinned packages


_INT8, _FP8 = "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"
PRECISIONS: dict[str, Precision] = {
    "int8-w8a8": Precision(
        "torchao", "Int8DynamicActivationInt8WeightConfig", encoder_method=_INT8, protects_ffn_down=True
    ),
    "int8-weight-only": Precision("torchao", _INT8, encoder_method=_INT8),
    "fp8-w8a8": Precision(
        "torchao",
        "Float8DynamicActivationFloat8WeightConfig",
        granularity="PerRow",
        encoder_method=_FP8,
        needs="a GPU that multiplies FP8 (NVIDIA from compute capability 8.9, AMD MI300)",
    ),
    "fp8-weight-only": Precision("torchao", _FP8, encoder_method=_FP8),
    "nf4": Precision(
        "bitsandbytes",
        arguments={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
        needs="bitsandbytes and a GPU",
    ),
}


@dataclass(frozen=True)
class QuantRecipe:
    """What to quantize, how, and what to leave alone; RequestError for a value that does not exist."""

    precision: str
    num_layers: int  # blocks of the deeper transformer
    components: tuple[str, ...]  # those of the pipeline that are quantized
    protected_layers: tuple[str, ...]  # whole names of Linears that both transformers keep in the computing type

    def __post_init__(self) -> None:
        choose(PRECISIONS, self.precision, "recipe")
        if not self.components or any(self.components.count(name) != (name in COMPONENTS) for name in self.components):
            raise RequestError(
                "These components cannot be quantized",
                expected=f"one or more of {', '.join(COMPONENTS)}, each once",
                got=", ".join(f"{name!r:.40}" for name in self.components) or "none",
            )
        known = _linears(self.num_layers)
        for name in self.protected_layers:
            if name not in known:
                raise _unknown_layer(name, self.num_layers)


def available_recipes() -> tuple[str, ...]:
    """The precisions that `ideogram4_quant_recipe` knows."""
    return tuple(PRECISIONS)


def ideogram4_protected_layers(
    num_layers: int = PUBLISHED_BRANCH.num_layers,
    protect_ffn_down: bool = True,
    protect_final_layer: bool = True,
    extra: Iterable[str] = (),
) -> tuple[str, ...]:
    """The Linears of a transformer that are best kept in high precision, by whole names in the forward pass's order.

    Always among them are those that see one row per picture, the timestep's and adaLN's, and `input_proj`: together
    0.37 B of 9.28 B weights. All 34 feed-forward outputs are another 1.93 B, that is 1.9 GB more in each transformer
    than in INT8; where a calibration named the fragile ones, pass those as `extra` in their place.

    >>> ideogram4_protected_layers(1, protect_ffn_down=False, protect_final_layer=False)
    ('input_proj', 't_embedding.mlp_in', 't_embedding.mlp_out', 'adaln_proj', 'layers.0.adaln_modulation')

    Args:
        num_layers: blocks of the transformer, from 1.
        protect_ffn_down: keep `feed_forward.w2` of every block.
        protect_final_layer: keep the projection to latents and its modulation.
        extra: whole names of further Linears, or of modules that contain Linears, such as "layers.0".

    Raises:
        RequestError: fewer than one block, or an extra name that is none.
    """
    names = _linears(num_layers)
    protected = {name for name in names if any(fragment in name for fragment in ONE_ROW_LAYERS)}
    for fragment, keeps in ((FEED_FORWARD_OUTPUT, protect_ffn_down), (FINAL_LAYER, protect_final_layer)):
        found = {name for name in names if fragment in name}
        protected = protected | found if keeps else protected - found
    for module in _as_tuple(extra):
        inside = {name for name in names if f"{name}.".startswith(f"{module}.")}
        if not inside:
            raise _unknown_layer(module, num_layers)
        protected |= inside
    return tuple(name for name in names if name in protected)


def ideogram4_quant_recipe(
    precision: str,
    num_layers: int = PUBLISHED_BRANCH.num_layers,
    components: Iterable[str] = TRANSFORMERS,
    extra_protected_layers: Iterable[str] = (),
) -> QuantRecipe:
    """A recipe for Ideogram 4 with the layers protected that its precision asks for.

    >>> ideogram4_quant_recipe("nf4", num_layers=1, extra_protected_layers=["llm_cond_proj"]).protected_layers[1]
    'llm_cond_proj'

    Args:
        precision: a name of `available_recipes()`.
        num_layers: blocks of the deeper transformer: 34, or 6 for the miniature.
        components: any of `COMPONENTS`.
        extra_protected_layers: as `extra` of `ideogram4_protected_layers`.

    Raises:
        RequestError: an unknown precision, component or layer, or fewer than one block; lists what exists.
    """
    row = choose(PRECISIONS, precision, "recipe")
    protected = ideogram4_protected_layers(num_layers, row.protects_ffn_down, extra=extra_protected_layers)
    return QuantRecipe(precision, num_layers, _as_tuple(components), protected)


def build_pipeline_quant_config(recipe: QuantRecipe | str, **overrides: Any) -> PipelineQuantizationConfig:
    """What `Ideogram4Pipeline.from_pretrained(quantization_config=...)` takes.

    Every component gets a configuration object and a list of its own, because loaders append to them.

    Args:
        recipe: or its name, for the published model.
        overrides: `components` or `protected_layers` in place of the recipe's; any other name is an argument of the
            transformers' configuration class: `bnb_4bit_compute_dtype` for nf4, `act_mapping_type` for int8-w8a8.

    Raises:
        RequestError: an unknown recipe, component, layer or override, or a package that is not installed.
    """
    recipe = ideogram4_quant_recipe(recipe) if isinstance(recipe, str) else recipe
    own: dict[str, Any] = {name: _as_tuple(overrides.pop(name)) for name in OVERRIDABLE if name in overrides}
    recipe = replace(recipe, **own)
    from diffusers import PipelineQuantizationConfig

    row = PRECISIONS[recipe.precision]
    try:
        mapping = {component: _configured(row, recipe, component, overrides) for component in recipe.components}
    except ImportError as problem:  # diffusers looks for a package's version when it is asked for a configuration
        said, expected = f"{recipe.precision} cannot be configured here", row.needs or row.backend
        raise RequestError(said, expected=expected, got=str(problem)) from problem
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _configured(row: Precision, recipe: QuantRecipe, component: str, overrides: dict[str, Any]) -> Any:
    """One component's configuration, of the library that will load it."""
    import diffusers
    import transformers

    protected = list(recipe.protected_layers)
    if row.backend == "bitsandbytes":
        _check_overrides(diffusers.BitsAndBytesConfig, overrides)
        arguments = {**row.arguments, **overrides}
        if component == TEXT_ENCODER:
            return transformers.BitsAndBytesConfig(**arguments)
        return diffusers.BitsAndBytesConfig(**arguments, llm_int8_skip_modules=protected)
    from torchao import quantization

    method = getattr(quantization, row.method)
    _check_overrides(method, overrides)
    if component == TEXT_ENCODER:
        return transformers.TorchAoConfig(getattr(quantization, row.encoder_method)())
    shared = {"granularity": getattr(quantization, row.granularity)()} if row.granularity else {}
    return diffusers.TorchAoConfig(method(**{**shared, **overrides}), modules_to_not_convert=protected)


def _check_overrides(method: Any, overrides: Mapping[str, Any]) -> None:
    """Reject what a configuration class would drop in silence or fail on with a TypeError."""
    known = [name for name in inspect.signature(method).parameters if name not in ("kwargs", "llm_int8_skip_modules")]
    unknown = sorted(overrides.keys() - set(known))
    if unknown:
        raise RequestError(f"Unknown override {unknown[0]!r:.60}", expected=", ".join((*OVERRIDABLE, *known)))


def _linears(num_layers: int) -> tuple[str, ...]:
    """Whole names of every Linear of a transformer of that many blocks; RequestError for a count that is none."""
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        depths = ", ".join(f"{model.conditional.num_layers} for {model.title}" for model in MODELS.values())
        said, expected = "A transformer of that many layers does not exist", f"a whole number from 1: {depths}"
        raise RequestError(said, expected=expected, got=f"{num_layers!r:.40}")
    return tuple(linear.name for linear in replace(PUBLISHED_BRANCH, num_layers=num_layers).linears())


def _unknown_layer(name: str, num_layers: int) -> RequestError:
    outside = ", ".join(linear for linear in _linears(1) if not linear.startswith("layers."))
    inside = ", ".join(linear.removeprefix("layers.0.") for linear in _linears(1) if linear.startswith("layers."))
    expected = f"whole names: {outside}, or layers.0 to layers.{num_layers - 1} with {inside}"
    return RequestError(f"There is no Linear {name!r:.80} in a transformer of {num_layers} layers", expected=expected)


def _as_tuple(names: Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple; a lone one is one name, not its letters."""
    return (names,) if isinstance(names, str) else tuple(names)
