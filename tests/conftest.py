"""What many tests need: the shipped miniature, in stock diffusers and in ours, loaded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "assets" / "miniature"

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; said before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach outside, and libraries that would ask a hub are told so before they are imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_ANALYTICS_ENABLED="False")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run in its interpreter, on CPU tensors, unless tests on a GPU are asked for: read at import."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def prepared_miniature(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store that holds the shipped miniature in every recipe, made once. Not to be changed: others read it too."""
    from ideogram_app.catalog.recipes import RECIPES
    from ideogram_app.checkpoints.prepared.store import Store
    from ideogram_app.prepare.transformers import prepare

    store = Store(tmp_path_factory.mktemp("prepared"))
    for recipe in RECIPES:
        list(prepare(store, "miniature", recipe))
    return store


@pytest.fixture(scope="session")
def stock() -> Any:
    """Stock diffusers' `Ideogram4Pipeline` on the miniature, float32, without progress bars."""
    import torch
    from diffusers import Ideogram4Pipeline

    pipeline = Ideogram4Pipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
