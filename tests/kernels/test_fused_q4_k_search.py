"""The search on a GPU finds what plain torch finds, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

pytest.importorskip("triton")

from ideogram_app.errors import CheckpointError
from ideogram_app.kernels.fused import q4_k_search
from ideogram_app.kernels.fused.q4_k_search import fused_search
from ideogram_app.quantization import k_quants
from ideogram_app.quantization.k_search import TORCH, fit_affine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("CPU tensors need Triton's interpreter")
        monkeypatch.setattr(q4_k_search, "THREADS", 1024)  # its time is that of its operations, however wide
    return str(request.param)


def gaussian(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)) * 0.02


def student(rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(5, (rows, 256)).astype(np.float32)) * 0.02


def miniature(rows: int) -> Tensor:
    """Trained weights, from all over the miniature."""
    file = ROOT / "assets/miniature/transformer/diffusion_pytorch_model.safetensors"
    found = [tensor.float() for tensor in safetensors.torch.load_file(file).values() if tensor.dim() == 2]
    blocks = torch.cat([tensor.reshape(-1, 256) for tensor in found if tensor.shape[1] % 256 == 0])
    return blocks[:: len(blocks) // rows][:rows]


def edges() -> Tensor:
    """Blocks of every awkward kind."""
    weight = gaussian(22, seed=5)
    weight[0] = 0
    weight[1], weight[2] = 0.37, -0.37
    weight[3, 77], weight[4, 77] = 1e6, -1e6
    weight[5, 200:] = 0
    weight[6] = 0
    weight[6, 9] = -1e-3
    for row, scale in enumerate((1e-2, 1e-4, 1e-6, 1e-20, 1e-36, 1e-41), start=7):  # the last are subnormal
        weight[row] *= scale
    weight[13] = torch.arange(256) % 2 * 2.0 - 1
    weight[14], weight[15] = weight[14].abs(), -weight[15].abs()
    weight[16], weight[17] = weight[16] + 5, weight[17] - 5
    weight[18] = torch.arange(256) * 0.25 - 32  # many halves to round
    weight[19] *= 1e7
    return weight


def energies(columns: int) -> Tensor:
    """Mean squares of input channels over four orders of magnitude."""
    return torch.exp(2 * torch.randn(columns, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("gguf_type, weighed", [("Q4_K", False), ("Q4_K", True), ("Q5_K", True)])
def test_bytes_are_those_of_plain_torch(gguf_type: str, weighed: bool, device: str) -> None:
    # 202 blocks: with 1024 threads a second program, whose last threads find none
    weight = torch.cat((gaussian(60), student(60), miniature(60), edges()))
    importance = energies(256) if weighed else None
    made = k_quants.encode(weight.to(device), gguf_type, importance, fused_search()).cpu()
    plain = k_quants.encode(weight, gguf_type, importance, TORCH)
    assert torch.equal(made, plain), f"rows {(made != plain).any(-1).nonzero().flatten().tolist()}"


def test_importance_of_every_column_is_that_of_its_block(device: str) -> None:
    weight, importance = gaussian(12).view(4, 768), energies(768)
    made = k_quants.encode(weight.to(device), "Q4_K", importance, fused_search()).cpu()
    assert torch.equal(made, k_quants.encode(weight, "Q4_K", importance, TORCH))
    assert not torch.equal(made, k_quants.encode(weight, "Q4_K", None, TORCH))


def test_one_block_fits_like_many(device: str) -> None:
    x = gaussian(1).view(1, 8, 32)
    made, plain = fused_search().affine(x.to(device), 15, None), fit_affine(x, 15)
    for name in ("step", "floor_step", "scales", "minima", "quants"):
        mine, other = getattr(made, name).cpu(), getattr(plain, name)
        assert mine.shape == other.shape, name
        assert torch.equal(mine.float(), other), name


def test_q6_k_and_refusals_are_left_to_plain_torch() -> None:
    weight = gaussian(4)
    assert torch.equal(k_quants.encode(weight, "Q6_K", None, fused_search()), k_quants.encode(weight, "Q6_K"))
    weight[2, 100] = torch.nan
    with pytest.raises(CheckpointError, match="row 2, column 100"):
        k_quants.encode(weight, "Q4_K", None, fused_search())


def test_a_gpu_has_no_freedom_to_find_other_bytes() -> None:
    """The compiled search divides as IEEE 754 says, contracts nothing and flushes no subnormal to zero."""
    code = """
from triton import compile
from triton.backends.compiler import GPUTarget
from ideogram_app.kernels.fused import offline, q4_k_search
compilable = next(iter(q4_k_search.signatures()))
options = {"num_warps": compilable.warps, "num_stages": compilable.stages, "enable_fp_fusion": compilable.fuses}
print(compile(offline.source_of(compilable), target=GPUTarget("cuda", 86, 32), options=options).asm["ptx"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    ptx = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "div.rn.f32" in ptx and "add.rn.f32" in ptx
    for inexact in ("fma", ".ftz", ".approx", "div.full", "mul.f32", "add.f32", "sub.f32"):
        assert inexact not in ptx, inexact
