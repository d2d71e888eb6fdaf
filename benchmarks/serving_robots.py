"""Robots with the real openpi-client, for the benchmark and the tests of the policy server. The last line is JSON.

  python benchmarks/serving_robots.py MODE PORT COUNT ROBOTS SIDE

MODE plain: openpi's client; patient: ReconnectingPolicy. ROBOTS of them at once ask COUNT times each, each time with a
seed of its own, and pictures of SIDE pixels. Run by an interpreter that has openpi-client; nothing of ours is imported.
"""

import importlib.util
import json
import pathlib
import sys
import threading
import time

import numpy as np

_CLIENT = pathlib.Path(__file__).resolve().parent.parent / "qdepth_jax" / "serve" / "client.py"
PROMPTS = ("open the drawer", "pick up the bowl", "close the drawer")


def observation(metadata, seed, side):
    """What the server's metadata ask for, at random."""
    rng, found = np.random.default_rng(seed), {"seed": seed}
    for key, wanted in sorted(metadata["observation"].items()):
        if wanted.get("dtype") == "uint8":
            found[key] = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        elif "shape" in wanted:
            found[key] = rng.normal(size=wanted["shape"])
        else:
            found[key] = PROMPTS[seed % len(PROMPTS)]
    return found


def connect(mode, port):
    if mode == "plain":
        from openpi_client import websocket_client_policy

        return websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port)
    spec = importlib.util.spec_from_file_location("client", _CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ReconnectingPolicy("127.0.0.1", port, patience_s=300.0)


def main(mode, port, count, robots, side):
    found = {"actions": {}, "milliseconds": [], "infer_ms": [], "batches": [], "errors": [], "reconnects": 0}
    lock = threading.Lock()

    def drive(robot):
        try:
            policy = connect(mode, port)
            metadata = policy.get_server_metadata()
            for turn in range(count):
                seed = robot * count + turn
                request, began = observation(metadata, seed, side), time.monotonic()
                answer = policy.infer(request)
                took = 1e3 * (time.monotonic() - began)
                with lock:
                    found["actions"][seed] = np.asarray(answer["actions"], np.float64).tolist()
                    found["milliseconds"].append(took)
                    found["infer_ms"].append(answer["policy_timing"]["infer_ms"])
                    found["batches"].append(answer["server_timing"]["batch"])
                # One write: print() sends the end of the line apart, and other threads come between.
                sys.stderr.write(f"answer {seed}\n")
                sys.stderr.flush()
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
