"""What many tests need: the shipped miniature, in stock diffusers and in ours, loaded once."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "assets" / "miniature"
DAY = 24 * 3600  # seconds

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; said before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach outside, and libraries that would ask a hub are told so before they are imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_ANALYTICS_ENABLED="False")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run in its interpreter, on CPU tensors, unless tests on a GPU are asked for: read at import."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so begins what a script runs in the background,
        signal.signal(signal.SIGINT, signal.default_int_handler)  # and programs are ended by it in these tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is neither slow nor for a GPU is fast, before pytest chooses by markers."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "gpu")):
            item.add_marker("fast")


def cached_folder(config: pytest.Config) -> Path:
    """A folder in pytest's cache for what is made of the miniature by these very sources; older ones go after a day."""
    sources = [*(ROOT / "ideogram_app").rglob("*.py"), *MINIATURE.rglob("*"), ROOT / "requirements.txt"]
    digest = hashlib.sha256()
    for file in sorted(file for file in sources if file.is_file()):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    folders = config.cache.mkdir("miniature")
    for old in folders.iterdir():
        if old.is_dir() and time.time() - old.stat().st_mtime > DAY:
            shutil.rmtree(old, ignore_errors=True)
    folder = folders / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    return folder


@pytest.fixture(scope="session")
def prepared_miniature(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store that holds the shipped miniature in every recipe. Not to be changed: others, and later runs, read it."""
    from ideogram_app.catalog.recipes import RECIPES
    from ideogram_app.checkpoints.prepared.store import Store
    from ideogram_app.prepare.transformers import prepare

    cached = hasattr(request.config, "cache")  # not where pytest's cache is switched off
    folder = cached_folder(request.config) if cached else tmp_path_factory.mktemp("prepared")
    store = Store(folder)
    with FileLock(f"{folder}.lock"):  # the other processes of this run wait here, and then find all of it
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


def pytest_collection_finish() -> None:
    """What the imported libraries hold is no garbage: freeze it, and every `gc.collect` of a test takes a third."""
    gc.collect()
    gc.freeze()
