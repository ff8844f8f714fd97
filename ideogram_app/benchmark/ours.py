"""Our rows of a benchmark: recipes run with the program's own kernels and denoising loop, on random weights.

Text is projected and adaLN computed once, before any step is timed, as for a picture; the seconds of building hold
that. Nothing here is a shortcut of the benchmark's own: a step is one turn of `sampler.denoise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ideogram_app.benchmark.rows import Row, effective
from ideogram_app.benchmark.shapes import Workload
from ideogram_app.benchmark.weights import RandomBranch, Tiles
from ideogram_app.catalog.presets import PRESETS, Preset
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import Step, denoise, make_noise, schedule, times
from ideogram_app.kernels.choice import choose_kernels, compiled_kernels
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.machine.hardware import compute_capability
from ideogram_app.model.loader import Loaded
from ideogram_app.model.transformer.assemble import Placement, assemble
from ideogram_app.model.transformer.layers import weight_bytes

GUIDANCE = 7.0
SCHEDULE_SHIFT = 1.0  # of the published scheduler
PUBLISHED_PRESET = PRESETS["quality-48"]


def evenly(steps: int) -> Preset:
    """The best preset's noise levels for any number of steps."""
    return Preset("benchmark", steps, (GUIDANCE,) * steps, PUBLISHED_PRESET.mu, PUBLISHED_PRESET.std)


class OurLoop:
    """`sampler.denoise` as a function that does the next step; after the last, or one broken off, it starts anew."""

    def __init__(self, start: Callable[[], Iterator[Step]]) -> None:
        self._start, self._steps = start, start()

    def __call__(self) -> Tensor:
        """The latents after the step, (1, tokens, 128) float32."""
        step = next(self._steps, None)
        if step is None:
            self._steps = self._start()
            step = next(self._steps)
        return step.latents


def build_ours(row: Row, workload: Workload, tiles: Tiles, steps: int) -> tuple[Callable[[], Tensor], str]:
    """Both transformers of a recipe, prepared for so many steps.

    Returns a function that does the next step and returns the latents (1, tokens, 128); a note for readers of the row.
    """
    device = tiles.device
    name, reason = choose_kernels(device, compute_capability(device))
    kernels = compiled_kernels(find_kernels(name), device) if row.compiled else find_kernels(name)
    placement = Placement(tiles.dtype, device, torch.device("cpu"), kernels, row.arithmetic)
    backbones = []
    for number, branch in enumerate(workload.model.branches):
        weights = RandomBranch(branch, effective(row.recipe), tiles)
        backbone = assemble(weights, branch, branch.config(), placement, sees_text=number == 0)
        backbones.append(backbone)
    first, second = backbones
    held = weight_bytes(first) + weight_bytes(second)
    loaded = Loaded(first, second, held, row.recipe.name, (device, device), row.arithmetic, kernels.name)
    features = tiles.dense((workload.text_tokens, workload.model.conditional.llm_features_dim))[None]
    preset = evenly(steps)
    sigmas = schedule(preset, workload.width, workload.height, SCHEDULE_SHIFT)
    velocity = GuidedModel(loaded, features, workload.rows, workload.columns, times(sigmas))
    noise = make_noise(0, workload.width, workload.height).to(device)
    loop = OurLoop(lambda: denoise(velocity, noise, sigmas, preset.guidance))
    fragile = ", ".join(row.recipe.fragile)
    unpacked = f" No calibration is at hand, so {fragile} are not packed." if fragile else ""
    return loop, f"Kernels: {kernels.name}, because {reason}.{unpacked}"
