"""The command itself with a model, and the real openpi-client as it comes from PyPI.

The client is looked for in this interpreter (pip install --no-deps openpi-client) or in the one that
QDEPTH_OPENPI_CLIENT names: its package wants numpy < 2.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import stored_runs

from benchmarks import serving_robots
from qdepth_jax import errors, export_model
from qdepth_jax.eval import robot
from qdepth_jax.models import policy
from qdepth_jax.serve import protocol

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVE = [sys.executable, str(ROOT / "tools" / "serve.py")]


def interpreter():
    """Of the client; skips where there is none."""
    found = os.environ.get("QDEPTH_OPENPI_CLIENT", sys.executable)
    if subprocess.run([found, "-c", "import openpi_client.websocket_client_policy"], capture_output=True).returncode:
        pytest.skip(f"{found} has no openpi-client: pip install --no-deps openpi-client, or set QDEPTH_OPENPI_CLIENT")
    return found


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A policy as small as it gets, with the folder where the servers keep their programs beside it."""
    folder = tmp_path_factory.mktemp("served")
    model = policy.sized("tiny", vocabulary=640, text_length=24, depth=None, layers=1, scan=False)
    stored_runs.write(folder / "policy", "policy", model)
    options = export_model.Options(format="safetensors")
    export_model.write_export(str(folder / "policy"), str(folder / "export"), options, lambda text: None)
    return str(folder / "export")


def start(export, *arguments, port=0):
    flags = [f"--checkpoint={export}", f"--port={port}", "--batch_sizes=1,4", *arguments]
    # The second start of a server takes its programs from the cache. Unoptimised ones compile in a third of the time.
    cache = {"JAX_COMPILATION_CACHE_DIR": export + "_cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    fast = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with open(export + "_log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*SERVE, *flags], stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | cache | fast
        )
    line = process.stdout.readline()
    assert line, f"the server ended with {process.wait()}: {pathlib.Path(export + '_log').read_text()}"
    return process, json.loads(line)["port"]


def drive(client, *arguments, **options):
    command = [client, str(ROOT / "benchmarks" / "serving_robots.py"), *map(str, arguments)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, **options)


@pytest.mark.slow
def test_real_clients_get_the_actions_of_the_policy(export):
    client = interpreter()
    process, port = start(export)
    try:
        metadata, continued = continue_a_chunk(port)
        given = drive(client, "plain", port, 6, 4, 28, stderr=subprocess.DEVNULL).communicate(timeout=120)
        found = json.loads(given[0])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert found["errors"] == [] and len(found["actions"]) == 24
    for seed in (0, 7, 23):
        # Evaluation's first call has the noise of [seed, 0]. The server may have planned for four robots at once.
        seen, act = serving_robots.observation(metadata, seed, 28), robot.libero_policy(export, "libero_object", seed)
        observed = {"image": seen["observation/image"], "state": seen["observation/state"]}
        wanted = act(observed | {"instruction": seen["prompt"]})
        np.testing.assert_allclose(found["actions"][str(seed)], wanted, atol=2e-5)
        assert (np.abs(wanted[:, :6]) < 1).any()
    old, first, second = continued
    np.testing.assert_array_equal(second[:2], old[:2])
    assert not np.array_equal(second, first)


def continue_a_chunk(port):
    """The server's metadata, and the old chunk, a chunk without and one with real-time chunking."""
    client = pytest.importorskip("websockets.sync.client", reason="the serve extra is not installed")
    with client.connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
        metadata = protocol.unpack(connection.recv())
        seen = serving_robots.observation(metadata, 5, 28)
        old = np.asarray([[0.1, 0.2, 0.3, -0.1, -0.2, -0.3, 1], [0.4, 0, 0, 0, 0, 0, -1], [0.5, 0, 0, 0, 0, 0, 1]])
        chunks = []
        for more in ({}, {"rtc/prefix": old, "rtc/frozen": 2}):
            connection.send(protocol.pack(seen | more))
            chunks.append(protocol.unpack(connection.recv())["actions"])
    return metadata, (old.astype(np.float32), *chunks)


@pytest.mark.slow
def test_patient_clients_survive_a_killed_server(export):
    client = interpreter()
    process, port = start(export)
    robots_process = drive(client, "patient", port, 40, 2, 28, stderr=subprocess.PIPE)
    try:
        for _ in range(10):
            assert robots_process.stderr.readline().startswith("answer")
        reader = threading.Thread(target=robots_process.stderr.read)
        reader.start()
        process.kill()
        process.wait()
        process, _ = start(export, port=port)
        reader.join()
        found = json.loads(robots_process.stdout.read())
    finally:
        process.kill()
        process.wait()
        robots_process.kill()
        robots_process.wait()
    assert found["errors"] == [] and len(found["actions"]) == 80 and found["reconnects"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [("--dataset=bridge", r"trained on \['libero_object'\], not on 'bridge'"), ("--keys=wrist=x", "NAME one of main")],
)
def test_the_command_knows_the_policy(export, flag, message):
    pytest.importorskip("websockets", reason="the serve extra is not installed")
    with stored_runs.command("serve") as main, pytest.raises(errors.UserError, match=message):
        main(f"--checkpoint={export}", flag)


def test_the_command_knows_a_taken_port_before_it_loads_anything():
    pytest.importorskip("websockets", reason="the serve extra is not installed")
    with socket.create_server(("127.0.0.1", 0)) as other, stored_runs.command("serve") as main:
        port = other.getsockname()[1]
        with pytest.raises(errors.UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            main("--checkpoint=nothing_here", f"--port={port}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch_sizes=4,1", "rising numbers"),
        ("--batch_sizes=one", "whole numbers"),
        ("--rtc=soft", "inpaint, guided, off"),
        ("--units=metres", "libero, standard"),
        ("--api_key_file=nowhere", "--api_key_file=nowhere"),
        ("--port=70000", "--port=70000"),
        ("--deadline_ms=-1", "--deadline_ms=-1 must be 0 or more"),
        ("--deadline_ms=nan", "--deadline_ms=nan must be 0 or more, and finite"),
        ("--drain_s=-1", "--drain_s=-1 must be 0 or more"),
        ("--drain_s=nan", "--drain_s=nan must be 0 or more, and finite"),
        ("--drain_s=inf", "--drain_s=inf must be 0 or more, and finite"),
        ("--max_connections=0", "--max_connections=0 must be 1 or more"),
        ("--seed=3", "nothing_here"),
    ],
)
def test_the_command_says_what_is_wrong(flag, message):
    pytest.importorskip("websockets", reason="the serve extra is not installed")
    with stored_runs.command("serve") as main, pytest.raises(errors.UserError, match=message):
        main("--checkpoint=nothing_here", flag)


def test_an_empty_key_opens_the_server_to_nobody(monkeypatch):
    pytest.importorskip("websockets", reason="the serve extra is not installed")
    for key in ("", " \n"):
        monkeypatch.setenv("QDEPTH_API_KEY", key)
        with stored_runs.command("serve") as main, pytest.raises(errors.UserError, match="QDEPTH_API_KEY is empty"):
            main("--checkpoint=nothing_here")
