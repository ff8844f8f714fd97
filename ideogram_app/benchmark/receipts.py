"""Receipts: what one machine measured, in one JSON that strangers can send and anybody can put into one table.

    receipt = receipt_of_benchmark(found, kernels, read_clocks())     or receipt_of_comparison
    write_receipt(path, receipt)
    add(path, folder)                   read, checked and copied to the folder under a name of its own

A receipt holds the card, its driver, clocks and power, versions, a hash of the kernels, what was asked for and what
ran, what was predicted and what was measured. It holds no caption, no picture, no path and no name of another program.
Its digest shows that a byte was changed on the way or by hand; it does not prove who measured. Reading one runs nothing
of it: it is data of known types, of bounded length, and shown as text.

Left out: signatures, and judging a number. What makes rows hard to compare is flagged beside them (`flags`).
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ideogram_app.benchmark.report import Benchmark
from ideogram_app.comparison.history import Comparison
from ideogram_app.errors import RequestError
from ideogram_app.files import hash_sources, write_text
from ideogram_app.machine.clocks import Clocks
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.versions import commit
from ideogram_app.records import Result
from ideogram_app.text import duration, gb
from ideogram_app.wire import from_json, to_json, to_plain

LONGEST = 1_000_000  # bytes of a receipt: the longest of ours has 9000
LONGEST_WORD = 200  # characters of a text in it
KERNELS = Path(__file__).resolve().parents[1] / "kernels"


@dataclass(frozen=True)
class ReceiptMachine:
    """Of `Hardware` what a time depends on; nothing that says whose machine it is."""

    kind: str
    name: str
    compute_capability: tuple[int, int] | None
    device_memory_bytes: int | None
    device_count: int
    host_memory_bytes: int | None
    cpu_name: str
    cpu_cores: int | None
    driver: str
    os: str


@dataclass(frozen=True)
class ReceiptRow:
    """One recipe: asked for and run, predicted and measured. Seconds, bytes; None: not known."""

    requested: str
    engaged: str
    width: int
    height: int
    steps: int
    seconds_per_step: float | None
    predicted_seconds_per_step: float | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    residency: str = ""
    arithmetic: str = ""
    kernels: str = ""
    note: str = ""


@dataclass(frozen=True)
class Receipt:
    """One session on one machine.

    Attributes:
        kind: benchmark (random weights, steps alone) or comparison (pictures).
        model: its name, or the shape of a benchmark.
        weights: recipe -> what identifies its weights (`manifest.fingerprint`); empty in a benchmark: random ones.
        kernels: hash of the sources of the kernels (`kernels_hash`).
        others: other programs that held memory of the card.
        digest: SHA-256 of all the rest.
    """

    kind: str
    machine: ReceiptMachine
    versions: dict[str, str]
    commit: str
    model: str
    weights: dict[str, str]
    kernels: str
    clocks: Clocks | None
    others: int
    rows: tuple[ReceiptRow, ...]
    digest: str = ""


def kernels_hash() -> str:
    """SHA-256 of the kernels' sources, the first 16 digits: times of other kernels are other times."""
    return hash_sources(KERNELS, [KERNELS])


def digest_of(receipt: Receipt) -> str:
    """SHA-256 of a receipt without its digest, as canonical JSON."""
    plain = to_plain(replace(receipt, digest=""))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def receipt_of_benchmark(found: Benchmark, clocks: Clocks | None) -> Receipt:
    """Of a session of the benchmark; rows of stock diffusers are among them."""
    rows = [
        ReceiptRow(
            requested=row.name,
            engaged=row.recipe,
            width=found.size[0],
            height=found.size[1],
            steps=row.steps,
            seconds_per_step=row.ms_per_step / 1e3,
            peak_bytes=row.peak_memory_bytes,
            residency="resident",
            note=row.note,
        )
        for row in found.rows
    ]
    return _sealed("benchmark", found.hardware, found.versions, found.shape, {}, clocks, rows)


def receipt_of_comparison(found: Comparison, weights: dict[str, str], clocks: Clocks | None) -> Receipt:
    """Of pictures that were drawn, failed ones included."""
    versions = next((result.versions for result in found.results if result.versions), {})
    rows = [_row(result, found) for result in found.results]
    return _sealed("comparison", found.hardware, versions, found.request.model, weights, clocks, rows)


def _row(result: Result, found: Comparison) -> ReceiptRow:
    on_device = result.peak_device_bytes is not None
    planned = found.plan.predicted.seconds_per_step if found.plan.recipe == result.engaged else None
    return ReceiptRow(
        requested=result.recipe,
        engaged=result.engaged,
        width=result.width,
        height=result.height,
        steps=result.steps,
        seconds_per_step=result.seconds_per_step,
        predicted_seconds_per_step=planned,
        peak_bytes=result.peak_memory_bytes,
        predicted_peak_bytes=result.predicted_device_bytes if on_device else result.predicted_host_bytes,
        residency=result.residency,
        arithmetic=result.arithmetic,
        kernels=result.kernels[:LONGEST_WORD],
        note="failed" if result.error else "",
    )


def _sealed(
    kind: str,
    hardware: Hardware,
    versions: dict[str, str],
    model: str,
    weights: dict[str, str],
    clocks: Clocks | None,
    rows: Iterable[ReceiptRow],
) -> Receipt:
    names = ReceiptMachine.__dataclass_fields__
    machine = ReceiptMachine(**{name: getattr(hardware, name) for name in names})
    receipt = Receipt(
        kind=kind,
        machine=machine,
        versions=versions,
        commit=commit(),
        model=model,
        weights=weights,
        kernels=kernels_hash(),
        clocks=clocks,
        others=len(hardware.device_users),
        rows=tuple(rows),
    )
    return replace(receipt, digest=digest_of(receipt))


def write_receipt(path: Path, receipt: Receipt) -> None:
    """One JSON file, atomically."""
    write_text(path, to_json(receipt) + "\n")


def read_receipt(path: Path) -> Receipt:
    """A receipt that is whole.

    Raises:
        RequestError: it cannot be read, is none, is too long, or something in it was changed.
    """
    try:
        raw = path.read_bytes()[: LONGEST + 1]
        text = raw.decode("utf-8")
    except OSError as problem:
        raise RequestError(f"The receipt {path.name} cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise RequestError(f"The receipt {path.name} is not UTF-8 text") from problem
    if len(raw) > LONGEST:
        raise RequestError(f"The receipt {path.name} is too long", expected=f"at most {LONGEST} bytes")
    receipt = from_json(Receipt, text)
    expected = digest_of(receipt)
    if receipt.digest != expected:
        raise RequestError(
            f"The receipt {path.name} was changed after it was written",
            expected=expected[:16],
            got=receipt.digest[:16],
            do="Ask for the file as the program wrote it",
        )
    return receipt


def flags(receipt: Receipt) -> tuple[str, ...]:
    """What keeps its times from being compared with others', a few words each."""
    said = []
    clocks = receipt.clocks
    if clocks and clocks.held_down_by:
        said.append(f"throttled ({', '.join(clocks.held_down_by)})")
    if clocks and clocks.limit_watts and clocks.default_limit_watts and clocks.limit_watts < clocks.default_limit_watts:
        said.append(f"limited to {clocks.limit_watts:.0f} of {clocks.default_limit_watts:.0f} W")
    if receipt.others:
        said.append(f"shared with {receipt.others} other program{'s' if receipt.others > 1 else ''}")
    if receipt.kernels != kernels_hash():
        said.append("other kernels than this version's")
    return tuple(said)


def add(path: Path, folder: Path) -> Path:
    """Copy a receipt into a folder under the name of its card and its digest; the same one twice is one file.

    Raises:
        RequestError: as `read_receipt`.
    """
    receipt = read_receipt(path)
    words = re.findall(r"[a-z0-9]+", receipt.machine.name.lower())[:8] or ["unknown"]
    target = folder / f"{'-'.join(words)}-{receipt.digest[:8]}.json"
    write_receipt(target, receipt)
    return target


def read_all(folder: Path) -> list[Receipt]:
    """The receipts of a folder, by card and model. Raises RequestError: as `read_receipt`."""
    found = [read_receipt(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda receipt: (receipt.machine.name, receipt.model, receipt.digest))


def table(receipts: Iterable[Receipt]) -> list[str]:
    """Rows of a table in Markdown: card, what ran, seconds and bytes beside what was predicted, flags."""
    lines = [
        "| card | driver, torch | model | recipe | ran | a step | predicted | peak | predicted | to know |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for receipt in receipts:
        torch = receipt.versions.get("torch", "")
        about = "; ".join(flags(receipt))
        for row in receipt.rows:
            cells = (
                receipt.machine.name,
                ", ".join(filter(None, (receipt.machine.driver, torch))),
                f"{receipt.model}, {row.width} x {row.height}",
                row.requested,
                " ".join(filter(None, (row.engaged, row.residency, row.arithmetic, row.note))),
                _seconds(row.seconds_per_step),
                _seconds(row.predicted_seconds_per_step),
                _bytes(row.peak_bytes),
                _bytes(row.predicted_peak_bytes),
                about,
            )
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _seconds(value: float | None) -> str:
    return "–" if value is None else duration(value)


def _bytes(value: int | None) -> str:
    return "–" if value is None else gb(value)


def _cell(text: str) -> str:
    """Text of a stranger as text: no mark-up, no new cell, no new line, nothing endless."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)[:LONGEST_WORD]
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(plain, quote=False))
