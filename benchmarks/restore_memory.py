"""Memory while a checkpoint is loaded into a sharded state, the stall of a save, and memory over many saves.

  python benchmarks/restore_memory.py [--state_mb=1600] [--scratch=DIR] [--parts=restore,init_from,saves]

Eight simulated CPU devices, whose memory is this process's own: peak RSS while loading minus RSS before it is host and
device memory in one figure. Each measurement runs in a process of its own and reads the peak (VmHWM) after a reset of
/proc/self/clear_refs; before, a small checkpoint is read in the same way, so that imports do not count.

  restore     a checkpoint saved on mesh (1, 8, 1) into the same mesh, (2, 4, 1), (1, 2, 4) and one device
  init_from   its parameters into a fresh, sharded state by earlier_stages.take_parameters
  saves       seconds for which a save holds up its caller, and RSS over --saves saves of a --small_mb state

The bound is 1.15 x the sharded state + one leaf (a replicated leaf counts once per device). The last line of stdout is
JSON; exit code 1 if a peak is above its bound.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's qdepth_jax before an installed one

_STATE = flags.DEFINE_integer("state_mb", 1600, "MB (2**20 bytes) of the state: params, two moments and average")
_SMALL = flags.DEFINE_integer("small_mb", 100, "MB of the state that is saved many times")
_SAVES = flags.DEFINE_integer("saves", 30, "how many times")
_SCRATCH = flags.DEFINE_string("scratch", str(ROOT / "runs" / "benchmark"), "folder for the checkpoints")
_PARTS = flags.DEFINE_list("parts", "restore,init_from,saves", "which measurements")

MB = 2**20
LIMIT = 1.15


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    folder = pathlib.Path(_SCRATCH.value) / "restore_memory"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result: dict = {"benchmark": "restore_memory", "state_mb": _STATE.value}
    try:
        result["write"] = _run("write", folder, _STATE.value, [1, 8, 1], 2)
        if "restore" in _PARTS.value:
            for mesh in ([1, 8, 1], [2, 4, 1], [1, 2, 4], [1, 1, 1]):
                result["restore_" + "x".join(map(str, mesh))] = _run("restore", folder, _STATE.value, mesh, 0)
        if "init_from" in _PARTS.value:
            result["init_from"] = _run("init_from", folder, _STATE.value, [1, 8, 1], 0)
        if "saves" in _PARTS.value:
            result["saves"] = _run("write", folder / "many", _SMALL.value, [1, 8, 1], _SAVES.value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    holds = all(row["holds"] for row in result.values() if isinstance(row, dict) and "holds" in row)
    print(json.dumps(result | {"holds": holds}))
    return 0 if holds else 1


def _run(what: str, folder: pathlib.Path, size_mb: int, mesh: list[int], times: int) -> dict:
    asked = json.dumps([what, str(folder), size_mb, mesh, times])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--child", asked], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    row = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{what} {mesh}: {json.dumps(row)}", file=sys.stderr, flush=True)
    return row


def _shapes(size_mb: int) -> dict:
    """Parameters of a quarter of `size_mb`, in the proportions of a scanned policy."""
    depth, width, mlp, heads, head = 6, 256, 1024, 8, 64
    vocabulary, layer = 4096, lambda width, mlp: 3 * width * mlp + 2 * width * heads * head
    wanted = size_mb * MB / 4 / 4  # of four copies in float32
    while depth * layer(width, mlp) + vocabulary * width < wanted:
        width, mlp, vocabulary = width + 64, mlp + 256, vocabulary + 4096
    return {
        "llm": {
            "embedder": {"input_embedding": (vocabulary, width)},
            "layers": {
                "attn": {
                    "q_einsum": {"w": (depth, heads, width, head)},
                    "attn_vec_einsum": {"w": (depth, heads, head, width)},
                },
                "mlp": {"gating_einsum": (depth, 2, width, mlp), "linear": (depth, mlp, width)},
                "norm": {"scale": (depth, width)},
            },
        }
    }


def _target(size_mb: int, mesh_sizes: list[int]):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh

    from qdepth_jax import checkpoint_read, sharding, train_step

    devices = np.asarray(jax.devices()[: int(np.prod(mesh_sizes))]).reshape(mesh_sizes)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731

    def init():
        keys = iter(jax.random.split(jax.random.key(0), 16))
        params = jax.tree.map(
            lambda s: jax.random.normal(next(keys), s, jnp.float32), _shapes(size_mb), is_leaf=is_shape
        )
        scalars = dict.fromkeys(checkpoint_read.scalar_fields(), jnp.zeros((), jnp.int32))
        opt_state = optax.scale_by_adam().init(params)
        ema = jax.tree.map(jnp.copy, params)
        return train_step.TrainState(**scalars, params=params, state={}, opt_state=opt_state, ema=ema)

    shapes = jax.eval_shape(init)
    placed = sharding.state_shardings(mesh, shapes)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
    return target, jax.jit(init, out_shardings=placed)


def _sizes(tree) -> tuple[float, float]:
    """MB of a tree over all its devices, and of its largest leaf."""
    import jax
    import numpy as np

    sizes = [
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.device_set) / MB
        for x in jax.tree.leaves(tree)
    ]
    return float(sum(sizes)), float(max(sizes))


def _child(what: str, folder: str, size_mb: int, mesh: list[int], times: int) -> dict:
    import jax

    from qdepth_jax import checkpoint
    from qdepth_jax import config as config_lib

    train = config_lib.TrainConfig(keep_checkpoints=1)
    if what == "write":
        target, init = _target(size_mb, mesh)
        state = jax.block_until_ready(init())
        stalls, waits, sums, rss = [], [], [], []
        with checkpoint.open_manager(folder, train) as manager:
            for step in range(1, times + 1):
                start = time.monotonic()
                checkpoint.checkpoint_read.table(checkpoint.checkpoint_read.items_of(state))
                sums.append(time.monotonic() - start)
                stalls.append(checkpoint.save(manager, state, {"step": step}, step))
                start = time.monotonic()
                manager.wait_until_finished()
                waits.append(time.monotonic() - start)
                rss.append(_status("VmRSS"))
        return {
            "state_mb": _sizes(target)[0],
            "stall_seconds": _spread(stalls),
            "of_it_sums_seconds": _spread(sums),
            "written_after_seconds": _spread(waits),
            "rss_mb_after_saves": {
                n + 1: rss[n]
                for n in sorted({0, 1, 4, times // 4, times // 2, 3 * times // 4, times - 1} & set(range(times)))
            },
        }

    small = str(pathlib.Path(folder) / f"small_{what}_{'x'.join(map(str, mesh))}")
    target, init = _target(4, mesh)
    with checkpoint.open_manager(small, train) as manager:
        checkpoint.save(manager, init(), {"step": 1}, 1)
    _load(what, small, *_target(4, mesh))
    target, init = _target(size_mb, mesh)
    state = None
    if what == "init_from":
        state = jax.block_until_ready(init())
    before, fresh = _status("VmRSS"), _sizes(target)[0] if state is not None else 0.0
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start = time.monotonic()
    loaded = _load(what, folder, target, lambda: state)
    seconds, peak = time.monotonic() - start, _status("VmHWM") - before + fresh
    total, leaf = _sizes(loaded)
    return {
        "state_mb": total,
        "largest_leaf_mb": leaf,
        "peak_mb": peak,
        "bound_mb": LIMIT * total + leaf,
        "peak_over_state": peak / total,
        "holds": peak <= LIMIT * total + leaf,
        "seconds": seconds,
    }


def _load(what: str, folder: str, target, init):
    import jax

    from qdepth_jax import checkpoint, earlier_stages
    from qdepth_jax import config as config_lib

    if what == "restore":
        with checkpoint.open_manager(folder, config_lib.TrainConfig(keep_checkpoints=1)) as manager:
            return jax.block_until_ready(checkpoint.restore_latest(manager, target)[0])
    return jax.block_until_ready(earlier_stages.take_parameters(init(), folder))


def _spread(values: list[float]) -> dict:
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "min": ordered[0], "max": ordered[-1]}


def _status(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_child(*json.loads(sys.argv[2]))))
        sys.exit()
    from qdepth_jax import command

    command.run(main)
