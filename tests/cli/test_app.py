"""app.py: its flags, its port, the page it serves, and the public endpoints."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio_client import Client
from typer.main import get_command

from ideogram_app.cli import serve
from ideogram_app.cli.output import describe_result
from ideogram_app.comparison.contact_sheet import result_lines
from ideogram_app.comparison.metrics import psnr
from ideogram_app.errors import RequestError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.machine.hardware import Hardware
from ideogram_app.records import Request
from ideogram_app.studio import local_backend
from ideogram_app.studio.local_backend import LocalBackend
from ideogram_app.studio.studio import Studio
from ideogram_app.text import decibels
from ideogram_app.ui.page import build
from ideogram_app.ui.results import Shown, results_grid
from ideogram_app.ui.style import launch_options
from tests.fake_backend import Fake, paint, result_of
from tests.serving import free_port, wait_until_it_answers
from tests.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port somebody else listens on."""
    with socket.socket() as other:
        other.bind((serve.LOCAL, 0))
        other.listen()
        yield other.getsockname()[1]


def flags(*arguments: str) -> SimpleNamespace:
    return SimpleNamespace(**get_command(serve.page).make_context("app.py", list(arguments)).params)


def test_a_port_that_was_asked_for_is_taken_or_refused_by_name(taken: int) -> None:
    with pytest.raises(RequestError, match=f"Port {taken} is in use"):
        serve.choose_port(serve.LOCAL, str(taken))
    for wrong in ("0", "70000", "http", "-1"):
        with pytest.raises(RequestError, match="no port"):
            serve.choose_port(serve.LOCAL, wrong)
    port = free_port()
    assert serve.choose_port(serve.LOCAL, str(port)) == port


def test_without_a_port_the_next_free_one_is_taken_and_named(
    taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "FIRST_PORT", taken)
    port = serve.choose_port(serve.LOCAL, "")
    assert port > taken and str(port) in capsys.readouterr().out


def test_every_flag_has_a_twin_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LISTEN": "1",
        "PORT": "7999",
        "SHARE": "false",
        "AUTH": "a:b",
        "NO_BROWSER": "yes",
        "DATA": "weights",
        "OUTPUT_DIR": "drawn",
        "MODEL": "ideogram-4",
        "OFFLINE": "1",
        "SOURCE": "copy",
        "RESERVE_VRAM": "1.5",
        "UNLOAD_AFTER": "-1",
    }.items():
        monkeypatch.setenv(f"IDEOGRAM_APP_{name}", value)
    read = flags()
    assert (read.listen, read.port, read.share, read.auth, read.no_browser) == (True, "7999", False, "a:b", True)
    assert (str(read.data_dir), str(read.output_dir), read.model) == ("weights", "drawn", "ideogram-4")
    assert (read.offline, str(read.source)) == (True, "copy")
    assert (serve.reserved(read.reserve_vram), read.unload_after) == (1_500_000_000, -1)
    assert flags("--port", "1", "--model", "miniature").port == "1"


def test_by_default_nobody_else_can_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("IDEOGRAM_APP_", "GRADIO_", "SPACE_"))]:
        monkeypatch.delenv(name)
    read = flags()
    assert not read.listen and not read.share and read.auth == ""
    assert not read.offline and read.source is None
    assert (serve.reserved(read.reserve_vram), read.unload_after) == (0, 300)
    assert (read.data_dir, read.output_dir) == (ROOT / "data", ROOT / "outputs")
    assert serve.choose_host(read.listen) == "127.0.0.1"
    monkeypatch.setenv("SPACE_ID", "somebody/something")
    assert serve.choose_host(read.listen) == "0.0.0.0"


def test_a_password_needs_both_halves() -> None:
    assert serve.credentials("") is None and serve.credentials("a:b:c") == ("a", "b:c")
    for wrong in ("a", "a:", ":b"):
        with pytest.raises(RequestError, match="USER:PASSWORD"):
            serve.credentials(wrong)


@pytest.mark.parametrize("wrong", ["-1", "nan", "inf"])
def test_a_reserve_is_no_less_than_nothing_and_no_more_than_a_number(wrong: str) -> None:
    with pytest.raises(RequestError, match="--reserve-vram"):
        serve.reserved(flags("--reserve-vram", wrong).reserve_vram)


def test_a_copy_that_was_named_and_is_not_there_is_refused(tmp_path: Path) -> None:
    assert serve.existing(tmp_path) == tmp_path
    with pytest.raises(RequestError, match="nothing"):
        serve.existing(tmp_path / "nothing")


def test_a_named_copy_is_used_and_offline_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    backend = LocalBackend(tmp_path, {"ideogram-4": tmp_path}, offline=True)
    assert backend.source_state("ideogram-4").state == "given"
    assert backend.source_state("miniature").state == "included"
    backend = LocalBackend(tmp_path, offline=True)
    assert backend.source_state("ideogram-4").state == "missing"
    answer = backend.access("ideogram-4")
    assert answer.state == "offline" and "offline" in answer.sentence


def test_equal_pictures_are_called_identical(tmp_path: Path) -> None:
    request = Request("miniature", wrap_plain("a red circle"), ("reference", "fp8"), width=64, height=64)
    picture = paint(request, "reference")
    picture.save(tmp_path / "fp8.png")
    same = replace(result_of(request, "fp8", tmp_path / "fp8.png"), psnr=psnr(picture, picture), ssim=1.0)
    card = results_grid(Shown(request, (same,), {}))
    assert "identical" in card and "150.0" not in card and "150 dB" not in card
    assert "PSNR identical, SSIM 1.0000" in result_lines(same)
    assert "identical" in describe_result(same) and "150" not in describe_result(same)
    assert (decibels(52.04), decibels(None)) == ("52.0 dB", "–")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "app.py"), "--no-browser", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_a_port_in_use_ends_in_one_line_and_exit_code_1(taken: int) -> None:
    answer = run("--port", str(taken))
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr.splitlines() == [
        f"error: Port {taken} is in use. Close the program that uses it, or leave --port away."
    ]


def test_an_unknown_model_ends_in_one_line_and_exit_code_1() -> None:
    answer = run("--model", "sdxl")
    assert answer.returncode == 1 and "ideogram-4 or miniature" in answer.stderr
    assert "Traceback" not in answer.stderr


HEAVY = ("torch", "torchao", "diffusers", "transformers", "accelerate", "safetensors", "gguf", "numba", "scipy")
BUILD = f"""
import sys
from pathlib import Path
from ideogram_app.studio.local_backend import LocalBackend
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.page import build
from ideogram_app.ui.style import launch_options
folder = Path(sys.argv[1])
build(Studio(LocalBackend(folder / "data"), folder / "outputs"))
launch_options(folder / "outputs", folder / "data")
print([name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.slow
def test_the_page_is_built_without_what_draws_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_worker_begins_when_the_page_answers_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, answers = free_port(), []

    class Asking(Fake):
        def detect(self) -> Hardware:
            try:
                with urllib.request.urlopen(f"http://{serve.LOCAL}:{port}/", timeout=30) as answer:
                    answers.append(answer.status)
            finally:
                os.kill(os.getpid(), signal.SIGINT)  # serving ends as a user ends it
            return super().detect()

    monkeypatch.setattr(local_backend, "LocalBackend", lambda *_, **__: Asking())
    monkeypatch.setattr(serve, "GRACE_SECONDS", 0.0)
    rescue = threading.Timer(LIMIT, os.kill, (os.getpid(), signal.SIGINT))  # of a worker that never begins
    rescue.start()
    folders = ["--output-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    serve.serve(**vars(flags("--no-browser", "--port", str(port), *folders)))
    rescue.cancel()
    assert answers == [200]


@pytest.mark.slow
def test_the_program_serves_the_page_and_says_what_the_machine_is(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py"), "--no-browser", "--port", str(port)]
    command += ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "outputs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            url = f"http://{serve.LOCAL}:{port}"
            wait_until_it_answers(url, process)
            answer = Client(url, verbose=False).predict(api_name="/system_info")
            assert answer["hardware"]["torch"] and answer["plan"]["model"] == "miniature"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(LIMIT) == 0
            finally:
                process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Fake, str, Path]]:
    """The page on a fake backend."""
    fake, root = Fake(), tmp_path_factory.mktemp("served")
    (root / "data").mkdir()
    (root / "data" / "token").write_text("secret", encoding="utf-8")
    studio = Studio(fake, root / "outputs")
    page, port = build(studio), free_port()
    options: dict[str, Any] = launch_options(studio.output, root / "data")
    page.launch(server_name=serve.LOCAL, server_port=port, prevent_thread_lock=True, **options)
    studio.start()
    url = f"http://{serve.LOCAL}:{port}"
    yield Client(url, verbose=False), fake, url, root
    studio.close()
    page.close(verbose=False)


Served = tuple[Client, Fake, str, Path]


def test_a_comparison_over_the_api_speaks_the_names_on_the_wire(served: Served) -> None:
    client, _, _, _ = served
    answer = client.predict("a red circle", ["gguf-q4_k", "reference"], preset="turbo-12", seed=3, api_name="/compare")
    assert list(answer) == ["request", "hardware", "plan", "results"]
    assert [row["recipe"] for row in answer["results"]] == ["gguf-q4_k", "reference"]
    assert answer["request"]["width"] == 128 and Path(answer["results"][0]["image"]).is_file()
    assert {"recipe", "engaged", "seconds", "seconds_per_step", "psnr", "ssim", "error"} <= set(answer["results"][1])


def test_the_example_of_the_page_about_the_api_runs_as_it_stands(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, url, _ = served
    page = ROOT / "docs" / "api.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example.replace("http://localhost:7860", url), page.name, "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["reference", "fp8"]


def test_memory_limits_over_the_api_reach_the_request(served: Served) -> None:
    client, _, _, _ = served
    drawn = client.predict("a red circle", ["reference"], preset="turbo-12", api_name="/compare")["request"]
    assert (drawn["adapt"], drawn["device_limit_bytes"]) == (False, None)
    limits = {"adapt": True, "device_limit_gb": 9.5}
    drawn = client.predict("a red circle", ["reference"], preset="turbo-12", **limits, api_name="/compare")["request"]
    assert (drawn["adapt"], drawn["device_limit_bytes"]) == (True, 9_500_000_000)


def test_preparing_over_the_api_waits_until_it_is_there(served: Served) -> None:
    client, fake, _, _ = served
    answer = client.predict("miniature", "fp8", api_name="/prepare")
    assert answer["state"] == "ready" and ("miniature", "fp8") in fake.prepared
    assert client.predict(api_name="/status")["recipes"]["fp8"]["state"] == "ready"


def test_what_cannot_be_done_comes_back_as_a_sentence(served: Served) -> None:
    client, _, _, _ = served
    with pytest.raises(Exception, match="Unknown recipe 'nf4'"):
        client.predict("a red circle", ["nf4"], api_name="/compare")
    with pytest.raises(Exception, match="cannot run on this machine"):
        client.predict("a red circle", ["int8-w8a8"], model="ideogram-4", api_name="/compare")


def test_only_the_four_endpoints_are_public(served: Served) -> None:
    client, _, _, _ = served
    described = client.view_api(return_format="dict")
    assert isinstance(described, dict)
    assert sorted(described["named_endpoints"]) == ["/compare", "/prepare", "/status", "/system_info"]
    assert described["unnamed_endpoints"] == {}


def test_only_pictures_can_be_read_from_the_page(served: Served) -> None:
    client, _, url, root = served
    image = client.predict("a red circle", ["reference"], preset="turbo-12", api_name="/compare")["results"][0]["image"]
    with urllib.request.urlopen(f"{url}/gradio_api/file={image}") as answer:
        assert answer.read() == Path(image).read_bytes()
    for secret in (root / "data" / "token", ROOT / "app.py", Path("/etc/passwd")):
        with pytest.raises(OSError, match=re.compile("40[34]")):
            urllib.request.urlopen(f"{url}/gradio_api/file={secret}")


def test_with_a_password_pictures_are_not_for_everybody(tmp_path: Path) -> None:
    studio, port = Studio(Fake(), tmp_path / "outputs"), free_port()
    studio.output.mkdir()
    (studio.output / "picture.png").write_bytes(b"png")
    page = build(studio)
    options: dict[str, Any] = launch_options(studio.output, tmp_path / "data")
    page.launch(
        server_name=serve.LOCAL,
        server_port=port,
        prevent_thread_lock=True,
        auth=serve.credentials("me:secret"),
        **options,
    )
    with pytest.raises(OSError, match="401"):
        urllib.request.urlopen(f"http://{serve.LOCAL}:{port}/gradio_api/file={studio.output / 'picture.png'}")
    page.close(verbose=False)
