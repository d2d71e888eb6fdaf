"""Starts several real processes of one run on loopback, each with its own simulated devices, and collects them."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHILD = str(ROOT / "tests" / "multihost_child.py")


class Started(NamedTuple):
    """A running process and the files that its output goes to: a pipe that nobody reads would stop it."""

    process: subprocess.Popen
    out: pathlib.Path
    err: pathlib.Path


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_all(
    arguments: Callable[[int, int], list[str]], count: int, devices: int = 2, variables: dict[str, str] | None = None
) -> list[Started]:
    """Python with `arguments(port, number)` for each process, `devices` simulated devices in each."""
    port, folder = free_port(), pathlib.Path(tempfile.mkdtemp())
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **(variables or {}),
    }
    out = []
    for number in range(count):
        paths = folder / f"{number}.out", folder / f"{number}.err"
        with paths[0].open("w") as stdout, paths[1].open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *arguments(port, number)], cwd=ROOT, env=environment, stdout=stdout, stderr=stderr
            )
        out.append(Started(process, *paths))
    return out


def finish(processes: list[Started], timeout: float = 280) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; one that hangs is killed, and all output shown."""
    deadline, late = time.monotonic() + timeout, False
    for started in processes:
        try:
            started.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
    for started in processes:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()
    done = [(s.process.returncode, s.out.read_text(), s.err.read_text()) for s in processes]
    if late:
        shown = "\n".join(f"--- process {i}: {code}\n{out}\n{err}" for i, (code, out, err) in enumerate(done))
        raise AssertionError(f"processes did not end within {timeout} s\n{shown}")
    return done


def run_all(
    arguments: Callable[[int, int], list[str]], count: int, devices: int = 2, timeout: float = 280
) -> list[tuple[int, str, str]]:
    """`start_all` and `finish`."""
    return finish(start_all(arguments, count, devices), timeout)


def wait_for_line(processes: list[Started], text: str, timeout: float = 120) -> None:
    """Returns when every process has printed `text`."""
    deadline = time.monotonic() + timeout
    while not all(text in started.out.read_text() for started in processes):
        if time.monotonic() > deadline or any(started.process.poll() is not None for started in processes):
            raise AssertionError(f"{text!r} was not printed: {finish(processes, 1)}")
        time.sleep(0.02)
