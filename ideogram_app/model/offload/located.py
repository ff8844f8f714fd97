"""Where the large tensors of a block lie in its recipe's file, so that they can be read again instead of being kept.

A merged layer's weight is the rows of its parts one below another, so it is a list of spans. Scales, norms and biases
are small, may be computed (a Q4_K row's INT8 scale is), and are kept. Left out: sources in other layouts than the
program's own files; nothing large is ever drawn from those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ideogram_app.checkpoints.prepared.storage import PackedBranch
from ideogram_app.checkpoints.span import Span


def located(file: PackedBranch, module: nn.Module, linears: Mapping[str, Sequence[str]]) -> dict[str, tuple[Span, ...]]:
    """For every weight of a module the spans that it is made of, by the weight's name in the module.

    Args:
        linears: by the path of a layer, the Linears of the file that are merged into it, the first on top.
    """
    found = {}
    for path, names in linears.items():
        spans = deque(span for name in names for span in file.weight_spans(name))
        for inner, layer in module.get_submodule(path).named_modules(prefix=path):
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor):
                continue  # the frame around layers that stand side by side
            taken: list[Span] = []
            while sum(span.shape[0] for span in taken) < len(weight):
                taken.append(spans.popleft())
            found[f"{inner}.weight"] = tuple(taken)
    return found
