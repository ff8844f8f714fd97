"""A Hub on this machine: serves one folder to the real huggingface_hub client, with the faults that lines have.

    python tools/hub.py FOLDER --repo ideogram-ai/ideogram-4-fp8 --gate licence --cut-every 50000000
    HF_ENDPOINT=http://127.0.0.1:PORT HF_HUB_DISABLE_XET=1 python -m ideogram_app prepare ...

It answers what a download asks: the listing with sizes and hashes, the tree, who am I, the gate, and files by range,
large ones through a redirect to another host name, as the Hub's storage is. Status, `X-Error-Code` and message of every
refusal are those that huggingface_hub's `hf_raise_for_status` tells apart. Tests start a `Hub` in a thread and read
from `served` how many bytes left it. Left out: writing, branches (every revision but a foreign commit is the one there
is), accounts (any token is somebody), Xet, and TLS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote, urlparse

import typer

BLOCK = 2**16
NAP = 0.05  # seconds between two looks at whether a silent line may speak again
LARGE = (".safetensors", ".gguf")  # the Hub keeps these outside git, under their sha256
GATES = ("none", "token", "licence", "review", "rejected", "scope", "revoked", "missing")
SITE = "https://huggingface.co"


@dataclass
class Faults:
    """What goes wrong on the line; every field may be changed while the hub runs.

    Attributes:
        gate: who is turned away: nobody, who has no token, or also everybody with one, for the reason named.
        cut_every: bytes of a body after which the connection ends; 0 never.
        reset: whether a cut is a reset instead of an orderly close; what is under way is lost then.
        rate: bytes a second; 0 as fast as it goes.
        silent_after: bytes of a body after which nothing more comes while this is set, and the connection stays.
        altered: how many times each file is still served with a byte changed, by path.
        truncated: bytes that are missing at the end of a file, by path; the listing does not know.
        errors: how many requests are still answered with 503.
        ignores_ranges: whether every answer begins at the first byte.
    """

    gate: str = "none"
    cut_every: int = 0
    reset: bool = False
    rate: float = 0.0
    silent_after: int = 0
    altered: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    errors: int = 0
    ignores_ranges: bool = False


class Hub:
    """One repository on a loopback port.

    Attributes:
        served: bytes of bodies that were sent, by path in the repository.
        sending: a mark for every body that is under way.
        strangers: tokens that reached the storage host, which must never see one.
    """

    def __init__(self, folder: Path, repository: str, port: int = 0, faults: Faults | None = None) -> None:
        self.folder, self.repository, self.faults = folder, repository, faults or Faults()
        self.served: Counter[str] = Counter()
        self.sending: set[object] = set()
        self.requests: list[str] = []
        self.strangers: list[str] = []
        self.server = _Server(("127.0.0.1", port), _handler(self))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Path to the row of the listing, as `?blobs=true` gives it."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): _row(path, self.folder) for path in paths}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """Serve in a thread for as long as the block lasts."""
        thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.faults.silent_after = 0
            self.server.shutdown()
            self.server.server_close()

    def refusal(self, token: str | None, metadata: bool) -> tuple[int, str, str] | None:
        """Status, error code and message of a request that is turned away; the listing of a gated one is open."""
        gate, name = self.faults.gate, self.repository
        if gate == "missing":
            return (404 if token else 401), "RepoNotFound", "Repository not found"
        if gate == "revoked" and token:
            return 401, "", "Invalid credentials in Authorization header"
        if gate == "scope" and token:
            return (
                403,
                "",
                "Please enable access to public gated repositories in your fine-grained token settings to view this "
                "repository.",
            )
        if gate == "none" or metadata:
            return None
        if not token:
            restricted = f"Access to model {name} is restricted. You must have access to it and be authenticated"
            return 401, "GatedRepo", f"{restricted} to access it. Please log in."
        messages = {
            "licence": f"Access to model {name} is restricted and you are not in the authorized list. "
            f"Visit {SITE}/{name} to ask for access.",
            "review": f"Your request to access model {name} is awaiting a review from the repo authors.",
            "rejected": f"Your request to access model {name} has been rejected by the repo's authors.",
        }
        return (403, "GatedRepo", messages[gate]) if gate in messages else None


def _row(path: Path, folder: Path) -> dict[str, Any]:
    size = path.stat().st_size
    blob, sha256 = hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**22):
            blob.update(data)
            sha256.update(data)
    row: dict[str, Any] = {"rfilename": path.relative_to(folder).as_posix(), "size": size, "blobId": blob.hexdigest()}
    if path.suffix in LARGE:
        row["lfs"] = {"sha256": sha256.hexdigest(), "size": size, "pointerSize": 135}
    return row


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what these lines are about; anything else is printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is set by `_handler`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet; what matters is counted."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, url = self.hub, urlparse(self.path)
        path = unquote(url.path)
        hub.requests.append(f"{self.command} {path}")
        if hub.faults.errors > 0:
            hub.faults.errors -= 1
            return self._refuse(503, "", "Service temporarily unavailable")
        api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if path.startswith("/storage/"):
            return self._storage(path.removeprefix("/storage/"))
        if path == "/api/whoami-v2":
            return self._who()
        if path == api or path.startswith(api + "/"):
            return self._api(path.removeprefix(api), parse_qs(url.query))
        if path.startswith(files):
            return self._resolve(*path.removeprefix(files).split("/", 1))
        self._refuse(404 if self._token else 401, "RepoNotFound", "Repository not found")

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _who(self) -> None:
        if not self._token or self.hub.faults.gate == "revoked":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        scope = {"canReadGatedRepos": self.hub.faults.gate != "scope", "global": [], "scoped": []}
        token = {"displayName": "replica", "role": "fineGrained", "fineGrained": scope}
        self._json({"type": "user", "name": "somebody", "auth": {"type": "access_token", "accessToken": token}})

    def _api(self, rest: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        refused = hub.refusal(self._token, metadata=rest != "/auth-check")
        if refused:
            return self._refuse(*refused)
        if rest == "/auth-check":
            return self._json({})
        revision = rest.split("/")[2] if rest.count("/") >= 2 else "main"
        if self._unknown(revision):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if rest.startswith("/tree/"):
            return self._json([_tree_row(row) for row in hub.files.values()])
        rows = hub.files.values()
        named = list(rows) if "blobs" in query else [{"rfilename": row["rfilename"]} for row in rows]
        gated = False if hub.faults.gate == "none" else "auto"
        shown = {"_id": "0", "id": hub.repository, "modelId": hub.repository, "sha": hub.commit, "private": False}
        self._json({**shown, "gated": gated, "disabled": False, "tags": [], "downloads": 0, "siblings": named})

    def _unknown(self, revision: str) -> bool:
        return bool(re.fullmatch("[0-9a-f]{40}", revision)) and revision != self.hub.commit

    def _resolve(self, revision: str, path: str) -> None:
        refused = self.hub.refusal(self._token, metadata=False)
        if refused:
            return self._refuse(*refused)
        if self._unknown(revision):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        row = self.hub.files.get(path)
        if row is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if "lfs" not in row:
            return self._body(row, {"ETag": f'"{row["blobId"]}"', "X-Repo-Commit": self.hub.commit})
        port = self.hub.server.server_address[1]
        self._head(
            302,
            {
                "Location": f"http://localhost:{port}/storage/{path}",  # another name, so another host to any client
                "X-Repo-Commit": self.hub.commit,
                "X-Linked-ETag": f'"{row["lfs"]["sha256"]}"',
                "X-Linked-Size": str(row["size"]),
                "Content-Length": "0",
            },
        )

    def _storage(self, path: str) -> None:
        """The host behind the redirect: anybody with the address is served."""
        if self._token:
            self.hub.strangers.append(path)
        row = self.hub.files[path]
        self._body(row, {"ETag": f'"{row["lfs"]["sha256"]}"'})

    def _body(self, row: dict[str, Any], headers: dict[str, str]) -> None:
        path, faults = row["rfilename"], self.hub.faults
        size = row["size"] - faults.truncated.get(path, 0)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, size
        if asked and not faults.ignores_ranges:
            start, stop = int(asked[1]), min(size, int(asked[2] or size - 1) + 1)
            if start >= size:
                return self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        partly = asked and not faults.ignores_ranges
        self._head(206 if partly else 200, {**headers, "Content-Length": str(stop - start), "Accept-Ranges": "bytes"})
        if self.command == "GET":
            self._send(path, start, stop)

    def _send(self, path: str, start: int, stop: int) -> None:
        """The bytes, with whatever the line does to them."""
        faults, sent = self.hub.faults, 0
        altered = faults.altered.get(path, 0) > 0 and stop == self.hub.files[path]["size"]
        if altered:
            faults.altered[path] -= 1
        self.hub.sending.add(self)
        try:
            for data in _blocks(self.hub.folder / path, start, stop, _block(faults)):
                if faults.cut_every and sent + len(data) > faults.cut_every:
                    data = data[: faults.cut_every - sent]
                last = start + sent + len(data) == stop
                self.wfile.write(data[:-1] + bytes([data[-1] ^ 1]) if altered and last and data else data)
                sent += len(data)
                self.hub.served[path] += len(data)
                if faults.cut_every and sent >= faults.cut_every and not last:
                    return self._cut()
                while faults.silent_after and sent >= faults.silent_after:
                    time.sleep(NAP)
                if faults.rate:
                    time.sleep(len(data) / faults.rate)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.hub.sending.discard(self)

    def _cut(self) -> None:
        self.close_connection = True
        if self.hub.faults.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # closing the object would say goodbye first

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        data = json.dumps({"error": message}).encode()
        marks = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._head(status, {**marks, "Content-Type": "application/json", "Content-Length": str(len(data))})
        if self.command == "GET":
            self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _handler(hub: Hub) -> type[_Handler]:
    return type("Handler", (_Handler,), {"hub": hub})


def _tree_row(row: dict[str, Any]) -> dict[str, Any]:
    lfs = {"lfs": {**row["lfs"], "oid": row["lfs"]["sha256"]}} if "lfs" in row else {}
    return {"type": "file", "oid": row["blobId"], "size": row["size"], "path": row["rfilename"], **lfs}


def _block(faults: Faults) -> int:
    """Bytes sent at once: on a slow line about twenty times a second."""
    return min(BLOCK, max(1, round(faults.rate / 20))) if faults.rate else BLOCK


def _blocks(path: Path, start: int, stop: int, block: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            data = file.read(min(block, stop - start))
            start += len(data)
            yield data


def main(
    folder: Annotated[Path, typer.Argument(help="The repository: its files under their own paths.")],
    repo: Annotated[str, typer.Option(help="Its owner and name.")] = "ideogram-ai/ideogram-4-fp8",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    gate: Annotated[str, typer.Option(help=", ".join(GATES))] = "none",
    cut_every: Annotated[int, typer.Option(help="Bytes after which a connection ends.")] = 0,
    reset: Annotated[bool, typer.Option(help="Cut by a reset instead of an orderly close.")] = False,
    rate: Annotated[float, typer.Option(help="Bytes a second.")] = 0.0,
    errors: Annotated[int, typer.Option(help="How many requests are answered with 503 first.")] = 0,
    altered: Annotated[list[str] | None, typer.Option(help="A path that is served once with a byte changed.")] = None,
) -> None:
    """Serve a folder as the Hub would, until it is stopped; prints the endpoint."""
    if gate not in GATES:
        raise typer.BadParameter(f"one of {', '.join(GATES)}", param_hint="--gate")
    faults = Faults(gate, cut_every, reset, rate, altered=dict.fromkeys(altered or (), 1), truncated={}, errors=errors)
    hub = Hub(folder, repo, port, faults)
    print(f"commit {hub.commit}, {len(hub.files)} files", flush=True)
    print(hub.endpoint, flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    typer.run(main)
