"""What the services on this machine hand from one picture to the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ideogram_app.comparison import compare as comparing
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.generation.session import Session
from ideogram_app.planning.lost_device import LostDevice
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.records import Event, Request
from ideogram_app.studio.local_backend import LocalBackend
from tests.fake_backend import MACHINE
from tests.plan_by_name import planned


def test_a_device_that_one_comparison_lost_is_lost_to_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sessions: list[Session] = []

    def compare(_: PlannedRequest, session: Session) -> Iterator[Event]:
        sessions.append(session)
        session.lose(LostDevice("cuda", "CUDA error: unspecified launch failure"), ["cuda", "cpu"])
        yield Event("done")

    monkeypatch.setattr(comparing, "compare", compare)
    backend, request = LocalBackend(tmp_path), planned(Request("miniature", wrap_plain("a red circle")), MACHINE)
    for _ in range(2):
        list(backend.compare(request, tmp_path))
    first, second = sessions
    assert first is not second and second.lost_among(["cuda:0"]) and second.lost_among(["cpu"]) is None
    assert second.cache is first.cache and second.features is first.features
