"""Memory tracker: which tensors are alive after every torch operation, and the peak per phase.

    with Ledger() as ledger:
        with ledger.phase("step"):
            ...
    ledger.peaks["step"][device]            what torch.cuda.max_memory_allocated would say

Memory is counted by storages, so views cost nothing and a tensor that several names hold is there once; a storage's end
is seen the moment it comes. Operations that are made of others are taken apart as torch does, and those in
`WHOLE_OPERATORS` are one kernel on CUDA. Under `FakeTensorMode` no memory is needed at all, so a machine without a GPU
counts one with any.

torch's own `MemTracker` does the same for training, by modules. Left out: what kernels take inside (`attention_on` and
`_copy` know of two), and memory that no tensor holds, contexts and libraries' workspaces (planning/footprint.py's
constants).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ideogram_app.planning.activations import CONVOLVES_IN_COPIES

ALLOCATION_ROUNDING = (
    512  # bytes that CUDA's caching allocator hands out at once (kMinBlockSize in CUDACachingAllocator)
)
ATEN, CONTIGUOUS = torch.ops.aten, torch.contiguous_format
# Made of others in torch's tables, one kernel on CUDA: what lies between is never in memory there.
WHOLE_OPERATORS = frozenset(
    (
        ATEN.linear.default,
        ATEN.rms_norm.default,
        ATEN.layer_norm.default,
        ATEN.group_norm.default,
        ATEN.upsample_nearest2d.vec,
    )
)
Attention = Callable[..., Tensor]
Capability = tuple[int, int]
# Heads up to this size keep their sums in registers in PyTorch's memory-efficient kernels; of larger ones the sums lie
# in memory in float32 until they are rounded (kNeedsOutputAccumulatorBuffer in mem_eff_attention/kernel_forward.h).
IN_REGISTERS = 128
LARGEST_FLASH_HEAD = 256  # sdp_utils.cpp


class Ledger(TorchDispatchMode):
    """Counts while it is entered; storages that were made before are unknown to it.

    Args:
        attention: stands for scaled_dot_product_attention, which takes other kernels on other devices; see
            `attention_on`. Counted as torch takes it apart where None.

    Attributes:
        live: bytes by device, now.
        peaks: by phase, then by device.
        events: in their order, for allocator.py: (number of a storage, its device, bytes), 0 bytes where it ended.
    """

    def __init__(self, attention: Attention | None = None) -> None:
        super().__init__()
        self.live: Counter[torch.device] = Counter()
        self.peaks: dict[str, Mapping[torch.device, int]] = {}
        self.events: list[tuple[int, torch.device, int]] = []
        self._attention = attention
        self._highest: list[Counter[torch.device]] = []
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is ATEN.scaled_dot_product_attention.default and self._attention is not None:
            with self:
                return self._attention(*args, **kwargs)
        if func.namespace == "aten" and func not in WHOLE_OPERATORS and func._can_decompose():
            with self:
                answer = func.decompose(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        answer = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(answer):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if CONVOLVES_IN_COPIES and func is ATEN.convolution.default:
            self._copy((*args[:2], answer))
        return answer

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the most that was alive in the body, what was there before it included. Phases may hold others."""
        highest = Counter(self.live)
        self._highest.append(highest)
        try:
            yield
        finally:
            self._highest.remove(highest)
            self.peaks[name] = dict(highest)

    def _copy(self, tensors: tuple[Tensor, ...]) -> None:
        """A workspace on CUDA for these, of 16 bits: there for a moment."""
        device = tensors[-1].device
        if device.type == "cuda" and tensors[-1].dtype != torch.float32:
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._note(torch.empty(size, dtype=torch.uint8, device=device))

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, device = (
            storage._cdata,
            -(-storage.nbytes() // ALLOCATION_ROUNDING) * ALLOCATION_ROUNDING,
            tensor.device,
        )
        if key in self._known or device.type == "meta":
            return
        number = len(self.events)
        self.events.append((number, device, size))
        self.live[device] += size
        for highest in self._highest:
            highest[device] = max(highest[device], self.live[device])

        def ended(_: object) -> None:
            del self._known[key]
            self.live[device] -= size
            self.events.append((number, device, 0))

        self._known[key] = weakref.ref(storage, ended)


def backend_on(capability: Capability, flash: bool, query: Tensor, key: Tensor) -> SDPBackend:
    """What scaled_dot_product_attention without a mask takes on NVIDIA cards of a compute capability.

    FlashAttention where there is one, for heads up to 256; else the memory-efficient kernels, which take any size that
    is a multiple of 8, but no groups of queries, and no bfloat16 before Ampere. Neither ever holds the scores; MATH,
    which is left, does. Read in sdp_utils.cpp.

    Args:
        flash: whether PyTorch was built with it: not on Windows.
    """
    ampere = capability >= (8, 0)
    if flash and ampere and query.shape[-1] <= LARGEST_FLASH_HEAD and query.dtype != torch.float32:
        return SDPBackend.FLASH_ATTENTION
    refused = query.shape[1] > key.shape[1] or (query.dtype == torch.bfloat16 and not ampere)
    return SDPBackend.MATH if refused else SDPBackend.EFFICIENT_ATTENTION


def asked_on(capability: Capability, flash: bool = True) -> Callable[..., SDPBackend]:
    """A stand-in for `kernels.attention.ask`."""
    return lambda query, key, *_: backend_on(capability, flash, query, key)


def attention_on(capability: Capability, flash: bool = True) -> Attention:
    """A stand-in for scaled_dot_product_attention that takes what `backend_on` says, or MATH where there is a mask or
    nothing else was allowed."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **options: Any
    ) -> Tensor:
        causal, scale = bool(options.get("is_causal")), options.get("scale")
        mask = options.get("attn_mask", mask)
        backend = backend_on(capability, flash, query, key)
        only_math = not (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled())
        if backend == SDPBackend.MATH or mask is not None or only_math:
            math = ATEN._scaled_dot_product_attention_math.default
            wide: Tensor = math(query, key, value, mask, 0.0, causal, scale=scale)[0]
            return wide
        if backend == SDPBackend.FLASH_ATTENTION:
            kernel = ATEN._scaled_dot_product_flash_attention.default
            return kernel(query, key, value, 0.0, causal, scale=scale)[0]
        efficient = ATEN._scaled_dot_product_efficient_attention.default
        result: Tensor = efficient(query, key, value, None, False, 0.0, causal, scale=scale)[0]
        if value.shape[-1] > IN_REGISTERS and query.dtype != torch.float32:
            torch.empty(result.shape, dtype=torch.float32, device=result.device)  # beside the result, then gone
        return result

    return attention


class Unguarded(TorchFunctionMode):
    """`x[...]`, `x.contiguous()`, `x.copy_(...)` and enlarging by the operations they stand for.

    torch takes them apart in C++ and makes the tensor's device the current one first, which a build without CUDA
    cannot, be the tensor fake or not.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__:
            view, places = _sliced(*args)
            return ATEN.index.Tensor(view, places) if places else view
        if func is Tensor.__setitem__:
            view, places = _sliced(*args[:2])
            value = args[2] if isinstance(args[2], Tensor) else torch.full((), args[2], dtype=view.dtype)
            return ATEN.index_put_.default(view, places, value) if places else ATEN.copy_.default(view, value)
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else ATEN.clone.default(args[0], memory_format=CONTIGUOUS)
        if func is functional.interpolate:
            side = int(kwargs["scale_factor"]) if kwargs else 1
            return args[0].new_empty((*args[0].shape[:-2], *(side * length for length in args[0].shape[-2:])))
        func = ATEN.copy_.default if func is Tensor.copy_ else func
        return func(*args, **(kwargs or {}))


def _sliced(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """A tensor after all of an index that needs no copy, and what is left of it: a list of places an axis or None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    if any(part is Ellipsis for part in parts):
        place = next(number for number, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    axis, places = 0, list[Tensor | None]()
    for part in parts:
        if isinstance(part, int):
            tensor = tensor.select(axis, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(part, slice):
            tensor = ATEN.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
        else:
            chosen = part if isinstance(part, Tensor) else torch.tensor(part)
            places += [None] * (axis - len(places)) + [chosen.to(tensor.device)]
        axis += 1
    return tensor, places
