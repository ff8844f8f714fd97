"""Offline compilation of every kernel for every GPU generation: registers, shared memory, spills.

    python -m ideogram_app.kernels.fused.offline --json FILE [--target 86 --target gfx1100 ...] [--kernel NAME]

For each kernel and target (NVIDIA's compute capability, AMD's gfx name): registers of a thread, bytes of local memory a
thread (0: nothing was spilled), shared memory of a program beside what the card has, and which INT8 instruction the
machine code contains. A kernel that does not compile is a row with the compiler's words, and the exit code is 1.

On NVIDIA registers and local memory are read out of the finished binary by the cuobjdump that ships with Triton, so a
kernel that comes from Triton's cache reports like a fresh one; on AMD they stand in the assembly's own metadata. Left
out: everything only a run can say, first of all time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import triton
import typer
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from ideogram_app.errors import RequestError, choose
from ideogram_app.files import write_json
from ideogram_app.kernels.fused import heads, matmul, q4_k, rows
from ideogram_app.kernels.fused.blocks import WARP
from ideogram_app.kernels.fused.signature import Compilable
from ideogram_app.machine.versions import commit, versions

# Compute capability without its dot -> the most shared memory of one program, in bytes (CUDA C++ Programming Guide,
# table of technical specifications per compute capability).
KILOBYTE = 1024
SHARED_KILOBYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMITS = {target: size * KILOBYTE for target, size in SHARED_KILOBYTES.items()}
# AMD: gfx name -> first two numbers, as torch reports a capability, and threads of a warp. 64 KB of local data share
# (LDS) are all that a program may have on each (AMD's ISA guides for RDNA 2 to 4, MI200 and MI300).
AMD_TARGETS = {
    "gfx1030": ((10, 3), 32),
    "gfx1100": ((11, 0), 32),
    "gfx1201": ((12, 0), 32),
    "gfx90a": ((9, 0), 64),
    "gfx942": ((9, 4), 64),
}
AMD_SHARED_LIMIT = 64 * KILOBYTE
Target = int | str  # compute capability without its dot, or a gfx name
TARGETS: tuple[Target, ...] = (*SHARED_LIMITS, *AMD_TARGETS)
ALIGNED = [["tt.divisibility", 16]]  # the attribute that Triton's launcher gives to pointers and integers it finds so
MATRIX_INSTRUCTION = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*(?:s8|i8)[\w.:]*")
AMD_INSTRUCTION = re.compile(r"v_(?:wmma_i32|mfma_i32|dot4)\w*")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Need:
    """A row of the report: what a kernel needs on a card."""

    kernel: str  # name of its `Compilable`
    target: Target
    warps: int
    registers: int = 0  # of a thread; the most there can be is 255, on AMD 256, and 512 with 64 threads to a warp
    local_bytes: int = 0  # of a thread outside its registers
    shared_bytes: int = 0  # of a program
    shared_limit: int = 0  # of the card
    instruction: str = ""  # the INT8 matrix instruction, if any; on RDNA 2, which has none, that of four products
    problem: str = ""  # what the compiler said; "" where it succeeded


def compilables(target: Target) -> Iterator[Compilable]:
    """Every kernel that may run on cards of a target; Turing has no bfloat16 units, but stores it and reads it."""
    if isinstance(target, str):
        capability, threads = AMD_TARGETS[target]
        products = matmul.signatures(capability, amd=True)
    else:
        threads, products = WARP, matmul.signatures(divmod(target, 10))
    yield from (*products, *rows.signatures(threads), *heads.signatures(), *q4_k.signatures())


def source_of(compilable: Compilable) -> ASTSource:
    """What Triton compiles, specialised as its launcher would on aligned arguments."""
    constants = dict(compilable.constants)
    parameters = compilable.function.params
    aligned = {
        (p.num,): ALIGNED
        for p in parameters
        if not p.do_not_specialize and compilable.signature.get(p.name, "").startswith(("*", "i32", "i64"))
    }
    signature = {p.name: "constexpr" if p.name in constants else compilable.signature[p.name] for p in parameters}
    return ASTSource(compilable.function, signature, constants, aligned)


def need_of(compilable: Compilable, target: Target) -> Need:
    """Compile one kernel for one target and read what it needs."""
    options = {"num_warps": compilable.warps, "num_stages": compilable.stages, "enable_fp_fusion": compilable.fuses}
    if isinstance(target, str):
        machine, limit = GPUTarget("hip", target, AMD_TARGETS[target][1]), AMD_SHARED_LIMIT
    else:
        machine, limit = GPUTarget("cuda", target, WARP), SHARED_LIMITS[target]
    compiled = triton.compile(source_of(compilable), target=machine, options=options)
    if isinstance(target, str):
        assembly = compiled.asm["amdgcn"]
        registers, local = (amd_number(assembly, name) for name in ("vgpr_count", "private_segment_fixed_size"))
        found = AMD_INSTRUCTION.search(assembly)
    else:
        registers, local = resources(compiled.asm["cubin"])
        found = MATRIX_INSTRUCTION.search(compiled.asm["ptx"])
    return Need(
        kernel=compilable.name,
        target=target,
        warps=compiled.metadata.num_warps,
        registers=registers,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        shared_limit=limit,
        instruction=found[0] if found else "",
    )


def resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, from a binary of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(text)
    if found is None:
        raise RequestError("cuobjdump names no resources", got=text.strip()[:200])
    registers, stack, _, local = map(int, found.groups())
    return registers, stack + local


def amd_number(assembly: str, name: str) -> int:
    """A number out of the metadata of an AMD kernel, which stands behind its code."""
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    if found is None:
        raise RequestError("The assembly names no resources", expected=f".{name}", got=assembly.strip()[-200:])
    return int(found[1])


def report(target: Target, part: int = 0, parts: int = 1, kernel: str = "") -> list[Need]:
    """Every `parts`-th kernel of a target whose name starts so; what does not compile becomes a row as well."""
    needs = []
    named = [compilable for compilable in compilables(target) if compilable.name.startswith(kernel)]
    for compilable in named[part::parts]:
        try:
            needs.append(need_of(compilable, target))
        except (RuntimeError, TritonError) as problem:
            needs.append(Need(compilable.name, target, compilable.warps, problem=str(problem).strip()[-500:]))
    return needs


def check(targets: list[str]) -> list[Target]:
    """Targets by name; all where none is named.

    Raises:
        RequestError: Triton interprets in this process, or a target is not in the table.
    """
    if knobs.runtime.interpret:
        raise RequestError("Kernels are interpreted here, not compiled", do="Unset TRITON_INTERPRET and try again.")
    return [choose({str(known): known for known in TARGETS}, name, "target") for name in targets or map(str, TARGETS)]


def line(need: Need) -> str:
    name = need.target if isinstance(need.target, str) else f"sm_{need.target}"
    if need.problem:
        return f"{name:<7} {need.kernel:<44} {need.problem.splitlines()[-1]}"
    shared = f"{need.shared_bytes / KILOBYTE:5.1f} of {need.shared_limit // KILOBYTE} KB shared"
    used = f"{need.registers:3} registers, {need.local_bytes} B local, {shared}"
    return f"{name:<7} {need.kernel:<44} {need.warps:2} warps, {used}  {need.instruction}".rstrip()


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Capability without its dot, or gfx name; all.")] = None,
    kernel: Annotated[str, typer.Option(help="Only kernels whose names start so.")] = "",
    processes: Annotated[int, typer.Option(help="Compilers side by side.")] = 2,
) -> None:
    """Compile, print, write."""
    try:
        targets = check(target or [])
    except RequestError as problem:
        typer.echo(str(problem), err=True)
        raise typer.Exit(1) from problem
    shares = [(each, part) for each in targets for part in range(processes)]
    needs: list[Need] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for found in pool.map(report, *zip(*shares, strict=True), repeat(processes), repeat(kernel)):
            needs += found
            for need in found:
                typer.echo(line(need))
    if json_file is not None:
        ordered = sorted(needs, key=lambda need: (TARGETS.index(need.target), need.kernel))
        table = {"versions": versions(), "commit": commit(), "rows": [asdict(need) for need in ordered]}
        write_json(json_file, table)
    raise typer.Exit(int(any(need.problem for need in needs)))


if __name__ == "__main__":
    typer.run(main)
