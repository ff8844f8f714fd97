"""Offload: blocks that live in RAM or on disk and are copied to the device ahead of their use."""
