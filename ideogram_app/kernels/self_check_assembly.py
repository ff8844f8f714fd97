"""Assembly of one `Kernels` from the implementations that a self-check found right, with a name that says what and why.

    triton; matmul by torch (triton is wrong: 3 of 9 numbers differ, in row 2)

What no row speaks of is the first set's. Left out: deciding (self_check.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ideogram_app.kernels.contract import InputFormat, Kernels
from ideogram_app.kernels.self_check_record import Checked
from ideogram_app.kernels.self_check_trial import told
from ideogram_app.text import listed

log = logging.getLogger(__name__)

BY_FORMAT = ("norm", "add_norm", "swiglu", "quantize")  # their last argument is the input format
EVERYWHERE = {*BY_FORMAT, "add", "heads"} - {"quantize"}  # what every recipe runs
Build = Callable[[str], Any]


def assembled(rows: Sequence[Checked], names: Sequence[str], build: Build) -> Kernels:
    """The kernels that the rows name; where they say nothing, or nothing is right, the first or the last of `names`."""
    first = _buildable(names, build)
    chosen = {row.kernel: row.engaged or names[-1] for row in rows}
    if all(name == names[0] for name in chosen.values()):
        return first
    made: dict[str, Any] = {}
    for part in BY_FORMAT:
        forms = {key.partition(", ")[2]: name for key, name in chosen.items() if key.partition(", ")[0] == part}
        if any(name != names[0] for name in forms.values()):
            made[part] = _by_format({form: getattr(build(name), part) for form, name in forms.items()}, first, part)
    for kernel, name in chosen.items():
        if kernel == "matmul":  # the weight is in the order that the product wants
            made |= {"matmul": build(name).matmul, "weight": build(name).weight}
        elif kernel in ("add", "heads", "decode", "decode_int8"):
            made[kernel] = getattr(build(name), kernel)
    made["name"] = _named(first.name, rows, names)
    sets = {id(each): each for each in (first, *map(build, chosen.values()))}
    return replace(first, release_scratch=lambda: _release(list(sets.values())), **made)


def _buildable(names: Sequence[str], build: Build) -> Kernels:
    """The first set that can be built at all; plain torch always can."""
    for name in names[:-1]:
        try:
            made: Kernels = build(name)
        except Exception as problem:  # noqa: BLE001 (as above)
            log.warning("The kernels %s cannot be used: %s", name, told(problem))
            continue
        return made
    last: Kernels = build(names[-1])
    return last


def _by_format(parts: Mapping[str, Callable[..., Any]], first: Kernels, part: str) -> Callable[..., Any]:
    """One function of several, each for an input format; formats that were not checked have the first set's."""

    def dispatched(*arguments: Any) -> Any:
        input_format: InputFormat = arguments[-1]
        return parts.get(input_format, getattr(first, part))(*arguments)

    return dispatched


def _release(sets: Sequence[Kernels]) -> None:
    for each in sets:
        each.release_scratch()


def _named(first: str, rows: Sequence[Checked], names: Sequence[str]) -> str:
    """For reports: the set, then what was replaced, by what and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.engaged != names[0]:
            groups.setdefault((row.engaged or names[-1], row.reason), []).append(row.kernel)
    replaced = {kernel.partition(", ")[0] for kernels in groups.values() for kernel in kernels}
    if (
        len({name for name, _ in groups}) == 1
        and replaced >= EVERYWHERE
        and len(rows) == sum(map(len, groups.values()))
    ):
        name, why = next(iter(groups))
        return f"{name} in place of {names[0]} ({why})"
    said = [f"{listed(kernels)} by {name} ({why})" for (name, why), kernels in groups.items()]
    return "; ".join([first, *said])
