"""`python -m ideogram_app receipts add FILE ...`: strangers' measurements into one folder, and the table of them.

Left out: fetching. A receipt comes as a file, in an issue or a mail; what it says is shown and never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ideogram_app.benchmark.receipts import add, flags, read_all, read_receipt, table
from ideogram_app.errors import RequestError

FOLDER = Path("benchmarks/receipts")


def receipts(
    action: Annotated[str, typer.Argument(help="add: check receipts and keep them; show: print the table.")],
    files: Annotated[list[Path] | None, typer.Argument(help="Receipts, as --receipt wrote them.")] = None,
    folder: Annotated[Path, typer.Option(help="Where receipts are kept.")] = FOLDER,
) -> None:
    """Put measurements of other machines into one table; what makes times hard to compare stands beside them."""
    if action not in ("add", "show"):
        raise RequestError("Receipts can be added or shown", expected="add or show", got=f"{action!r:.40}")
    if action == "add" and not files:
        raise RequestError("No receipt was named", expected="receipts add FILE")
    for file in files or []:
        kept = add(file, folder) if action == "add" else file
        about = "; ".join(flags(read_receipt(kept)))
        print(f"{kept}{f': {about}' if about else ''}")
    if not files:
        print("\n".join(table(read_all(folder))))
