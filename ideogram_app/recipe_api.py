"""The documented import path of interop/quant_config.py: recipes for people's own diffusers scripts."""

from ideogram_app.interop.quant_config import (
    available_recipes,
    build_pipeline_quant_config,
    ideogram4_protected_layers,
    ideogram4_quant_recipe,
)

__all__ = [
    "available_recipes",
    "build_pipeline_quant_config",
    "ideogram4_protected_layers",
    "ideogram4_quant_recipe",
]
