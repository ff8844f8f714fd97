"""Every kernel compiled for real cards, without one: what it needs is within what the cards have.

Compilation runs in a process of its own, for Triton interprets in this one. Three cards with all kernels, three more
with the INT8 product alone and a kernel for each width of AMD's warps take about two minutes of one core; from Triton's
cache, seconds. The rest is read from the report that is kept in benchmarks/results/, which must name every kernel there
is; of AMD's, whose compiler takes 10 seconds for a product, those products.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ideogram_app.errors import RequestError
from ideogram_app.kernels.fused import offline
from ideogram_app.kernels.fused.offline import Need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results" / "kernels-offline.json"
WHOLE = (75, 86, 120)
PRODUCT_ALONE = (80, 90, 100)
ON_AMD = {"gfx1100": "matmul, 128x128x64", "gfx90a": "quantize_kernel, rotated, bf16, 12288"}
# What AMD multiplies INT8 with, by the beginning of a gfx name; gfx1030 has no matrix units.
AMD_INSTRUCTIONS = {"gfx9": "v_mfma_i32", "gfx10": "v_dot4", "gfx11": "v_wmma_i32", "gfx12": "v_wmma_i32"}
# One row of 53248 numbers is held by 32 warps, whose threads may have 64 registers each: 52 numbers and what is
# computed with them do not fit. It runs once for a prompt.
LONG_ROW, LONG_ROW_LOCAL_BYTES = "53248", 64


def compiler(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ideogram_app.kernels.fused.offline", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def read(file: Path) -> list[Need]:
    return [Need(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> list[Need]:
    """All kernels of WHOLE, the INT8 product of PRODUCT_ALONE, one kernel of each of ON_AMD."""
    folder, found = tmp_path_factory.mktemp("offline"), []
    asked: list[tuple[tuple[int | str, ...], tuple[str, ...]]] = [(WHOLE, ()), (PRODUCT_ALONE, ("--kernel", "matmul"))]
    asked += [((target,), ("--kernel", kernel)) for target, kernel in ON_AMD.items()]
    for number, (targets, more) in enumerate(asked):
        file = folder / f"{number}.json"
        done = compiler("--json", str(file), *(word for each in targets for word in ("--target", str(each))), *more)
        assert done.returncode == 0, done.stdout + done.stderr
        found += read(file)
    return found


@pytest.fixture(params=["compiled now", "kept"])
def reported(request: pytest.FixtureRequest) -> list[Need]:
    return request.getfixturevalue("needs") if request.param == "compiled now" else read(KEPT)


def product(needs: list[Need]) -> list[Need]:
    """INT8 products of NVIDIA's cards."""
    return [need for need in needs if need.kernel.startswith("matmul") and isinstance(need.target, int)]


def test_everything_compiles(reported: list[Need]) -> None:
    assert reported and not [need for need in reported if need.problem]


def test_shared_memory_fits_consumer_cards(reported: list[Need]) -> None:
    """99 KB everywhere but on sm_90 and sm_100, which no consumer card has, and 64 KB on Turing and on AMD."""
    for need in reported:
        little = need.target == 75 or isinstance(need.target, str)
        limit = 64 if little else 99 if need.target not in (90, 100) else 227
        assert need.shared_bytes <= limit * 1024, need


def test_registers_suffice_and_nothing_spills(reported: list[Need]) -> None:
    for need in reported:
        most = 255 if isinstance(need.target, int) else 512 if need.target.startswith("gfx9") else 256
        assert 0 < need.registers <= most, need
        assert need.local_bytes <= (LONG_ROW_LOCAL_BYTES if LONG_ROW in need.kernel else 0), need


def test_every_int8_product_is_made_of_int8_matrix_instructions(reported: list[Need]) -> None:
    assert {need.target for need in product(reported)} >= {80, 86, 90, 100, 120}
    for need in product(reported):
        kind = "wgmma.mma_async" if need.target == 90 else "mma.sync"
        assert need.instruction.startswith(kind) and ".s32.s8.s8" in need.instruction, need


def test_amds_products_are_made_of_what_its_generations_have(reported: list[Need]) -> None:
    products = [need for need in reported if need.kernel.startswith("matmul") and isinstance(need.target, str)]
    assert {"gfx1100"} <= {need.target for need in products}
    for need in products:
        [kind] = [kind for name, kind in AMD_INSTRUCTIONS.items() if str(need.target).startswith(name)]
        assert need.instruction.startswith(kind), need


def test_no_program_on_amd_has_more_threads_than_it_may(reported: list[Need]) -> None:
    for need in reported:
        if isinstance(need.target, str):
            assert need.warps * offline.AMD_TARGETS[need.target][1] <= 1024, need


def test_two_programs_of_the_middle_tile_share_a_multiprocessor(reported: list[Need]) -> None:
    """As `tiles.py` counts on: 100 KB for all, of which each program takes one more than it asks for."""
    middle = [need for need in product(reported) if "128x128x64" in need.kernel and need.target in (86, 120)]
    assert len(middle) == 2
    for need in middle:
        assert 2 * (need.shared_bytes + 1024) <= 100 * 1024
        assert 2 * 32 * need.warps * -(-need.registers // 8) * 8 <= 65536


def test_turing_has_every_kernel_but_the_product(needs: list[Need]) -> None:
    names = {target: {need.kernel for need in needs if need.target == target} for target in (75, 86)}
    assert names[75] == {name for name in names[86] if not name.startswith("matmul")}


def test_the_report_that_is_kept_names_every_kernel_of_every_card() -> None:
    kept = {(need.target, need.kernel, need.warps) for need in read(KEPT)}
    now = {
        (target, compilable.name, compilable.warps)
        for target in offline.TARGETS
        for compilable in offline.compilables(target)
        if isinstance(target, int) or compilable.name.startswith("matmul")
    }
    assert kept == now, "python -m ideogram_app.kernels.fused.offline --json benchmarks/results/kernels-offline.json"


def test_names_of_kernels_are_unique() -> None:
    for target in offline.TARGETS:
        names = [compilable.name for compilable in offline.compilables(target)]
        assert len(names) == len(set(names))


def test_nothing_is_reported_from_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RequestError, match="Unset TRITON_INTERPRET"):
        offline.check(["86"])


def test_unknown_cards_are_refused_by_name() -> None:
    done = compiler("--target", "61")
    assert done.returncode == 1
    assert "'61'" in done.stderr and "75 or 80" in done.stderr


def test_what_fails_to_compile_is_a_row_with_the_compilers_words() -> None:
    need = Need("matmul", 75, 4, problem="first line\nPassManager::run failed")
    assert offline.line(need).endswith("PassManager::run failed")
    assert "221 registers" in offline.line(replace(need, problem="", registers=221))
