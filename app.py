"""Start the page: read the flags, build it, serve it. Also the entry of a Hugging Face Space.

Every flag has a twin in the environment (`--output-dir` is `IDEOGRAM_APP_OUTPUT_DIR`); a flag wins. The page listens on
this computer alone unless `--listen` says otherwise; in a Space (`SPACE_ID` is set) it listens where Spaces expect it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
FIRST_PORT, PORTS_TRIED = 7860, 40
GRACE_SECONDS = 10.0  # the worker holds back until a tab is up, or as long; a browser that starts takes 1 to 5
FETCHED = "ideogram-4"  # the model whose weights do not ship with the program


def twin(flag: str, default: str = "") -> str:
    """What the environment says in place of a flag."""
    return os.environ.get(f"IDEOGRAM_APP_{flag.upper()}", default)


def switch(flag: str) -> bool:
    return twin(flag).lower() in ("1", "true", "yes", "on")


def flag_parser() -> argparse.ArgumentParser:
    """The flags of the page; their defaults are what the environment says."""
    from ideogram_app.files import data_folder, output_folder

    parser = argparse.ArgumentParser(description="Ideogram 4 on this machine, in several precisions side by side.")
    add = parser.add_argument
    add("--listen", action="store_true", default=switch("listen"), help="serve the network, not this computer alone")
    add(
        "--port", default=twin("port", os.environ.get("GRADIO_SERVER_PORT", "")), help="this one or none (else 7860 on)"
    )
    add("--share", action="store_true", default=switch("share"), help="open a public link through gradio.live")
    add("--auth", default=twin("auth"), metavar="USER:PASSWORD", help="ask for this; better through IDEOGRAM_APP_AUTH")
    add("--no-browser", action="store_true", default=switch("no_browser"), help="do not open the page in a browser")
    add("--data-dir", type=Path, default=data_folder(), help="where weights rest")
    add("--output-dir", type=Path, default=output_folder(), help="where pictures are kept")
    add("--offline", action="store_true", default=switch("offline"), help="never touch the network; fetch nothing")
    add(
        "--source",
        type=Path,
        default=twin("source") or None,
        metavar="FOLDER",
        help="where the published weights of Ideogram 4 lie already, so that they are not fetched",
    )
    add(
        "--reserve-vram",
        type=float,
        default=twin("reserve_vram", "0"),
        metavar="GB",
        help="device memory to leave alone, for a desktop, a game or another program; plans are made without it",
    )
    add(
        "--unload-after",
        type=float,
        default=twin("unload_after", "300"),
        metavar="SECONDS",
        help="how long weights stay in memory for the next picture: 0 lets them go at once, a negative number never",
    )
    add("--model", default=twin("model", "miniature"), help="miniature or ideogram-4, chosen when the page opens")
    return parser


def read_flags(arguments: list[str] | None) -> argparse.Namespace:
    """The flags of the command line over those of the environment over the defaults."""
    return flag_parser().parse_args(arguments)


def choose_host(listen: bool) -> str:
    """This computer alone, unless a flag, a Space or Gradio's own variable says otherwise."""
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
    """The port asked for, or the first free one from 7860 on.

    Raises:
        RequestError: what was asked for is no port or is in use, or none is free.
    """
    from ideogram_app.errors import RequestError

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
    """User and password, or None where nobody is to be asked.

    Raises:
        RequestError: one of the two is missing.
    """
    from ideogram_app.errors import RequestError

    user, colon, password = text.partition(":")
    if text and not (user and colon and password):
        raise RequestError("--auth takes a user and a password", expected="USER:PASSWORD")
    return (user, password) if text else None


def existing(path: Path) -> Path:
    """What --source names, as an absolute path.

    Raises:
        RequestError: it is not there.
    """
    from ideogram_app.errors import RequestError

    if not Path(path).expanduser().exists():
        raise RequestError(f"There is no {path}", do="--source takes the folder that holds the weights")
    return Path(path).expanduser().absolute()


def reserved(gigabytes: float) -> int:
    """What --reserve-vram names, in bytes.

    Raises:
        RequestError: less than nothing, or no number.
    """
    from ideogram_app.errors import RequestError

    if not gigabytes >= 0 or gigabytes == float("inf"):
        raise RequestError("--reserve-vram takes gigabytes", expected="0 or more", got=str(gigabytes))
    return round(gigabytes * 1e9)


def serve(flags: argparse.Namespace) -> None:
    """Build and serve until interrupted."""
    host, in_space = choose_host(flags.listen), "SPACE_ID" in os.environ
    port, auth = choose_port(host, flags.port), credentials(flags.auth)
    from ideogram_app.catalog.models import find_model
    from ideogram_app.studio.local_backend import LocalBackend
    from ideogram_app.studio.studio import Studio

    model, output, data = find_model(flags.model), Path(flags.output_dir).absolute(), Path(flags.data_dir).absolute()
    if (flags.share or host != LOCAL) and auth is None and not in_space:
        print("Warning: anybody who can reach this page can use it. Consider --auth USER:PASSWORD.", flush=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from ideogram_app.ui.page import build
    from ideogram_app.ui.style import launch_options

    given = {FETCHED: existing(flags.source)} if flags.source else {}
    reserve = reserved(flags.reserve_vram)
    backend = LocalBackend(data, given, offline=flags.offline)
    studio = Studio(backend, output, reserve_bytes=reserve, unload_after=flags.unload_after)
    page = build(studio, model.name)
    options = launch_options(output, data)
    page.launch(
        server_name=host,
        server_port=port,
        share=flags.share,
        auth=auth,
        prevent_thread_lock=True,
        inbrowser=not flags.no_browser and not in_space,
        **options,
    )
    shown = "localhost" if host in (LOCAL, EVERYWHERE) else host
    print(f"The page is at http://{shown}:{port}", flush=True)
    studio.start(GRACE_SECONDS)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Stopping ...", flush=True)
    finally:
        studio.close()
        page.close(verbose=False)


def main(arguments: list[str] | None = None) -> int:
    """Serve; what the user can act upon becomes one line on standard error and exit code 1."""
    from ideogram_app.errors import AppError

    try:
        serve(read_flags(arguments))
    except AppError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # interrupted before it was up; what shells expect
    return 0


if __name__ == "__main__":
    sys.exit(main())
