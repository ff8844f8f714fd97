"""Prepared weights in stock diffusers, and quantization configurations for other people's scripts."""

from ideogram_app.interop.pipeline import load_pipeline, register_gguf, to_diffusers

__all__ = ["load_pipeline", "register_gguf", "to_diffusers"]
