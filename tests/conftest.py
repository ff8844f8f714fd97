"""What many tests need: the shipped miniature, in stock diffusers and in ours, loaded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "assets" / "miniature"

# No test may reach outside, and libraries that would ask a hub are told so before they are imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_ANALYTICS_ENABLED="False")


@pytest.fixture(scope="session")
def stock() -> Any:
    """Stock diffusers' `Ideogram4Pipeline` on the miniature, float32, without progress bars."""
    import torch
    from diffusers import Ideogram4Pipeline

    pipeline = Ideogram4Pipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
