"""Sampling presets of Ideogram 4: steps, noise schedule and guidance, one row each.

Source: the preset table of the reference repository (ideogram-oss/ideogram4 `docs`), which stores the guidance tuple
last step first; here, as in diffusers, index 0 is the first and noisiest step. Left out: free step counts, because
guidance, mu and std belong together and a step count alone is a different, untested preset.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.catalog.models import Model
from ideogram_app.errors import RequestError, choose


@dataclass(frozen=True)
class Preset:
    """One schedule: `mu`, `std` of its logit-normal noise levels at 512 x 512 pixels, `guidance` for each step."""

    name: str
    steps: int
    guidance: tuple[float, ...]
    mu: float
    std: float

    def __post_init__(self) -> None:
        if len(self.guidance) != self.steps:
            raise ValueError(f"{self.name}: {self.steps} steps but {len(self.guidance)} guidance values")


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("quality-48", 48, (7.0,) * 45 + (3.0,) * 3, mu=0.0, std=1.5),
        Preset("default-20", 20, (7.0,) * 18 + (3.0,) * 2, mu=0.0, std=1.75),
        Preset("turbo-12", 12, (7.0,) * 11 + (3.0,), mu=0.5, std=1.75),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name; RequestError lists those that exist."""
    return choose(PRESETS, name, "preset")


def guidance_for(preset: Preset, model: Model, asked: float | None = None) -> tuple[float, ...]:
    """Guidance of every step: the one asked for, else the model's own where it has one, else the preset's.
    RequestError: what was asked for is no number from 0 to 20."""
    if asked is not None and not 0 <= asked <= 20:
        raise RequestError("The guidance cannot be used", expected="a number from 0 to 20", got=str(asked))
    constant = model.guidance if asked is None else asked
    return preset.guidance if constant is None else (float(constant),) * preset.steps
