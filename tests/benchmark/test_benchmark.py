"""The benchmark: shapes and rows, what is driven and with what, what it says of itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from small_model import SMALL, relative_error
from torch import Tensor
from typer.testing import CliRunner

from ideogram_app.benchmark import limits, profiling
from ideogram_app.benchmark import session as running
from ideogram_app.benchmark import stock as stock_rows
from ideogram_app.benchmark.command import benchmark, choose_device
from ideogram_app.benchmark.limits import TimeUp, group_rows, time_limit, turns
from ideogram_app.benchmark.ours import build_ours
from ideogram_app.benchmark.profiling import family, profile_step, shares
from ideogram_app.benchmark.receipts import read_receipt
from ideogram_app.benchmark.report import Benchmark, file_name
from ideogram_app.benchmark.rows import STOCK_ROWS, Row, RowMemory, int8_share, missing_packages, row_bytes, rows_for
from ideogram_app.benchmark.session import BenchmarkSession, ceiling_seconds
from ideogram_app.benchmark.shapes import Workload, ask, choose_dtype, find_shape
from ideogram_app.benchmark.stock import build_stock
from ideogram_app.benchmark.weights import Tiles
from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.errors import RequestError
from ideogram_app.machine import meter as measure
from ideogram_app.machine.gpu_specs import Ceiling, Flops
from ideogram_app.machine.hardware import Hardware
from ideogram_app.wire import from_json, to_json
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = replace(MODELS["miniature"], name="tiny", conditional=SMALL[0], unconditional=SMALL[1])
WORKLOAD = Workload("tiny", TINY, 96, 64, text_tokens=7, padding=20, steps=2, dtype="float32")
HERE = Hardware()  # a processor
CEILING = Ceiling(1.0, 2.0, 10.0, 1.0, "bfloat16")
OURS = (*RECIPES, "gguf-q4_k@w4a8", "gguf-q4_k@w4a16")


# Names as torch's profiler gives them, of kernels on several cards and of operators on a processor.
KERNELS = {
    "gemm": (
        "ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_64x3_tn",
        "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16_kernel",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16>(cutlass_80_tensorop::Params)",
        "turing_fp16_s1688gemm_fp16_128x128_ldg8_f2f_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HAS_SAV_UserArgs_MT256x256x64",
        "matmul_kernel",
        "triton_tem_fused__int_mm_mul_2",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_int_mm",
        "mkldnn::_linear_pointwise",
        "onednn::qlinear_pointwise",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<256, 64, 64, 4>>(Params)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x256_1x1x1_kernel0_0",
        "attn_fwd",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    "other": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3>",
        "Memcpy DtoD (Device -> Device)",
        "triton_red_fused__scaled_dot_product_efficient_attention_mean_mm_mul_0",
        "triton_poi_fused_addmm_silu_3",
        "add_norm_kernel",
        "swiglu_kernel",
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*, __nv_bfloat16*, int)",
        "aten::copy_",
        "aten::mul",
        "aten::rms_norm",
    ),
}


@pytest.mark.parametrize(
    ("name", "expected"), [(name, expected) for expected, names in KERNELS.items() for name in names]
)
def test_a_kernel_belongs_to_its_family(name: str, expected: str) -> None:
    assert family(name) == expected


def test_a_product_with_a_hadamard_block_is_no_product_of_the_model() -> None:
    assert family("aten::mm", [[4096, 4608], [4608, 4608]]) == "gemm"
    assert family("aten::mm", [[18432, 16], [16, 16]]) == "other"
    assert family("aten::bmm", [[1152, 16, 16], [1152, 16, 16]]) == "other"
    assert family("aten::addmm", [[256], [1, 256], [256, 256]]) == "gemm"


def test_shares_of_families_sum_to_one_and_no_time_has_none() -> None:
    found = shares([("gemm", 6.0), ("other", 1.0), ("attention", 1.0), ("gemm", 2.0)])
    assert found is not None and (found.gemm, found.attention, found.other) == (0.8, 0.1, 0.1)
    assert shares([]) is None


def test_a_profiled_step_of_products_alone_is_nearly_all_gemm() -> None:
    x = torch.randn(512, 512)
    kinds = profile_step(lambda: x @ x, CPU).families
    assert kinds is not None and kinds.gemm > 0.8
    query = torch.randn(1, 2, 256, 64)
    attended = profile_step(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), CPU).families
    assert attended is not None and attended.attention > 0.8


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such alarm clock")
def test_of_a_step_with_too_many_operators_the_first_seconds_are_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "MOST_OPERATORS", 50)
    monkeypatch.setattr(profiling, "PROFILE_SECONDS", 0.5)  # time for more than those, on a busy machine too
    x, calls = torch.zeros(4), []

    def step() -> None:
        calls.append(1)
        began = time.perf_counter()
        while time.perf_counter() - began < 20:
            x.add(1)
            time.sleep(0.0002)

    found = profile_step(step, CPU)
    assert len(calls) == 2 and found.first_seconds is not None and found.first_seconds < profiling.PROFILE_SECONDS
    assert found.families is not None and found.families.other == 1


def test_the_higher_of_two_ceilings_counts_and_what_is_missing_stays_missing() -> None:
    low = replace(CEILING, tflops_bf16=0.5, tops_int8=None)
    assert low.better(CEILING) == replace(CEILING, tops_int8=None)
    assert CEILING.better(replace(low, copy_gb_s=20.0)) == replace(CEILING, copy_gb_s=20.0)


def test_a_shape_is_a_model_or_the_published_widths_with_fewer_layers() -> None:
    assert find_shape("miniature") is MODELS["miniature"]
    small = find_shape("layers=2")
    published = MODELS["ideogram-4"].conditional
    assert small.branches == (replace(published, num_layers=2),) * 2


@pytest.mark.parametrize("text", ["layers=0", "layers=35", "layers=two", "big", "layers=-1"])
def test_an_unknown_shape_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="shape"):
        find_shape(text)


@pytest.mark.parametrize(
    ("flags", "word"),
    [({"size": 1000}, "width"), ({"steps": 0}, "nothing to time"), ({"text_tokens": 2049}, "padding")],
)
def test_flags_out_of_range_are_refused(flags: dict[str, int], word: str) -> None:
    sound = {"shape": "miniature", "size": 1024, "text_tokens": 300, "padding": 2048, "steps": 4, "dtype": "float32"}
    with pytest.raises(RequestError, match=word):
        ask(**(sound | flags))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "kind", "expected"),
    [
        (Hardware(cpu_features=("avx2",)), "cpu", "float32"),
        (Hardware(cpu_features=("avx2", "avx512_bf16")), "cpu", "bfloat16"),
        (Hardware(kind="cuda", name="RTX 2080", compute_capability=(7, 5)), "cuda", "bfloat16"),
        (Hardware(kind="cuda", name="RTX 3090", compute_capability=(8, 6)), "cuda", "bfloat16"),
    ],
)
def test_the_computing_type_is_what_the_device_is_fast_in(machine: Hardware, kind: str, expected: str) -> None:
    assert choose_dtype(machine, kind, "auto")[0] == expected
    assert choose_dtype(machine, kind, "float16")[0] == "float16"


def test_rows_stand_in_the_order_asked_for_and_stock_is_called_by_its_computing_type() -> None:
    rows = rows_for(("gguf-q4_k@w4a8", "gguf-q4_k@w4a16", "fp8"), "stock", "float16", HERE)
    names = [row.name for row in rows]
    assert names[:4] == ["gguf-q4_k@w4a8", "gguf-q4_k@w4a16", "fp8", "stock-fp16"]
    assert all(name.startswith("stock-") for name in names[3:]) and len(names) == 3 + len(STOCK_ROWS)
    assert [row.name for row in rows_for(("fp8",), "stock-bf16,stock-nf4", "bfloat16", HERE)][1:] == [
        "stock-bf16",
        "stock-nf4",
    ]


def test_the_arithmetic_of_a_recipe_is_the_programs_own_on_a_machine() -> None:
    card = Hardware(kind="cuda", name="RTX 3090", compute_capability=(8, 6))
    assert [rows_for(("gguf-q4_k",), "none", "float32", machine)[0].arithmetic for machine in (HERE, card)] == [
        "w4a16",
        "w4a8",
    ]


@pytest.mark.parametrize(
    ("recipes", "against"),
    [
        (("int3",), "none"),
        (("fp8", "fp8"), "none"),
        ((), "none"),
        (("fp8",), "stock-int3"),
        (("fp8@w4a8",), "none"),
        (("fp8+fast",), "none"),
    ],
)
def test_rows_that_do_not_exist_or_stand_twice_are_refused(recipes: tuple[str, ...], against: str) -> None:
    with pytest.raises(RequestError):
        rows_for(recipes, against, "bfloat16", HERE)


def test_memory_of_a_row_is_counted_from_the_published_shapes() -> None:
    workload = ask("ideogram-4", 1024, 300, 2048, 4, "bfloat16")
    rows = {row.name: row_bytes(row, workload) for row in rows_for(("int8-w8a8-rotated",), "stock", "bfloat16", HERE)}
    # Both transformers in bf16 are 37.1 GB; features of 6144 and 4096 tokens 1.1 GB.
    assert 37.9e9 < rows["stock-bf16"].kept < 38.4e9
    # llm_cond_norm in float32 takes some 4.6 GB for a moment, beside masked copies of 0.65 GB
    assert 3.5e9 < rows["stock-bf16"].busy < 5e9
    assert 19e9 < rows["int8-w8a8-rotated"].kept < 20e9


def test_the_share_in_int8_leaves_out_what_a_recipe_protects() -> None:
    branch = MODELS["ideogram-4"].conditional
    rows = {
        row.name: row
        for row in rows_for(("int8-w8a8", "int8-w8a8-rotated", "gguf-q4_k@w4a8", "fp8"), "none", "float32", HERE)
    }
    assert int8_share(rows["int8-w8a8-rotated"], branch) == int8_share(rows["gguf-q4_k@w4a8"], branch) == 1.0
    assert int8_share(rows["fp8"], branch) == 0.0
    w2, block = 4608 * 12288, 4 * 4608 * 4608 + 3 * 4608 * 12288
    assert int8_share(rows["int8-w8a8"], branch) == pytest.approx(1 - w2 / block)


def test_ideal_seconds_are_products_in_int8_and_attention_in_the_computing_type() -> None:
    work = Flops(matrices=8e12, attention=1e12)
    assert ceiling_seconds(work, 0.0, CEILING) == pytest.approx(9.0)
    assert ceiling_seconds(work, 1.0, CEILING) == pytest.approx(5.0)
    assert ceiling_seconds(work, 0.5, replace(CEILING, tops_int8=None)) == pytest.approx(9.0)


def velocity_of(step: Callable[[], Tensor]) -> Tensor:
    """The direction of the second step."""
    before = step().clone()
    return step() - before


def built(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    row = next(row for row in (*rows_for(OURS, "none", "float32", HERE), *STOCK_ROWS) if row.name == name)
    build = build_ours if row.kind == "ours" else build_stock
    return build(row, WORKLOAD, Tiles(CPU, dtype), 3)[0]


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """What stock diffusers computes with dense random weights, text padded."""
    return velocity_of(built("stock-bf16"))


def test_our_reference_and_stock_compute_the_same_function_of_the_same_random_model(truth: Tensor) -> None:
    assert relative_error(velocity_of(built("reference")), truth) < EXACT


# Relative error of guided velocities, about twice what was measured. Guidance 7 takes the difference of two
# transformers that share random weights, so the errors of single layers (1.2 % INT8, 2.6 % FP8, 7.1 % Q4_K, 9 % NF4 on
# Gaussian weights) add up to several times as much; FP8 and NF4 pack the time embedding too. A layer in a wrong place
# gives 1.4.
LARGEST = {"int8": 0.05, "fp8": 0.22, "q8_0": 0.025, "q4_k": 0.33, "nf4": 0.7}
EXACT = 1e-4  # float32 sums in another order: 2^-24 for each of some hundred operations in a row


@pytest.mark.parametrize("name", [*OURS, *(row.name for row in STOCK_ROWS if not row.compiled)])
def test_every_row_is_near_the_dense_model(name: str, truth: Tensor) -> None:
    bound = next((bound for kind, bound in LARGEST.items() if kind in name), EXACT)
    assert relative_error(velocity_of(built(name)), truth) < bound


def test_the_loop_of_stock_is_that_of_its_pipeline(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    row, tiles, steps = next(row for row in STOCK_ROWS if row.name == "stock-bf16"), Tiles(CPU, torch.float32), 3
    loop, _ = build_stock(row, WORKLOAD, tiles, steps)
    assert isinstance(loop, stock_rows.StockLoop)
    parts = dict(stock.components, transformer=loop.transformer, unconditional_transformer=loop.unconditional)
    pipeline = type(stock)(**{**parts, "scheduler": FlowMatchEulerDiscreteScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    noise, features = loop.latents.clone(), loop.features.float()
    given = (features, *(loop.layout[name] for name in ("position_ids", "segment_ids", "indicator")))
    monkeypatch.setattr(pipeline, "encode_prompt", lambda **_: given)
    expected = pipeline(
        "any",
        height=WORKLOAD.height,
        width=WORKLOAD.width,
        num_inference_steps=steps,
        guidance_scale=7.0,
        guidance_schedule=None,
        max_sequence_length=WORKLOAD.padding,
        latents=noise,
        output_type="latent",
        return_dict=False,
    )[0]
    got = [loop() for _ in range(steps)][-1]
    assert torch.equal(got, expected)


def test_blocks_of_the_compiled_row_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: asked.append(settings))
    built("stock-torchao-int8-compiled")
    assert len(asked) == SMALL[0].num_layers + SMALL[1].num_layers


def test_rows_share_memory_first_fit_and_what_fits_nowhere_is_named() -> None:
    sizes = [RowMemory(40, 5), RowMemory(30, 20), RowMemory(50, 5), RowMemory(10, 1), RowMemory(95, 5)]
    groups, too_large = group_rows(sizes, 100)  # of which 90 may be filled
    assert groups == [[0, 1], [2, 3]] and too_large == [4]
    assert group_rows(sizes, None) == ([[0, 1, 2, 3, 4]], [])


def test_turns_shrink_before_profiles_go_and_profiles_before_rows() -> None:
    assert turns(100, [1.0, 2.0], 4) == running.turns(100, [1.0, 2.0], 4)
    all_of_it, fewer, without, one = (turns(seconds, [1.0, 2.0], 4) for seconds in (18, 9, 3, 2))
    assert (all_of_it.steps, all_of_it.rows, all_of_it.profiled) == (4, (0, 1), True)
    assert (fewer.steps, fewer.rows, fewer.profiled) == (1, (0, 1), True)
    assert (without.steps, without.rows, without.profiled) == (1, (0, 1), False)
    assert (one.steps, one.rows, one.profiled) == (2, (0,), False)
    assert turns(0.5, [1.0, 2.0], 4).rows == ()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such alarm clock")
def test_a_time_limit_breaks_off_and_is_gone_afterwards() -> None:
    with pytest.raises(TimeUp), time_limit(0.05):
        time.sleep(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "measure_ceiling", lambda device, dtype: CEILING)


def test_a_budget_that_is_spent_drops_rows_with_a_sentence(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []

    def sleeper(row: Row, *_: Any) -> tuple[Callable[[], Tensor], str]:
        def step() -> Tensor:
            time.sleep(60.0 if row.name == "fp8" else 0.001)
            finished.append(row.name)
            return torch.zeros(1)

        return step, ""

    monkeypatch.setattr(running, "build_ours", sleeper)
    found = BenchmarkSession(WORKLOAD, CPU, 12.0).all(
        rows_for(("reference", "fp8", "gguf-q4_k"), "none", "float32", HERE), Hardware()
    )
    assert [row.name for row in found.rows] == ["reference", "gguf-q4_k"]
    assert [gone.name for gone in found.missing] == ["fp8"] and "not ready after" in found.missing[0].reason
    assert "fp8" not in finished  # it was broken off, not waited for


def test_no_time_at_all_leaves_a_report_without_rows(quick: None) -> None:
    found = BenchmarkSession(WORKLOAD, CPU, 0.0).all(rows_for(("reference",), "none", "float32", HERE), Hardware())
    assert not found.rows and "are left" in found.missing[0].reason


def test_fewer_steps_than_asked_for_are_said(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(*_: Any) -> tuple[Callable[[], Tensor], str]:
        def step() -> Tensor:
            now[0] += 10.0
            return torch.zeros(1)

        return step, ""

    for module in (limits, measure):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(running, "build_ours", slow)
    many = replace(WORKLOAD, steps=100)
    found = BenchmarkSession(many, CPU, 200.0).all(rows_for(("reference",), "none", "float32", HERE), Hardware())
    assert found.rows[0].steps < 100 and any("of 100 steps" in note for note in found.notes)


def test_a_row_too_large_for_memory_is_named_with_both_sizes(quick: None) -> None:
    workload = ask("ideogram-4", 1024, 300, 2048, 1, "bfloat16")
    machine = Hardware(host_free_bytes=8 * 10**9)
    found = BenchmarkSession(workload, CPU, 60.0).all(
        rows_for(("int8-w8a8-rotated",), "none", "bfloat16", HERE), machine
    )
    assert "8.0 GB are free" in found.missing[0].reason and "Needs about" in found.missing[0].reason


def test_rows_that_do_not_fit_together_are_timed_in_groups_and_said_so(quick: None) -> None:
    sizes = [row_bytes(row, WORKLOAD) for row in rows_for(("reference", "fp8"), "none", "float32", HERE)]
    alone = max(size.kept + size.busy for size in sizes)
    machine = Hardware(host_free_bytes=int(1.15 * alone))
    found = BenchmarkSession(WORKLOAD, CPU, 60.0).all(rows_for(("reference", "fp8"), "none", "float32", HERE), machine)
    assert [row.group for row in found.rows] == [0, 1] and len(found.group_ceilings) == 2
    assert any("2 groups" in note for note in found.notes)


def test_a_row_that_fails_leaves_the_others(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("an argument that is no more")

    monkeypatch.setattr(running, "build_stock", broken)
    found = BenchmarkSession(WORKLOAD, CPU, 60.0).all(
        rows_for(("reference",), "stock-nf4", "float32", HERE), Hardware()
    )
    assert [row.name for row in found.rows] == ["reference"]
    assert found.missing[0].name == "stock-nf4" and found.missing[0].failed
    assert "an argument that is no more" in found.missing[0].reason


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    lacking = {row.name: missing_packages(row) for row in STOCK_ROWS}
    assert lacking["stock-torchao-int8"] == "Not installed: torchao." and lacking["stock-bf16"] == ""


BARE = """
import sys
for name in ("diffusers", "transformers", "accelerate", "torchao", "gguf", "bitsandbytes"):
    sys.modules[name] = None
import typer
from ideogram_app.benchmark import session
from ideogram_app.benchmark.command import benchmark
from ideogram_app.machine.gpu_specs import Ceiling
session.measure_ceiling = lambda device, dtype: Ceiling(1.0, 2.0, 10.0, 1.0, "float32")  # seconds that prove nothing
typer.run(benchmark)
"""


def test_without_any_other_package_our_rows_are_timed_all_the_same() -> None:
    flags = "--shape miniature --size 64 --steps 1 --text-tokens 5 --recipes int8-w8a8-rotated,gguf-q4_k --device cpu"
    line = [sys.executable, "-c", BARE, *flags.split()]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = from_json(Benchmark, done.stdout.splitlines()[-1])
    assert [row.name for row in found.rows] == ["int8-w8a8-rotated", "gguf-q4_k"]
    assert len(found.missing) == len(STOCK_ROWS) and "diffusers" in found.missing[0].reason


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [("cuda", "auto", "cuda"), ("rocm", "auto", "cuda"), ("cpu", "auto", "cpu"), ("cuda", "cuda:1", "cuda:1")],
)
def test_a_device_is_the_machines_own_unless_another_is_asked_for(kind: str, asked: str, expected: str) -> None:
    assert choose_device(Hardware(kind=kind), asked) == expected


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match="no 'cuda' here"):
        choose_device(Hardware(), "cuda")


def test_the_whole_command_ends_with_one_line_of_json(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: None)  # the true one takes a minute
    app = typer.Typer()
    app.command()(benchmark)
    stock = ["stock-bf16", "stock-gguf-q4_k", "stock-torchao-int8-compiled"]  # each row by itself has a test above
    flags = "--shape miniature --size 128 --steps 2 --recipes reference,int8-w8a8-rotated,gguf-q4_k --text-tokens 20"
    line = [*flags.split(), "--against", ",".join(stock), "--padding", "40", "--dtype", "bfloat16"]
    line += ["--out", str(tmp_path), "--receipt", str(tmp_path / "receipt.json")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    found = from_json(Benchmark, done.stdout.splitlines()[-1])
    assert [row.name for row in found.rows] == ["reference", "int8-w8a8-rotated", "gguf-q4_k", *stock]
    receipt = read_receipt(tmp_path / "receipt.json")
    assert [row.requested for row in receipt.rows] == [row.name for row in found.rows] and receipt.weights == {}
    assert not found.missing and found.commit is not None and found.seconds < found.budget
    for row in found.rows:
        assert row.steps == 2 and row.ms_per_step > 0 and row.peak_memory_bytes >= 0 and row.share_of_ceiling > 0
        assert row.families is not None
        assert row.families.gemm + row.families.attention + row.families.other == pytest.approx(1)
    written = (tmp_path / file_name(found)).read_text(encoding="utf-8")
    assert from_json(Benchmark, written) == found == from_json(Benchmark, to_json(found))
    names = json.loads(written)
    assert {"hardware", "versions", "ceiling", "rows"} <= names.keys()
    assert {"tflops_bf16", "tops_int8", "copy_gb_s"} <= names["ceiling"].keys()
    row_names = {"name", "recipe", "ms_per_step", "spread", "share_of_ceiling", "peak_memory_bytes", "families"}
    assert row_names <= names["rows"][0].keys()
