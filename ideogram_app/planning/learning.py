"""What this machine has shown of itself: asked for before a plan is made, added to after a picture was drawn.

    learning = Learning(data)
    plan(PlanInputs.of(hardware, model, known=learning.known(hardware)))
    learning.note(hardware, Observed(...))

A graphics card is measured once, for two seconds, when it is first seen with room to do so; every picture drawn whole
says how near a step came to that. Both are kept in the data folder (planning/profile.py). A folder that cannot be
written to is no reason not to draw. Left out: measuring processors, whose pictures say it, and forgetting.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.profile import FILE, MachineProfile, Observation, key, learn, read, remember_measured, write

log = logging.getLogger(__name__)

PROBED = ("cuda", "rocm")
ROOM_TO_PROBE = 2_000_000_000  # bytes of free device memory: the probe's operands, results and copies take 1


class ProfileStore:
    """One machine's memory in a folder."""

    def __init__(self, data: Path) -> None:
        self._data, self._file = data, data / FILE
        self._refused: set[str] = set()  # names of machines that could not be measured; not tried again

    def known(self, hardware: Hardware) -> MachineProfile | None:
        """What is remembered of a machine; a card is measured first where it never was."""
        name = key(hardware.name, hardware.torch)
        known = read(self._file, name)
        if known is not None and known.measured is not None:
            return known
        if not _can_be_probed(hardware) or name in self._refused:
            return known
        from ideogram_app.machine.microbench import probe

        try:
            import torch

            from ideogram_app.machine.meter import release

            device = torch.device("cuda:0")
            known = remember_measured(known, probe(device, self._data))
            release(device)
        except RuntimeError:  # the device is busy or broken; what it can do will be seen when it draws
            log.warning("%s could not be measured", hardware.name, exc_info=True)
            self._refused.add(name)
            return known
        self._write(name, known)
        return known

    def note(self, hardware: Hardware, seen: Observation) -> None:
        """A picture was drawn."""
        name = key(hardware.name, hardware.torch)
        before = read(self._file, name)
        after = learn(before, hardware.name, seen)
        if after != before:
            self._write(name, after)

    def _write(self, name: str, known: MachineProfile) -> None:
        try:
            write(self._file, name, known)
        except OSError as problem:
            log.warning("%s could not be written: %s", self._file, problem)


def _can_be_probed(hardware: Hardware) -> bool:
    has_room = (hardware.device_free_bytes or 0) > ROOM_TO_PROBE
    return hardware.kind in PROBED and has_room and hardware.torch_supports_device is not False
