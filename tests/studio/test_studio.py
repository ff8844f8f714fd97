"""The worker: its queue, stopping, failures, what watchers see, and what stays on disk."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CalledProcessError

import pytest

from ideogram_app.catalog.presets import find_preset
from ideogram_app.comparison.history import read_history
from ideogram_app.errors import DeviceError, RequestError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.hub.access import Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.records import Event, Request
from ideogram_app.studio.state import Job, State
from ideogram_app.studio.studio import Studio
from tests.fake_backend import SOURCE_BYTES, Fake
from tests.waiting import LIMIT, wait_until

REQUEST = Request("miniature", wrap_plain("a red circle"), ("reference", "int8-w8a8"), "turbo-12", 128, 128, 7)
SOON = LIMIT


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def studio(fake: Fake, tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(fake, tmp_path / "outputs")
    studio.start()
    yield studio
    fake.let_pass()
    studio.close()


def until(studio: Studio, test: Callable[[State], object]) -> State:
    """A state for which the test holds, once there is one."""
    return wait_until(lambda: state if test(state := studio.watch(-1, 0)) else None, what="a state")


def finish(studio: Studio, request: Request = REQUEST) -> Job:
    return studio.wait(studio.submit_compare(request), SOON)


def test_the_machine_and_every_plan_are_known_after_the_start(studio: Studio) -> None:
    machine = until(studio, lambda state: state.machine).machine
    assert machine and machine.plans["miniature"].fits and not machine.plans["ideogram-4"].fits


@pytest.mark.parametrize("somebody", ["wakes", "watches", "submits", "closes"])
def test_a_worker_that_holds_back_begins_when_somebody_waits_for_it(tmp_path: Path, somebody: str) -> None:
    order: list[str] = []

    class Watched(Fake):
        def detect(self) -> Hardware:
            order.append("looks")
            return super().detect()

    class Held(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            held.append(timeout)
            return super().wait(timeout)

    studio, held = Studio(Watched(), tmp_path), list[float | None]()
    studio._awake = Held()
    studio.start(grace=3600)
    assert wait_until(lambda: held) == [3600] and order == []
    order.append(somebody)
    if somebody == "closes":
        studio.close()
        assert order == ["closes"] and not studio._thread.is_alive()
        return
    {"wakes": studio.wake, "watches": lambda: studio.watch(-1, 0), "submits": lambda: finish(studio)}[somebody]()
    until(studio, lambda state: state.machine)
    studio.close()
    assert order[:2] == [somebody, "looks"]


def test_a_comparison_prepares_what_is_missing_and_keeps_the_order_asked(studio: Studio, fake: Fake) -> None:
    job = finish(studio, replace(REQUEST, recipes=("gguf-q4_k", "reference")))
    assert job.state == "done" and [result.recipe for result in job.results] == ["gguf-q4_k", "reference"]
    assert ("miniature", "gguf-q4_k") in fake.prepared
    assert all(Path(result.image or "").is_file() for result in job.results)


def test_stop_acts_within_one_step_and_closes_the_iterator(studio: Studio, fake: Fake) -> None:
    fake.hold(2)
    job_id = studio.submit_compare(replace(REQUEST, recipes=("reference",), preset="quality-48"))
    wait_until(lambda: len(fake.steps_done) == 2)
    studio.stop()
    fake.let_pass()
    job = studio.wait(job_id, SOON)
    assert job.state == "stopped" and job.error == ""
    assert len(fake.steps_done) <= 3 and fake.closed == 1


def test_what_was_drawn_before_a_stop_is_kept(studio: Studio, fake: Fake) -> None:
    fake.prepared.add(("miniature", "int8-w8a8"))
    fake.hold(find_preset(REQUEST.preset).steps)  # those of the first picture
    job_id = studio.submit_compare(REQUEST)
    until(studio, lambda state: state.job and state.job.results)
    studio.stop()
    fake.let_pass()
    job = studio.wait(job_id, SOON)
    assert job.state == "stopped" and len(job.results) == 1
    assert studio.entry(job.entry or "").comparison.results == job.results


def test_nothing_drawn_leaves_no_folder(studio: Studio, fake: Fake) -> None:
    fake.hold(1)
    job_id = studio.submit_compare(replace(REQUEST, recipes=("reference",)))
    wait_until(lambda: fake.steps_done)
    studio.stop()
    fake.let_pass()
    studio.wait(job_id, SOON)
    assert list(studio.output.iterdir()) == []


def test_jobs_wait_their_turn_and_a_waiting_one_can_be_taken_out(studio: Studio, fake: Fake) -> None:
    fake.hold()
    first, second, third = (studio.submit_compare(replace(REQUEST, seed=seed)) for seed in range(3))
    studio.stop(second)
    assert studio.wait(second, SOON).state == "stopped"
    fake.let_pass()
    assert studio.wait(first, SOON).state == "done" and studio.wait(third, SOON).state == "done"
    assert len(studio.state.history) == 2


def test_a_recipe_that_fails_leaves_the_others(studio: Studio, fake: Fake) -> None:
    fake.broken, fake.unpreparable = {"int8-w8a8"}, {"gguf-q4_k"}
    job = finish(studio, replace(REQUEST, recipes=("reference", "int8-w8a8", "gguf-q4_k")))
    errors = {result.recipe: result.error for result in job.results}
    assert job.state == "done" and errors["reference"] is None
    assert "out of memory" in (errors["int8-w8a8"] or "") and "disk is full" in (errors["gguf-q4_k"] or "")


def test_a_recipe_that_cannot_be_prepared_for_whatever_reason_leaves_the_others(
    studio: Studio, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = fake.prepare

    def broken(model: str, recipe: str) -> Iterator[Event]:
        if recipe == "int8-w8a8":
            raise CalledProcessError(1, ["gcc"])
        return prepare(model, recipe)

    monkeypatch.setattr(fake, "prepare", broken)
    job = finish(studio, replace(REQUEST, recipes=("reference", "int8-w8a8", "gguf-q4_k")))
    errors = {result.recipe: result.error for result in job.results}
    assert job.state == "done" and errors["reference"] is None and errors["gguf-q4_k"] is None
    assert "CalledProcessError" in (errors["int8-w8a8"] or "")


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk filled up"),
        (TypeError("a bug"), "TypeError: a bug"),
    ],
    ids=["full disk", "bug"],
)
def test_what_was_drawn_is_kept_where_the_contact_sheet_cannot_be_written(
    problem: Exception, word: str, studio: Studio, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise problem

    monkeypatch.setattr(fake, "write_sheet", broken)
    job = finish(studio)
    assert job.state == "failed" and word in job.error
    assert studio.entry(job.entry or "").comparison.results == job.results and len(studio.state.history) == 1
    assert all(result.image for result in job.results)


def test_what_was_drawn_before_a_bug_is_kept_and_the_bug_is_the_one_told(
    studio: Studio, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = fake.compare

    def broken(planned: PlannedRequest, output: Path) -> Iterator[Event]:
        for event in draw(planned, output):
            yield event
            if event.result:
                raise ZeroDivisionError("by nought")

    def unwritable(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fake, "compare", broken)
    monkeypatch.setattr(fake, "write_sheet", unwritable)
    job = finish(studio)
    assert job.state == "failed" and "ZeroDivisionError: by nought" in job.error
    assert len(studio.entry(job.entry or "").comparison.results) == len(job.results) == 1


@pytest.mark.parametrize(
    ("problem", "word"),
    [(MemoryError(), "RAM ran out"), (RuntimeError("CUDA error: unspecified launch failure"), "restart the program")],
    ids=["memory", "device"],
)
def test_a_job_that_ends_for_want_of_memory_or_of_its_device_is_no_bug(
    problem: Exception, word: str, studio: Studio, fake: Fake
) -> None:
    fake.bug = problem
    job = finish(studio)
    assert job.state == "failed" and word in job.error and "bug" not in job.error


def test_when_nothing_can_be_prepared_the_job_fails_with_the_reason(studio: Studio, fake: Fake) -> None:
    fake.unpreparable = {"gguf-q4_k"}
    job = finish(studio, replace(REQUEST, recipes=("gguf-q4_k",)))
    assert job.state == "failed" and "disk is full" in job.error


def test_a_bug_is_named_and_the_worker_survives(studio: Studio, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake.bug = ZeroDivisionError("by nought")
    job = finish(studio)
    assert job.state == "failed" and "ZeroDivisionError: by nought" in job.error
    assert "Traceback" in caplog.text
    fake.bug = None
    assert finish(studio).state == "done"


def test_what_cannot_be_drawn_is_refused_at_once(studio: Studio) -> None:
    until(studio, lambda state: state.machine)
    for wrong in (
        replace(REQUEST, width=130),
        replace(REQUEST, preset="fast"),
        replace(REQUEST, recipes=()),
        replace(REQUEST, recipes=("nf4",)),
        replace(REQUEST, seed=-1),
        replace(REQUEST, model="sdxl"),
    ):
        with pytest.raises(RequestError):
            studio.submit_compare(wrong)
    with pytest.raises(DeviceError, match="cannot run on this machine"):
        studio.submit_compare(replace(REQUEST, model="ideogram-4", width=1024, height=1024))
    assert studio.state.job is None


def test_preparing_tells_bytes_and_ends_ready(studio: Studio, fake: Fake) -> None:
    seen: list[int] = []
    job_id = studio.submit_prepare("miniature", ("fp8",))
    state = studio.state
    while not studio.wait(job_id, 0).is_over:
        state = studio.watch(state.version, 1.0)
        if state.job and state.job.stage:
            seen.append(state.job.stage.done)
    assert seen == sorted(seen) and studio.wait(job_id).state == "done"
    assert studio.state.statuses["miniature"]["fp8"].state == "ready"


def test_the_history_survives_a_restart_even_where_the_folder_has_moved(
    studio: Studio, fake: Fake, tmp_path: Path
) -> None:
    finish(studio)
    second = finish(studio, replace(REQUEST, seed=8))
    saved = json.loads((studio.output / (second.entry or "") / "comparison.json").read_text(encoding="utf-8"))
    assert [row["image"] for row in saved["results"]] == ["reference.png", "int8-w8a8.png"]
    studio.output.rename(tmp_path / "moved")
    again = Studio(fake, tmp_path / "moved")
    seeds = [entry.comparison.request.seed for entry in again.state.history]
    assert sorted(seeds) == [7, 8]
    assert all(Path(r.image or "").is_file() for entry in again.state.history for r in entry.comparison.results)


def test_broken_folders_and_strange_names_are_no_history(tmp_path: Path) -> None:
    for name, text in (("20260101-000000-aaaa", "{"), ("20260101-000000-bbbb", '{"request": 1}'), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(text, encoding="utf-8")
    assert list(read_history(tmp_path)) == []


def test_names_from_outside_do_not_leave_the_folder(studio: Studio) -> None:
    finish(studio)
    for name in ("..", "../outputs", "", "/etc", "20260101-000000-zzzz"):
        with pytest.raises(RequestError):
            studio.entry(name)


def test_a_lost_picture_says_so(studio: Studio) -> None:
    job = finish(studio)
    Path(job.results[0].image or "").unlink()
    first, second = studio.entry(job.entry or "").comparison.results
    assert first.image is None and "no longer" in (first.error or "") and second.image


def test_watchers_are_woken_and_previews_are_dropped_at_the_end(studio: Studio, fake: Fake) -> None:
    fake.prepared.add(("miniature", "int8-w8a8"))
    fake.hold(3)  # the third step shows one
    previews: list[bool] = []

    def watch() -> None:
        version = -1
        while True:
            state = studio.watch(version, 5.0)
            version = state.version
            if state.job and state.job.is_over:
                return
            if state.job:
                previews.append(any(event.preview for event in state.job.progress.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    job_id = studio.submit_compare(REQUEST)
    wait_until(lambda: any(previews))
    fake.let_pass()
    job = studio.wait(job_id, SOON)
    watcher.join(SOON)
    assert not watcher.is_alive()
    assert not any(event.preview for event in job.progress.values())


def test_closing_stops_the_running_job(fake: Fake, tmp_path: Path) -> None:
    fake.hold(1)
    studio = Studio(fake, tmp_path)
    studio.start()
    studio.submit_compare(replace(REQUEST, recipes=("reference",)))
    wait_until(lambda: fake.steps_done)
    studio.close(timeout=0)  # the step it is in does not end yet
    fake.let_pass()
    studio.close(timeout=SOON)
    assert fake.closed >= 1 and studio.state.job and studio.state.job.state == "stopped"


def prepared(studio: Studio, fake: Fake, recipe: str) -> tuple[Job, list[tuple[str, int]]]:
    """Fetch and make a recipe of the published model: the job, and phase and bytes of every stage on the way."""
    seen: list[tuple[str, int]] = []
    fake.hold()
    job_id, version = studio.submit_prepare("ideogram-4", (recipe,)), -1
    while not studio.wait(job_id, 0).is_over:
        state = studio.watch(version, 1.0)
        version = state.version
        stage = state.job.stage if state.job and state.job.id == job_id else None
        if stage and (stage.phase, stage.done) not in seen:
            seen.append((stage.phase, stage.done))
            fake.let_pass(1)
    fake.let_pass()
    return studio.wait(job_id), seen


def test_published_weights_are_fetched_and_prepared_in_one_job(studio: Studio, fake: Fake) -> None:
    job, seen = prepared(studio, fake, "int8-w8a8")
    phases, state = [phase for phase, _ in seen], studio.state
    assert phases == sorted(phases) and set(phases) == {"fetch", "prepare"}  # the first comes first in the alphabet
    assert job.state == "done" and state.sources["ideogram-4"].state == "complete"
    assert state.statuses["ideogram-4"]["int8-w8a8"].usable
    assert state.machine and state.machine.plans["ideogram-4"].predicted.download_bytes == SOURCE_BYTES


def test_a_dropped_line_keeps_its_reason_and_the_next_press_goes_on_there(studio: Studio, fake: Fake) -> None:
    until(studio, lambda state: "miniature" in state.sources)
    fake.line_breaks_at = 0.5
    job = studio.wait(studio.submit_prepare("ideogram-4", ("gguf-q4_k",)), SOON)
    assert job.state == "failed" and "cannot be reached" in job.error
    begun = studio.state.sources["ideogram-4"]
    assert begun.state == "partial" and 0.4 < begun.bytes / SOURCE_BYTES < 0.5
    again, seen = prepared(studio, fake, "gguf-q4_k")
    assert min(done for phase, done in seen if phase == "fetch") >= begun.bytes and again.state == "done"


def test_deleting_the_download_leaves_what_was_made_of_it(studio: Studio, fake: Fake) -> None:
    until(studio, lambda state: "miniature" in state.sources)
    with pytest.raises(RequestError, match="nothing to delete"):
        studio.submit_delete("ideogram-4")
    with pytest.raises(RequestError, match="nothing to delete"):
        studio.submit_delete("miniature")
    studio.wait(studio.submit_prepare("ideogram-4", ("gguf-q4_k",)), SOON)
    assert studio.wait(studio.submit_delete("ideogram-4"), SOON).state == "done"
    state = studio.state
    assert fake.fetched_bytes == 0 and state.sources["ideogram-4"].state == "missing"
    assert state.statuses["ideogram-4"]["gguf-q4_k"].usable


def test_access_is_asked_about_while_a_job_runs(studio: Studio, fake: Fake) -> None:
    fake.hold()
    job_id = studio.submit_compare(REQUEST)
    until(studio, lambda state: state.job)
    fake.allowed = Access("not_accepted", "The licence is not accepted.", "https://huggingface.co/")
    studio.check_access("ideogram-4")
    state = until(studio, lambda state: "ideogram-4" in state.access)
    assert state.access["ideogram-4"] == fake.allowed and not state.checking
    assert not studio.wait(job_id, 0).is_over
    studio.stop()


def test_a_fetch_that_is_refused_asks_again_what_stands_in_the_way(studio: Studio, fake: Fake) -> None:
    fake.allowed = Access("no_token", "This computer has no token.")
    job = studio.wait(studio.submit_prepare("ideogram-4", ("gguf-q4_k",)), SOON)
    assert job.state == "failed" and job.error == "This computer has no token."
    assert until(studio, lambda state: state.access).access["ideogram-4"].state == "no_token"


@dataclass
class Staying(Fake):
    """A backend that keeps what it drew with, and cannot let go of it where it is `stuck`."""

    unloads: int = 0
    stuck: bool = False

    def compare(self, planned: PlannedRequest, output: Path) -> Iterator[Event]:
        self.title = "INT8 of Miniature"
        return super().compare(planned, output)

    def unload(self) -> None:
        if self.stuck:
            raise DeviceError("The driver did not give locked RAM back")
        super().unload()
        self.unloads += 1


def studio_that_keeps(staying: Staying, folder: Path, after: float) -> Studio:
    studio = Studio(staying, folder, unload_after=after)
    studio.start()
    return studio


@pytest.mark.parametrize("after", [0.0, 0.3])
def test_what_was_not_used_for_a_while_goes(tmp_path: Path, after: float) -> None:
    staying = Staying()
    studio = studio_that_keeps(staying, tmp_path, after)
    finish(studio)
    until(studio, lambda state: staying.unloads and not state.loaded)
    assert studio.state.unloads_at is None
    studio.close()


def test_what_may_stay_forever_goes_when_somebody_asks_for_its_memory(tmp_path: Path) -> None:
    staying = Staying()
    studio = studio_that_keeps(staying, tmp_path, -1)
    finish(studio)
    until(studio, lambda state: state.loaded == "INT8 of Miniature")
    before = staying.unloads  # something was packed first
    assert studio.state.unloads_at is None
    studio.unload()
    until(studio, lambda state: not state.loaded)
    assert staying.unloads == before + 1
    studio.close()


def test_a_new_picture_puts_the_end_off(tmp_path: Path) -> None:
    staying = Staying()
    studio = studio_that_keeps(staying, tmp_path, 3600)
    finish(studio)
    first = until(studio, lambda state: state.unloads_at).unloads_at
    finish(studio)
    until(studio, lambda state: (state.unloads_at or 0) > (first or 0))
    assert studio.state.loaded
    studio.close()


def test_memory_is_given_back_before_something_is_packed(tmp_path: Path) -> None:
    staying = Staying()
    studio = studio_that_keeps(staying, tmp_path, -1)
    finish(studio)
    before = staying.unloads
    studio.wait(studio.submit_prepare("miniature", ("fp8",)), SOON)
    assert staying.unloads == before + 1
    studio.close()


def test_a_worker_outlives_what_it_cannot_let_go_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    staying = Staying()
    studio = studio_that_keeps(staying, tmp_path, -1)
    until(studio, lambda state: state.machine)
    staying.stuck = True
    studio.unload()
    until(studio, lambda _: "unloading models failed" in caplog.text)
    staying.stuck = False
    assert finish(studio).state == "done"
    studio.close()
