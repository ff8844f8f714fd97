"""`python -m ideogram_app check`: the self-check on this machine's device, made anew, as a table or as JSON.

The same check is made by itself before the first picture on a device; this shows it, and makes it again. Exit code 1
where a kernel has no implementation that is right. Left out: speed against other machines, which `benchmark` measures.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ideogram_app.benchmark.command import choose_device
from ideogram_app.cli import flags
from ideogram_app.cli.flags import DATA
from ideogram_app.machine.capabilities import compute_type
from ideogram_app.machine.hardware import detect
from ideogram_app.wire import to_plain

if TYPE_CHECKING:
    from ideogram_app.kernels.self_check_record import Checked, SelfCheck


def check(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or another as torch names it.")] = "auto",
    data: flags.DataFlag = DATA,
    as_json: flags.JsonFlag = False,
) -> None:
    """Try every kernel on this device against its truth, and choose the fastest that is right."""
    from dataclasses import replace

    import torch

    from ideogram_app.kernels.choice import choose_kernels
    from ideogram_app.machine.hardware import compute_capability
    from ideogram_app.model.self_check import check_all

    print("Looking at this machine ...", file=sys.stderr)
    hardware = detect(data)
    chosen = torch.device(choose_device(hardware, device))
    dtype = compute_type(replace(hardware, kind="cpu") if chosen.type == "cpu" else hardware)[0]
    first = choose_kernels(chosen, compute_capability(chosen))[0]
    print(f"Checking {first} kernels in {dtype} ...", file=sys.stderr)
    found = check_all(first, chosen, getattr(torch, dtype), data)
    assert found.check is not None
    print("\n".join(found.notes), file=sys.stderr, end="\n" if found.notes else "")
    if as_json:
        print(json.dumps(to_plain(found.check), indent=2, ensure_ascii=False))
    else:
        print("\n".join(describe(found.check)))
    if any(not row.engaged for row in found.check.kernels):
        raise typer.Exit(1)


def describe(check: SelfCheck) -> list[str]:
    """The device and its versions, then a line for each kernel."""
    known = ", ".join(f"{name} {value}" for name, value in check.versions.items() if value)
    return [f"{check.device}, {check.dtype} ({known})", *(_line(row) for row in check.kernels)]


def _line(row: Checked) -> str:
    from ideogram_app.kernels.self_check import in_ms

    error = "" if row.error is None else f"{row.error:.1e}"
    seconds = in_ms(row.seconds) if row.seconds else ""
    return f"  {row.kernel:<20} {row.engaged or 'NOTHING':<16} {error:>8} {seconds:>9}  {row.reason}".rstrip()
