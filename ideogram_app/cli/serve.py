"""Server of the Gradio page: flags with their environment variables, host, port, password, launch.

Every flag has a twin in the environment (`--output-dir` is `IDEOGRAM_APP_OUTPUT_DIR`); a flag wins. The page listens on
this computer alone unless `--listen` says otherwise; in a Space (`SPACE_ID` is set) it listens where Spaces expect it.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from ideogram_app.catalog.models import find_model
from ideogram_app.cli.flags import DATA, FIRST_RUN, OUTPUTS, run_program
from ideogram_app.errors import RequestError
from ideogram_app.files import DATA_VARIABLE

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
FIRST_PORT, PORTS_TRIED = 7860, 40
GRACE_SECONDS = 10.0  # the worker holds back until a tab is up, or as long; a browser that starts takes 1 to 5
SOURCE_HELP = "where the published weights of Ideogram 4 lie already, so that they are not fetched"
RESERVE_HELP = "device memory to leave alone, for a desktop, a game or another program; plans are made without it"
UNLOAD_HELP = "how long weights stay in memory for the next picture: 0 lets them go at once, a negative number never"

page = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _flag(flag: str, help: str, metavar: str | None = None, further: str = "") -> Any:
    """A flag with its twin in the environment, and a second one that stands in where that is not set."""
    twin = DATA_VARIABLE if flag == "--data-dir" else f"IDEOGRAM_APP_{flag[2:].replace('-', '_').upper()}"
    return typer.Option(flag, envvar=[twin, further] if further else twin, metavar=metavar, help=help)


def choose_host(listen: bool) -> str:
    """The address to listen on: this computer alone, unless a flag, a Space or Gradio's own variable says otherwise."""
    if listen or "SPACE_ID" in os.environ:
        return EVERYWHERE
    return os.environ.get("GRADIO_SERVER_NAME") or LOCAL


def is_free(host: str, port: int) -> bool:
    """Whether the port can be bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def choose_port(host: str, asked: str) -> int:
    """The port asked for, or the first free one from 7860 on; RequestError where it is no port, or none is free."""
    if asked:
        if not asked.isdigit() or not 1 <= int(asked) <= 65535:
            raise RequestError("This is no port", expected="1 to 65535", got=asked)
        if not is_free(host, int(asked)):
            raise RequestError(f"Port {asked} is in use", do="Close the program that uses it, or leave --port away")
        return int(asked)
    for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        if is_free(host, port):
            if port != FIRST_PORT:
                print(f"Port {FIRST_PORT} is in use; taking {port}.", flush=True)
            return port
    last = FIRST_PORT + PORTS_TRIED - 1
    raise RequestError(f"No port from {FIRST_PORT} to {last} is free", do="Name one with --port")


def credentials(text: str) -> tuple[str, str] | None:
    """User and password, or None where nobody is to be asked; RequestError where one of the two is missing."""
    user, colon, password = text.partition(":")
    if text and not (user and colon and password):
        raise RequestError("--auth takes a user and a password", expected="USER:PASSWORD")
    return (user, password) if text else None


def existing(path: Path) -> Path:
    """What --source names, as an absolute path; RequestError where it is not there."""
    if not path.expanduser().exists():
        raise RequestError(f"There is no {path}", do="--source takes the folder that holds the weights")
    return path.expanduser().absolute()


def reserved(gigabytes: float) -> int:
    """What --reserve-vram names, in bytes; RequestError where it is less than nothing, or no number."""
    if not gigabytes >= 0 or gigabytes == float("inf"):
        raise RequestError("--reserve-vram takes gigabytes", expected="0 or more", got=str(gigabytes))
    return round(gigabytes * 1e9)


@page.command(help="Ideogram 4 on this machine, in several precisions side by side.")
def serve(
    listen: Annotated[bool, _flag("--listen", "serve the network, not this computer alone")] = False,
    port: Annotated[str, _flag("--port", "this one or none (else 7860 on)", further="GRADIO_SERVER_PORT")] = "",
    share: Annotated[bool, _flag("--share", "open a public link through gradio.live")] = False,
    auth: Annotated[str, _flag("--auth", "ask for this; better through IDEOGRAM_APP_AUTH", "USER:PASSWORD")] = "",
    no_browser: Annotated[bool, _flag("--no-browser", "do not open the page in a browser")] = False,
    data_dir: Annotated[Path, _flag("--data-dir", "where weights rest")] = DATA,
    output_dir: Annotated[Path, _flag("--output-dir", "where pictures are kept")] = OUTPUTS,
    offline: Annotated[bool, _flag("--offline", "never touch the network; fetch nothing")] = False,
    source: Annotated[Path | None, _flag("--source", SOURCE_HELP, "FOLDER")] = None,
    reserve_vram: Annotated[float, _flag("--reserve-vram", RESERVE_HELP, "GB")] = 0.0,
    unload_after: Annotated[float, _flag("--unload-after", UNLOAD_HELP, "SECONDS")] = 300.0,
    model: Annotated[str, _flag("--model", "miniature or ideogram-4, chosen when the page opens")] = "miniature",
) -> None:
    """Build the page and serve it until interrupted."""
    host, in_space = choose_host(listen), "SPACE_ID" in os.environ
    free, login = choose_port(host, port), credentials(auth)
    chosen, output, data = find_model(model), output_dir.expanduser().absolute(), data_dir.expanduser().absolute()
    if (share or host != LOCAL) and login is None and not in_space:
        print("Warning: anybody who can reach this page can use it. Consider --auth USER:PASSWORD.", flush=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from ideogram_app.studio.local_backend import LocalBackend
    from ideogram_app.studio.studio import Studio
    from ideogram_app.ui.page import build
    from ideogram_app.ui.style import launch_options

    backend = LocalBackend(data, {FIRST_RUN: existing(source)} if source else {}, offline=offline)
    studio = Studio(backend, output, reserve_bytes=reserved(reserve_vram), unload_after=unload_after)
    blocks = build(studio, chosen.name)
    blocks.launch(
        server_name=host,
        server_port=free,
        share=share,
        auth=login,
        prevent_thread_lock=True,
        inbrowser=not no_browser and not in_space,
        **launch_options(output, data),
    )
    print(f"The page is at http://{'localhost' if host in (LOCAL, EVERYWHERE) else host}:{free}", flush=True)
    studio.start(GRACE_SECONDS)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Stopping ...", flush=True)
    finally:
        studio.close()
        blocks.close(verbose=False)


def main(arguments: list[str] | None = None) -> None:
    """Serve; ends the process with the exit code, 130 where it was interrupted before the page was up."""
    run_program(lambda: page(arguments, prog_name="app.py"))
