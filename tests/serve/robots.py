"""Robots with the real openpi-client: run by an interpreter that has it, prints one line of JSON.

  python robots.py MODE PORT COUNT ROBOTS SIDE

MODE plain: openpi's client; patient: ReconnectingPolicy. Every robot asks COUNT times, with seeds of its own.
"""

import importlib.util
import json
import pathlib
import sys
import threading
import time

import numpy as np
from openpi_client import websocket_client_policy

_CLIENT = pathlib.Path(__file__).resolve().parents[2] / "qdepth_jax" / "serve" / "client.py"


def observation(seed, side):
    rng = np.random.default_rng(seed)
    return {
        "observation/image": rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=7),
        "prompt": ("open the drawer", "pick up the bowl", "close the drawer")[seed % 3],
        "seed": seed,
    }


def connect(mode, port):
    if mode == "plain":
        return websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port)
    spec = importlib.util.spec_from_file_location("client", _CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ReconnectingPolicy("127.0.0.1", port, patience_s=300.0)


def main(mode, port, count, robots, side):
    found = {"actions": {}, "milliseconds": [], "batches": [], "errors": [], "reconnects": 0}
    lock = threading.Lock()

    def drive(robot):
        try:
            policy = connect(mode, port)
            for turn in range(count):
                seed, began = robot * count + turn, time.monotonic()
                answer = policy.infer(observation(seed, side))
                took = 1e3 * (time.monotonic() - began)
                with lock:
                    found["actions"][seed] = np.asarray(answer["actions"], np.float64).tolist()
                    found["milliseconds"].append(took)
                    found["batches"].append(answer["server_timing"]["batch"])
                print(f"answer {seed}", file=sys.stderr, flush=True)
                if mode == "patient":
                    time.sleep(0.05)
            with lock:
                found["reconnects"] += getattr(policy, "reconnects", 0)
        except Exception as error:
            with lock:
                found["errors"].append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=drive, args=(robot,)) for robot in range(robots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
