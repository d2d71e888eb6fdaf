"""The train command on several processes with simulated devices, what it logged and what its loaders read."""

import json

import multihost
import numpy as np

from qdepth_jax import metrics, watch


def start(folder, index, flags, count, mesh=(1, -1, 1), name="run", devices=4):
    """`count` processes with `devices` devices in all; each records what it read in FOLDER/NAME.NUMBER."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("replica", "fsdp", "tensor"), mesh)]

    def arguments(port, number):
        cluster = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}"]
        return [
            str(multihost.ROOT / "tests" / "train_child.py"), str(folder / f"{name}.{number}"), *flags, *sizes,
            *(cluster if count > 1 else []), f"--workdir={folder / 'workdir'}", f"--config.data.index_dir={index}",
        ]  # fmt: skip

    programs = {
        "JAX_COMPILATION_CACHE_DIR": f"{index}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return multihost.start_all(arguments, count, devices // count, programs)


def run(folder, index, flags, count, mesh=(1, -1, 1), name="run", devices=4):
    folder.mkdir(exist_ok=True)
    done = multihost.finish(start(folder, index, flags, count, mesh, name, devices))
    for number, (code, _, err) in enumerate(done):
        assert code == 0, f"process {number}: {code}\n{err}"
    return done


def rows(folder):
    """(step, kind) -> what was computed, without clocks."""
    out = {}
    for row in metrics.read(folder / "workdir" / "metrics.jsonl"):
        kind = "val" if "val/loss" in row else "train"
        assert (row["step"], kind) not in out, "a step stands twice: more than one process writes"
        out[row["step"], kind] = {k: v for k, v in row.items() if k not in watch.MEASURED}
    return out


def read(folder, count, name="run"):
    """step -> rows of the global batch, as (position, data set, frame), from the records of all processes."""
    out = {}
    for number in range(count):
        for line in (folder / f"{name}.{number}").read_text().splitlines():
            found = json.loads(line)
            out.setdefault(found["step"], []).extend(map(tuple, found["rows"]))
    return {step: sorted(found) for step, found in out.items()}


def assert_same(folder, expected, rtol=1e-5):
    found, largest = rows(folder), {}
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key].keys() == row.keys()
        for name, value in row.items():
            if isinstance(value, float) and value:
                largest[name] = max(largest.get(name, 0.0), abs(found[key][name] / value - 1))
            np.testing.assert_allclose(found[key][name], value, rtol=rtol, atol=1e-6, err_msg=f"{key} {name}")
    print("largest relative difference:", {name: f"{value:.1e}" for name, value in largest.items() if value})
    # What another order or another gradient would do: neighbouring steps differ by far more than the tolerance.
    losses = np.asarray([row["loss"] for (_, kind), row in expected.items() if kind == "train"])
    assert np.median(np.abs(np.diff(losses))) > 20 * rtol * np.median(losses)
