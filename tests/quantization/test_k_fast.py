"""The compiled search finds what plain torch finds, byte for byte, and importance weighs both alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from benchmarks import llama_search
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.quantization import k_quants
from ideogram_app.quantization.k_search import TORCH, round_to_half, round_up_to_half

numba = pytest.importorskip("numba")

from ideogram_app.quantization.k_fast import NUMBA, lanes  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = ("Q4_K", "Q5_K", "Q6_K")
by_type = pytest.mark.parametrize("gguf_type", SEARCHED)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def student(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (rows, columns)).astype(np.float32)) * 0.02


def miniature() -> Tensor:
    """Trained weights: every matrix of the miniature whose rows are whole blocks, as rows of 256."""
    file = ROOT / "assets/miniature/transformer/diffusion_pytorch_model.safetensors"
    found = [tensor.float() for tensor in safetensors.torch.load_file(file).values() if tensor.dim() == 2]
    return torch.cat([tensor.reshape(-1, 256) for tensor in found if tensor.shape[1] % 256 == 0])[::8]


def edges() -> Tensor:
    """Rows of one block each, of every awkward kind, with ordinary ones between."""
    weight = gaussian(23, 256, seed=5)
    weight[0] = 0
    weight[1], weight[2] = 0.37, -0.37
    weight[3, 77], weight[4, 77] = 1e6, -1e6
    weight[5, 200:] = 0
    weight[6] = 0
    weight[6, 9] = -1e-3
    for row, scale in enumerate((1e-2, 1e-4, 1e-6, 1e-20, 1e-36, 1e-41), start=7):  # the last are subnormal
        weight[row] *= scale
    weight[14] = torch.arange(256) % 2 * 2.0 - 1
    weight[15], weight[16] = weight[15].abs(), -weight[16].abs()
    weight[17], weight[18] = weight[17] + 5, weight[18] - 5
    weight[19] = torch.arange(256) * 0.25 - 32  # many halves to round
    weight[20] *= 1e7
    return weight


def energies(columns: int, seed: int = 3) -> Tensor:
    """Mean squares of input channels over four orders of magnitude."""
    return torch.exp(2 * torch.randn(columns, generator=torch.Generator().manual_seed(seed)))


SOURCES = {
    "gaussian": lambda: gaussian(64, 1024),
    "student": lambda: student(64, 1024),
    "miniature": miniature,
    "edges": edges,
    "one block": lambda: gaussian(1, 256),
    "one more than a tile": lambda: gaussian(9, 256),
}


@by_type
@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
@pytest.mark.parametrize("source", SOURCES)
def test_compiled_and_plain_search_give_the_same_bytes(gguf_type: str, source: str, weighed: bool) -> None:
    weight = SOURCES[source]()
    importance = energies(weight.shape[1]) if weighed else None
    plain = k_quants.encode(weight, gguf_type, importance, TORCH)
    assert torch.equal(k_quants.encode(weight, gguf_type, importance, NUMBA), plain)
    assert torch.isfinite(k_quants.decode(plain, gguf_type)).all()


@by_type
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bytes_do_not_depend_on_threads(gguf_type: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(33, 256)
    alone = k_quants.encode(weight, gguf_type, search=NUMBA)
    monkeypatch.setattr(k_quants, "CHUNK_IN_THREADS", 3 * 256)  # 11 chunks of less than a tile
    monkeypatch.setattr(k_quants, "CHUNKS_A_TURN", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(k_quants.encode(weight, gguf_type, search=NUMBA), alone)
    weight[20, 5] = weight[30, 6] = torch.nan
    with pytest.raises(CheckpointError, match="row 20, column 5"):  # the first, whoever finds one first
        k_quants.encode(weight, gguf_type, search=NUMBA)


@by_type
@pytest.mark.parametrize("search", [TORCH, NUMBA], ids=lambda search: search.name)
def test_rows_encode_alike_alone_and_together(
    gguf_type: str, search: k_quants.Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = student(12, 768), energies(768)
    for chunk in ("CHUNK_ON_CPU", "CHUNK_IN_THREADS"):
        monkeypatch.setattr(k_quants, chunk, 5 * 256)  # they begin in the middle of rows
    whole = k_quants.encode(weight, gguf_type, importance, search)
    for rows in (slice(0, 1), slice(1, 6), slice(6, 12)):
        assert torch.equal(k_quants.encode(weight[rows], gguf_type, importance, search), whole[rows])


@by_type
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_no_block_holds_is_refused_with_its_place(gguf_type: str, bad: float) -> None:
    weight = gaussian(4, 512)
    weight[2, 300] = bad
    with pytest.raises(CheckpointError, match="row 2, column 300"):
        k_quants.encode(weight, gguf_type, search=NUMBA)


@by_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_and_transposed_sources_encode_like_float32_copies(gguf_type: str, dtype: torch.dtype) -> None:
    weight = gaussian(512, 8).to(dtype).t()
    expected = k_quants.encode(weight.float().contiguous(), gguf_type, search=TORCH)
    assert torch.equal(k_quants.encode(weight, gguf_type, search=NUMBA), expected)


@by_type
@pytest.mark.parametrize("search", [TORCH, NUMBA], ids=lambda search: search.name)
def test_importance_lowers_the_error_of_the_output(gguf_type: str, search: k_quants.Search) -> None:
    weight, importance = gaussian(64, 512), energies(512)
    inputs = torch.randn(2000, 512, generator=torch.Generator().manual_seed(9)) * importance.sqrt()

    def wrong(given: Tensor | None) -> float:
        made = k_quants.decode(k_quants.encode(weight, gguf_type, given, search), gguf_type)
        return float((inputs @ (made - weight).T).norm() / (inputs @ weight.T).norm())

    assert wrong(importance) < 0.9 * wrong(None)


@by_type
def test_equal_importance_is_none_and_its_unit_is_free(gguf_type: str) -> None:
    weight, importance = student(8, 512), energies(512)
    alike = k_quants.encode(weight, gguf_type)
    assert torch.equal(k_quants.encode(weight, gguf_type, torch.full((512,), 7.5)), alike)
    assert torch.equal(k_quants.encode(weight, gguf_type, torch.zeros(512)), alike)
    weighed = k_quants.encode(weight, gguf_type, importance)
    assert not torch.equal(weighed, alike)
    assert torch.equal(k_quants.encode(weight, gguf_type, importance * 1024), weighed)


@by_type
def test_silent_channels_still_get_weights_within_reach(gguf_type: str) -> None:
    weight, importance = gaussian(8, 512), energies(512)
    importance[::2] = 0
    importance[256:320] = 0
    made = k_quants.decode(k_quants.encode(weight, gguf_type, importance), gguf_type)
    assert (made - weight).abs().max() < weight.abs().max()
    assert (made - weight).norm() < 0.3 * weight.norm()


def test_q8_0_has_nothing_to_weigh() -> None:
    weight = gaussian(4, 512)
    assert torch.equal(k_quants.encode(weight, "Q8_0", energies(512)), k_quants.encode(weight, "Q8_0"))


@pytest.mark.parametrize("importance", [torch.ones(256), -torch.ones(512), torch.full((512,), torch.nan)])
def test_importance_of_another_kind_is_refused(importance: Tensor) -> None:
    with pytest.raises(RequestError, match="512 finite numbers, none below zero"):
        k_quants.encode(gaussian(2, 512), "Q4_K", importance)


@by_type
@pytest.mark.parametrize("draw", [gaussian, student])
def test_error_is_below_that_of_llama_cpp(gguf_type: str, draw: object) -> None:
    weight = draw(512, 1024)  # type: ignore[operator]
    ours = k_quants.decode(k_quants.encode(weight, gguf_type, search=NUMBA), gguf_type)
    theirs = torch.from_numpy(llama_search.requantize(weight.numpy(), gguf_type))
    assert (ours - weight).norm() < 0.98 * (theirs - weight).norm()


def test_q4_k_and_its_baseline_reach_their_known_errors() -> None:
    for weight, ours, theirs in ((gaussian(2048, 1024), 0.0699, 0.0714), (student(2048, 1024), 0.0809, 0.0829)):
        made = k_quants.decode(k_quants.encode(weight, "Q4_K", search=NUMBA), "Q4_K")
        assert (made - weight).norm() / weight.norm() < ours
        baseline = llama_search.requantize(weight[:512].numpy(), "Q4_K")
        assert np.linalg.norm(baseline - weight[:512].numpy()) / float(weight[:512].norm()) == pytest.approx(
            theirs, rel=0.005
        )


def test_steps_round_to_fp16_like_torch() -> None:
    @numba.njit
    def both(values: np.ndarray, nearest: np.ndarray, upper: np.ndarray) -> None:
        for i in range(len(values)):
            nearest[i], upper[i] = lanes.round_to_half(values[i]), lanes.round_up_to_half(values[i])

    rng = np.random.default_rng(0)
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # every one that is finite
    between = (halves[1:] + halves[:-1]) / 2  # and every tie
    random = np.exp(rng.uniform(-40, 14, 20000)).astype(np.float32)
    values = np.concatenate((halves, between, np.nextafter(between, 0), np.nextafter(between, 1e9), random))
    values = np.concatenate((values, -values)).astype(np.float32)
    nearest, upper = np.empty_like(values), np.empty_like(values)
    both(values, nearest, upper)
    given = torch.from_numpy(values)
    assert np.array_equal(nearest.view(np.int32), round_to_half(given).numpy().view(np.int32))
    assert np.array_equal(upper.view(np.int32), round_up_to_half(given).numpy().view(np.int32))


def test_large_matrices_go_to_numba_and_small_or_distant_ones_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, many = torch.device("cpu"), k_quants.WORTH_COMPILING
    assert k_quants.fastest_search(cpu, many) is NUMBA
    assert k_quants.fastest_search(cpu, many - 1) is TORCH
    assert k_quants.fastest_search(torch.device("cuda"), many) is TORCH
    k_quants._compiled_search.cache_clear()
    monkeypatch.setitem(sys.modules, "ideogram_app.quantization.k_fast", None)  # as where Numba is missing
    assert k_quants.fastest_search(cpu, many) is TORCH
    k_quants._compiled_search.cache_clear()


def test_packing_little_neither_imports_nor_compiles_anything() -> None:
    code = (
        "import sys, torch; from ideogram_app.quantization import k_quants;"
        "k_quants.encode(torch.ones(4, 256), 'Q4_K'); print('numba' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_where_no_folder_can_be_written_kernels_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    real = numba.njit

    def refuse(**options: object) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available for file")
        return real(**options)

    monkeypatch.setattr(lanes.numba, "njit", refuse)
    assert lanes.kernel(lambda x: x + 1)(2) == 3


def test_machine_code_is_known_by_all_that_it_was_made_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "k_fast"
    folder.mkdir()
    for source in Path(lanes.__file__).parent.glob("*.py"):
        (folder / source.name).write_bytes(source.read_bytes())
    (tmp_path / "k_search.py").write_bytes((Path(lanes.__file__).parents[1] / "k_search.py").read_bytes())
    monkeypatch.setattr(lanes, "__file__", str(folder / "lanes.py"))
    before = lanes._fingerprint()
    (tmp_path / "k_search.py").write_text("LARGEST_6_BITS = 62\n", encoding="utf-8")
    assert lanes._fingerprint() != before
