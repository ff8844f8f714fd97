"""Filling a module built on the meta device: a tensor by its name, an error where one is missing.

transformers and diffusers fill theirs while they load their own files. Left out: which tensor is whose (assemble.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from torch import Tensor, nn

from ideogram_app.errors import CheckpointError

Filled = TypeVar("Filled", bound=nn.Module)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor the buffer of that name, where there is one, else the parameter."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._buffers:
        holder.register_buffer(leaf, value)
    else:
        setattr(holder, leaf, nn.Parameter(value, requires_grad=False))


def finished(module: Filled, what: str, offloaded: Collection[str] = ()) -> Filled:
    """The module, ready to run; the error calls it `what`. Tensors of offloaded submodules may be missing.

    Raises:
        CheckpointError: a tensor is still on the meta device; names the first.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    holes = [name for name, tensor in tensors if tensor.is_meta and name.rpartition(".")[0] not in offloaded]
    if holes:
        raise CheckpointError(f"{what} was left with {len(holes)} holes", got=f"first {holes[0]}")
    return module.eval().requires_grad_(False)
