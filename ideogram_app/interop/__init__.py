"""Prepared weights in stock diffusers, and quantization configurations for other people's scripts.

Its modules (this list is made by tools/docs.py):

    pipeline.py      Prepared weights in stock diffusers: a loader for `Ideogram4Pipeline`, and GGUF for
                     `from_single_file`.
    quant_config.py  Recipe API for diffusers scripts: which layers to protect, and the `PipelineQuantizationConfig`
                     that does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ideogram_app.interop.pipeline import load_pipeline, register_gguf, to_diffusers

__all__ = ["load_pipeline", "register_gguf", "to_diffusers"]


def __getattr__(name: str) -> Any:
    """The functions of pipeline.py, imported when first asked for: quant_config.py beside it needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ideogram_app.interop import pipeline

    return getattr(pipeline, name)
