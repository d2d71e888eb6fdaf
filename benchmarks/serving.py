"""The policy server under load, under malformed frames, and killed.

  python benchmarks/serving.py [--checkpoint=EXPORT] [--client=PYTHON] [--requests=1000 --robots=8 --frames=10000]

Three parts, each against tools/serve.py as a process of its own: robots with the real openpi-client (--client names an
interpreter that has it) ask at once and as fast as they can; malformed frames, each on a connection of its own, while a
good client's answer must stay the same to the bit and memory flat; kill -9 and a restart under ReconnectingPolicy.
Without --checkpoint a tiny policy of random numbers is served: that measures the server, not a model. The last line of
stdout is JSON; exit code 1 if anything went wrong.
"""

import asyncio
import datetime
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "an export or a run of one data set; default: a tiny random policy")
_CLIENT = flags.DEFINE_string("client", sys.executable, "python that has openpi-client")
_REQUESTS = flags.DEFINE_integer("requests", 1000, "of all robots together", lower_bound=1)
_ROBOTS = flags.DEFINE_integer("robots", 8, "clients at once", lower_bound=1)
_SIDE = flags.DEFINE_integer("side", 224, "pixels of their pictures", lower_bound=8)
_FRAMES = flags.DEFINE_integer("frames", 10_000, "malformed ones", lower_bound=1)
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")

MEMORY_MB = 32  # growth that counts as flat: the allocator keeps what the largest frames needed


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _CHECKPOINT.value or tiny_policy(pathlib.Path(folder))
        result = {"robots": _ROBOTS.value, "side": _SIDE.value, "model": _CHECKPOINT.value or "tiny, random"}
        server = start(checkpoint, folder)
        try:
            result |= load(server, _REQUESTS.value, _ROBOTS.value, _SIDE.value)
            result |= asyncio.run(fuzz(server, _FRAMES.value))
        finally:
            server[0].send_signal(signal.SIGTERM)
            result["exit_code"] = server[0].wait(60)
        result |= restart(checkpoint, folder, _SIDE.value)
    text = table(result)
    print(text)
    if _APPEND.value:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    wrong = result["errors"] + result["unclean"] + result["wrong_answers"] + result["restart_errors"]
    print(json.dumps(result))
    return int(bool(wrong or result["exit_code"] or result["memory_growth_mb"] > MEMORY_MB))


def tiny_policy(folder: pathlib.Path) -> str:
    """An export as the tests make it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import stored_runs

    from qdepth_jax import export_model

    stored_runs.write_qdepth(folder)
    output, quiet = str(folder / "export"), lambda text: None
    export_model.write_export(str(folder / "policy"), output, export_model.Options(format="safetensors"), quiet)
    return output


def start(checkpoint: str, folder: str, port: int = 0) -> tuple[subprocess.Popen, int]:
    """A server and its port, when it is ready."""
    cache = {"JAX_COMPILATION_CACHE_DIR": folder + "/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), f"--checkpoint={checkpoint}", f"--port={port}"]
    with open(folder + "/server.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | cache)
    line = process.stdout.readline()
    if not line:
        said = pathlib.Path(folder, "server.log").read_text()
        raise RuntimeError(f"the server ended with {process.wait()}:\n{said}")
    return process, json.loads(line)["port"]


def robots(mode: str, port: int, count: int, number: int, side: int, **options) -> subprocess.Popen:
    given = [mode, port, count, number, side]
    command = [_CLIENT.value, str(ROOT / "benchmarks" / "serving_robots.py"), *map(str, given)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


def load(server: tuple[subprocess.Popen, int], requests: int, number: int, side: int) -> dict:
    """Requests of several robots at once, each as soon as it has its answer."""
    began = time.monotonic()
    process = robots("plain", server[1], -(-requests // number), number, side, stderr=subprocess.DEVNULL)
    found = json.loads(process.communicate()[0])
    took = found["milliseconds"]
    return {
        "requests": len(took),
        "errors": len(found["errors"]),
        "p50_ms": statistics.median(took),
        "p99_ms": statistics.quantiles(took, n=100)[98] if len(took) > 1 else took[0],
        "infer_p50_ms": statistics.median(found["infer_ms"]),
        "mean_batch": statistics.mean(found["batches"]),
        "load_average": os.getloadavg()[0],
        "requests_per_s": len(took) / (time.monotonic() - began),
    }


async def fuzz(server: tuple[subprocess.Popen, int], frames: int) -> dict:
    """Malformed frames, and one good client beside them."""
    import numpy as np
    import websockets.asyncio.client as websocket
    from websockets.exceptions import ConnectionClosed

    from benchmarks import malformed_frames, serving_robots
    from qdepth_jax.serve import protocol

    uri, ends, unclean, wrong, memory = f"ws://127.0.0.1:{server[1]}", {}, 0, 0, []
    async with websocket.connect(uri, compression=None, max_size=None) as good:
        request = serving_robots.observation(protocol.unpack(await good.recv()), 1, 64)
        wanted = None
        for number, (kind, frame) in enumerate(malformed_frames.frames(frames, 0, request)):
            async with websocket.connect(uri, compression=None, max_size=None) as connection:
                await connection.recv()
                try:
                    await connection.send(frame)
                    reply = await connection.recv()
                    clean = isinstance(reply, str) and reply.startswith("bad request: ")
                    if clean:
                        await connection.recv()
                        clean = False  # the connection must end
                except ConnectionClosed as error:
                    code = error.rcvd.code if error.rcvd else None
                    clean = code in (1008, 1009)
                    ends[code] = ends.get(code, 0) + 1
            if not clean:
                unclean += 1
                print(f"not refused cleanly: {kind}, frame {number}", file=sys.stderr)
            if number % 50 == 0:
                await good.send(protocol.pack(request))
                actions = protocol.unpack(await good.recv())["actions"]
                wanted = actions if wanted is None else wanted
                wrong += not np.array_equal(actions, wanted)
            if number % 100 == 99:
                memory.append(resident_mb(server[1]))
    # The first tenth of the frames brings the largest sizes once.
    settled = memory[len(memory) // 10] if memory else 0.0
    growth = max(memory, default=0.0) - settled
    return {"frames": frames, "unclean": unclean, "ends": ends, "wrong_answers": wrong,
            "memory_mb": memory[-1] if memory else 0.0, "memory_growth_mb": growth}  # fmt: skip


def resident_mb(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        return float(re.search(r"^process_resident_memory_bytes (\d+)", reply.read().decode(), re.M)[1]) / 1e6


def restart(checkpoint: str, folder: str, side: int) -> dict:
    """Two reconnecting robots, and a server that is killed between two of their answers."""
    process, port = start(checkpoint, folder)
    driven = robots("patient", port, 100, 2, side, stderr=subprocess.PIPE)
    try:
        for _ in range(20):
            driven.stderr.readline()
        # Read on, or the pipe fills up.
        threading.Thread(target=driven.stderr.read, daemon=True).start()
        process.kill()
        process.wait()
        began = time.monotonic()
        process, _ = start(checkpoint, folder, port)
        down = time.monotonic() - began
        found = json.loads(driven.stdout.read())
    finally:
        process.kill()
        process.wait()
        driven.kill()
        driven.wait()
    return {"restart_requests": len(found["actions"]), "restart_errors": len(found["errors"]),
            "reconnects": found["reconnects"], "down_s": down}  # fmt: skip


def table(result: dict) -> str:
    """Markdown, with the command."""
    given = " ".join(arg for arg in sys.argv[1:] if not arg.startswith(("--append", "--client", "--checkpoint")))
    rows = [
        ("requests, errors", f"{result['requests']}, {result['errors']}"),
        ("p50, p99 (ms)", f"{result['p50_ms']:.1f}, {result['p99_ms']:.1f}"),
        ("program, p50 (ms); robots that shared it, mean", f"{result['infer_p50_ms']:.1f}; {result['mean_batch']:.2f}"),
        ("requests per second", f"{result['requests_per_s']:.1f}"),
        ("malformed frames, not refused cleanly", f"{result['frames']}, {result['unclean']}"),
        ("wrong answers to the good client meanwhile", f"{result['wrong_answers']}"),
        ("memory at the end, growth (MB)", f"{result['memory_mb']:.0f}, {result['memory_growth_mb']:.1f}"),
        ("kill -9 and restart: answers, errors", f"{result['restart_requests']}, {result['restart_errors']}"),
        ("until the new server was ready, programs from the cache (s)", f"{result['down_s']:.1f}"),
    ]
    command = f"python benchmarks/serving.py {given}".strip()
    head = f"## {datetime.date.today()} policy server: {os.cpu_count()} cores\n\n`{command}`\n"
    head += f"{result['robots']} robots with openpi-client in one process, the server in another; pictures of "
    head += f"{result['side']} pixels; model: {result['model']}. Load average {result['load_average']:.1f}.\n"
    return head + "\n| figure | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
