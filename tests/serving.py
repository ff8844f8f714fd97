"""Servers of the tests: a port nobody has, and waiting until somebody answers there."""

from __future__ import annotations

import socket
import subprocess
import urllib.request

import pytest

from tests.waiting import wait_until

LOCAL = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(url: str, process: subprocess.Popen[str] | None = None) -> None:
    """Return once the address answers; fail where the process behind it ends first, or time is up."""

    def answers() -> bool:
        if process and process.poll() is not None:
            pytest.fail(f"the program ended with {process.returncode}: {process.stdout and process.stdout.read()}")
        try:
            with urllib.request.urlopen(url, timeout=30):
                return True
        except OSError:
            return False

    wait_until(answers, what=f"an answer of {url}")
