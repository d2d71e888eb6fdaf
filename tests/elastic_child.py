"""Saves a run on 8 devices and resumes it on other meshes; started by test_elastic.py with 16 simulated devices.

python tests/elastic_child.py FOLDER     prints one JSON line: {"name": {"rows": [...], "positions": [...]}}
"""

import dataclasses
import json
import pathlib
import shutil
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parent.parent)]

import jax  # noqa: E402
import tiny_runs  # noqa: E402

from qdepth_jax import config as config_lib  # noqa: E402
from qdepth_jax import experiment, metrics, sharding, train_loop  # noqa: E402

HALF, WHOLE = 6, 12
MESHES = {  # devices, (replica, fsdp, tensor), micro-batches
    "one": (1, (1, 1, 1), 1),
    "two": (2, (1, 2, 1), 4),
    "four": (4, (2, 1, 2), 1),
    "sixteen": (16, (2, 4, 2), 2),
}


def train(workdir, devices, sizes, micro_batches, steps):
    """(metric rows, positions of the examples of every step taken)."""
    config = tiny_runs.config(train__total_steps=steps, train__checkpoint_every=HALF)
    config.data.index_dir = str(pathlib.Path(workdir).parent / "index")
    run = experiment.assemble(config)
    # Assembled for all devices, run on some of them.
    run.config["train"]["micro_batches"] = micro_batches
    run = run._replace(
        mesh=sharding.make_mesh(config_lib.MeshConfig(*sizes), jax.devices()[:devices]),
        train=dataclasses.replace(run.train, micro_batches=micro_batches),
    )
    seen = []

    def batches(start):
        for step, batch in enumerate(run.batches(start), start + 1):
            seen.append([step, *batch["position"].tolist()])
            yield batch

    _, finished = train_loop.run_training(run._replace(batches=batches), str(workdir))
    assert finished
    return {"rows": metrics.read(pathlib.Path(workdir) / "metrics.jsonl"), "positions": seen}


def main(folder):
    folder = pathlib.Path(folder)
    out = {"uninterrupted": train(folder / "uninterrupted", 1, (1, 1, 1), 1, WHOLE)}
    out["saved"] = train(folder / "saved", 8, (1, 4, 2), 1, HALF)
    for name, (devices, sizes, micro_batches) in MESHES.items():
        shutil.copytree(folder / "saved", folder / name)
        out[name] = train(folder / name, devices, sizes, micro_batches, WHOLE)
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
