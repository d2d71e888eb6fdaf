"""Memory of an import: a synthetic PaliGemma file of full width and two layers, to eight simulated devices.

  python benchmarks/import_memory.py [--placed_dtype=float32|bfloat16] [--directory=DIR]

Writes the file (bfloat16, about 1.5 GB), imports it in a process of its own, and removes it. Simulated devices live in
host memory, so what the placed arrays hold is taken off: `host_mb` is the highest resident size while the weights were
read and placed, less the baseline (same process before: modules imported, devices up, file opened, shapes known) and
less the bytes of the arrays placed. `command_host_mb` is the same over the whole command, with the writing of the
checkpoint. `device_over_share` is the largest that lay on one device at any block, over an eighth of all parameters.
Limits: host_mb <= file / 4 + 1 GB, device_over_share <= 1.15. Prints one JSON line; exit code 1 above a limit.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from absl import flags

_DTYPE = flags.DEFINE_enum("placed_dtype", "float32", ("float32", "bfloat16"), "of the placed parameters")
_DIRECTORY = flags.DEFINE_string("directory", "", "where the file is written; default: the system's temporary folder")
_CHILD = flags.DEFINE_string("child", "", "internal: the file to import")

DEVICES, LAYERS = 8, 2
ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    del argv
    if _CHILD.value:
        print(json.dumps(measure(_CHILD.value)))
        return 0
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value or None) as folder:
        path = os.path.join(folder, "paligemma.npz")
        write(path)
        size = os.path.getsize(path)
        command = [sys.executable, __file__, f"--child={path}", f"--placed_dtype={_DTYPE.value}"]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    limit = size / 4 + 10**9
    good = found["host_mb"] * 1e6 <= limit and found["device_over_share"] <= 1.15
    print(json.dumps({"file_mb": round(size / 1e6, 1), "limit_mb": round(limit / 1e6, 1), **found, "ok": good}))
    return 0 if good else 1


def write(path: str) -> None:
    """A big_vision .npz of PaliGemma 1 with few layers, in bfloat16; never more than one block in memory."""
    import ml_dtypes
    import numpy as np

    from qdepth_jax.models import paligemma, siglip
    from qdepth_jax.weights import big_vision, importing, table

    config = paligemma.PaligemmaConfig(siglip=siglip.SiglipConfig(depth=LAYERS), layers=LAYERS)
    block = np.random.default_rng(0).normal(size=2**20).astype(ml_dtypes.bfloat16).tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        for key, shape in table.keys(big_vision.rows(config), importing.shapes_of(config)).items():
            with file.open(f"params/{key}.npy", "w", force_zip64=True) as member:
                header = {"descr": "|V2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                left = 2 * int(np.prod(shape))
                while left:
                    left -= member.write(block[:left])


def measure(path: str) -> dict:
    """Imports the file here."""
    import jax

    from qdepth_jax import config as config_lib
    from qdepth_jax import sharding
    from qdepth_jax.weights import importing
    from tools import import_weights

    opened = importing.open_weights("big_vision", path)
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, -1, 1))
    jax.block_until_ready([jax.device_put(1.0, device) for device in jax.devices()])
    highest = [0]

    def look() -> None:
        # A shard is listed as part of its array and as an array of its own: counted once, by its address.
        found = {}
        for array in jax.live_arrays():
            for shard in array.addressable_shards:
                found[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        held = dict.fromkeys(jax.devices(), 0)
        for (device, _), size in found.items():
            held[device] += size
        highest[0] = max(highest[0], *held.values())

    baseline = _status("VmRSS")
    _reset_peak()
    loaded = importing.place(opened, mesh, _DTYPE.value, on_block=look)
    peak = _status("VmHWM")
    placed = sum(shard.data.nbytes for x in jax.tree.leaves(loaded.params) for shard in x.addressable_shards)
    summary = importing.summary(opened, loaded)
    meta = {"config": importing.experiment(opened), "source": summary["files"]}
    import_weights.write(os.path.join(os.path.dirname(path), "checkpoint"), loaded.params, meta)
    return {
        "dtype": _DTYPE.value,
        "devices": len(jax.devices()),
        "parameters": summary["parameters"],
        "baseline_mb": round(baseline / 1e6, 1),
        "placed_mb": round(placed / 1e6, 1),
        "host_mb": round((peak - baseline - placed) / 1e6, 1),
        "command_host_mb": round((_status("VmHWM") - baseline - placed) / 1e6, 1),
        "device_over_share": round(highest[0] / (placed / DEVICES), 3),
    }


def _status(name: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def _reset_peak() -> None:
    """VmHWM starts again from the present size (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's qdepth_jax before an installed one
    from qdepth_jax import command

    command.run(main)
