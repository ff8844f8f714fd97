"""FP8 on devices whose torch has no float8: codes moved as bytes, widened by a table of 256 numbers.

    code (uint8)  s eeee fff      table[code] = (-1)^s * 1.fff * 2^(eeee - 7), equal to the cast bit for bit

torch 2.13 knows no float8 on Metal (pytorch #148420; merged after it, #194074): a cast, a copy to the device or a sum
raises TypeError there, while a view of bytes is a view on every device. So the dtype stays what files and layers say,
and only what computes goes by the bytes. Shifting bits into a float32, as kernels do, is left out: Metal flushes the
subnormal numbers that this passes through.
"""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT8 = ("mps",)  # types of devices on which torch 2.13 neither copies nor converts float8
LOOKED_UP_AT_ONCE = 2**22  # codes: torch looks up by INT32 numbers, 17 MB of them at a time


def has_float8(device: torch.device) -> bool:
    """Whether torch converts float8 on a device."""
    return device.type not in WITHOUT_FLOAT8


def widened(values: Tensor) -> Tensor:
    """INT8 or float8_e4m3fn values, any shape and device -> float32, exact."""
    if values.dtype != torch.float8_e4m3fn or has_float8(values.device):
        return values.float()
    return looked_up(values.view(torch.uint8))


def looked_up(codes: Tensor) -> Tensor:
    """Codes of float8_e4m3fn, uint8 of any shape and device -> the numbers that they stand for, float32."""
    # On the host, where the type is known; 1 kB to the device. Not cached: it would outlive a fake or freed device.
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(codes.device)
    found = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat = codes.reshape(-1)
    for part, into in zip(flat.split(LOOKED_UP_AT_ONCE), found.view(-1).split(LOOKED_UP_AT_ONCE), strict=True):
        torch.index_select(table, 0, part.int(), out=into)
    return found


def narrowed(numbers: Tensor) -> Tensor:
    """float32 of magnitudes up to 448 -> float8_e4m3fn on the same device, rounded as torch's cast does."""
    if has_float8(numbers.device):
        return numbers.to(torch.float8_e4m3fn)
    return moved(numbers.cpu().to(torch.float8_e4m3fn), numbers.device)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor.to(device)` that takes float8 along as bytes."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.to(device)
    return tensor.view(torch.uint8).to(device).view(torch.float8_e4m3fn)
