"""Sizes of the pinned buffers and of the prefetch between files and a device; no torch.

The reader (checkpoints/prefetch.py) works with them and the plan counts them, so they stand where both may look.
"""

from __future__ import annotations

CHUNK = 2**24  # bytes read at once, and the size of a buffer
BUFFERS = 4  # one is filled, one is copied, two wait: 64 MB of pinned memory
AHEAD = 2**28  # bytes that are read before they are taken; a larger tensor is prefetched alone
