"""What the loop costs beside the step, and how long a checkpoint keeps it from the next step.

  python benchmarks/loop_overhead.py [--step_seconds=0.2] [--steps=150] [--append_results]

The real loop on the demo model and its data: loader, batches to the device, the whole train state donated, metrics of
every step to metrics.jsonl and TensorBoard, three checkpoints. Only the forward and backward pass is replaced, by a
wait of --step_seconds inside the compiled program: on a CPU the loop would otherwise compete with the "device" for the
same cores, on an accelerator it does not. The wait is compiled C++ (g++ is needed), because a Python callback would
wait for the interpreter's lock, up to 5 ms a time, which no device does. The same compiled program on one waiting
batch, before and after, is the step alone. The last line of stdout is JSON; exit code 1 if the overhead reaches 2 % or
a save stalls for a step.
"""

import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

_SECONDS = flags.DEFINE_float("step_seconds", 0.2, "how long a step waits", lower_bound=0.001)
_STEPS = flags.DEFINE_integer("steps", 150, "steps of the loop", lower_bound=6)
_WAIT = """
#include <ctime>
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error Wait(double seconds, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  struct timespec left = {time_t(seconds), long((seconds - time_t(seconds)) * 1e9)};
  while (nanosleep(&left, &left) != 0) {}
  y->typed_data()[0] = 0.0f * x.typed_data()[0];
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(qdepth_wait, Wait,
    ffi::Ffi::Bind().Attr<double>("seconds").Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    result = measure(_SECONDS.value, _STEPS.value)
    text = table(result)
    print(text)
    if _APPEND.value:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    holds = result["overhead"] < 0.02 and result["stall_seconds_max"] < result["step_alone_seconds"]
    print(json.dumps(result | {"holds": holds}))
    return 0 if holds else 1


def measure(step_seconds: float, steps: int) -> dict:
    """Figures of one run; seconds."""
    import jax

    from experiments import no_depth_loss
    from qdepth_jax import experiment, metrics, train_loop

    config = no_depth_loss.get_config("demo")
    config.train.total_steps = steps
    config.train.log_every = 1
    config.train.eval_every = 0
    config.train.checkpoint_every = steps // 3
    run = experiment.assemble(config)
    run = run._replace(objective=waiting(run.objective, step_seconds))
    bare = Bare(run)
    before = bare.seconds(20)
    with tempfile.TemporaryDirectory() as workdir:
        train_loop.run_training(run, workdir, train_loop.Extras(tensorboard=True))
        rows = metrics.read(os.path.join(workdir, "metrics.jsonl"))
    alone = statistics.median(before + bare.seconds(20))
    # The first two turns dispatch without waiting: two steps run behind the host.
    turns = [1 / row["steps_per_second"] for row in rows[3:]]
    stalls = [row["checkpoint_stall_seconds"] for row in rows if "checkpoint_stall_seconds" in row]
    return {
        "step_alone_seconds": alone,
        "turn_seconds_mean": statistics.mean(turns),
        "turn_seconds_median": statistics.median(turns),
        "overhead": statistics.mean(turns) / alone - 1.0,
        "overhead_median": statistics.median(turns) / alone - 1.0,
        "data_wait_share": statistics.mean(row["data_wait_share"] for row in rows[3:]),
        "stall_seconds_max": max(stalls),
        "state_mb": bare.state_bytes / 1e6,
        "steps": len(turns),
        "devices": jax.device_count(),
    }


def build_wait() -> None:
    """Compiles _WAIT and makes it known to XLA as "qdepth_wait"."""
    import ctypes

    import jax

    from qdepth_jax import errors

    if shutil.which("g++") is None:
        raise errors.UserError("this benchmark compiles 10 lines of C++: install g++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = pathlib.Path(folder) / "wait.cc", pathlib.Path(folder) / "wait.so"
        source.write_text(_WAIT, encoding="utf-8")
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", f"-I{jax.ffi.include_dir()}", source, "-o", library]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise errors.UserError(f"g++ does not compile the wait:\n{done.stderr}")
        loaded = ctypes.cdll.LoadLibrary(str(library))
    jax.ffi.register_ffi_target("qdepth_wait", jax.ffi.pycapsule(loaded.qdepth_wait), platform="cpu")


def waiting(objective, seconds: float):
    """The objective with its parameters and batch, but a wait instead of the network."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qdepth_jax.models import objective as objective_lib

    build_wait()
    call = jax.ffi.ffi_call("qdepth_wait", jax.ShapeDtypeStruct((), jnp.float32), has_side_effect=True)

    def loss(params, state, batch, key, step):
        # Everything that a step reads is there before the wait begins, and the step ends after it.
        seen = sum(jnp.sum(batch[name][:1].astype(jnp.float32)) for name in sorted(batch)) + step
        waited = jax.lax.stop_gradient(call(jax.lax.stop_gradient(seen), seconds=np.float64(seconds)))
        total = sum(jnp.mean(jnp.square(p)) for p in jax.tree.leaves(params)) + waited
        return objective_lib.LossOutput(total, {"loss": total}, state)

    return objective._replace(loss=loss, augment=None)


class Bare:
    """The compiled step on one batch that lies on the device, two steps in flight as in the loop."""

    def __init__(self, run):
        import jax

        from qdepth_jax import train_loop, train_step

        self._jax, self._mesh, self._key = jax, run.mesh, jax.random.key(run.seed)
        _, placed = train_loop.abstract_state(run)
        with jax.set_mesh(run.mesh):
            init = jax.jit(
                lambda key: train_step.init_state(key, run.objective, run.tx, run.ema_decay > 0), out_shardings=placed
            )
            self._state = init(self._key)
            batches = run.batches(0)
            self._batch = train_loop.put_batch(next(batches), run.mesh, run.train.batch_size)
            batches.close()
            self._step = train_loop.compile_step(run, self._state, self._batch, self._key)
        self.state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._state))

    def seconds(self, steps: int) -> list[float]:
        """Seconds of each step."""
        out, running = [], []
        with self._jax.set_mesh(self._mesh):
            mark = time.perf_counter()
            for _ in range(steps + 3):
                self._state, values = self._step(self._state, self._batch, self._key)
                running.append(values)
                if len(running) > 2:
                    self._jax.block_until_ready(running.pop(0))
                now = time.perf_counter()
                out.append(now - mark)
                mark = now
        return out[3:]


def table(result: dict) -> str:
    """The figures as Markdown."""
    today = datetime.date.today().isoformat()
    lines = [
        f"### Loop beside the step, {today}",
        "",
        f"`python benchmarks/loop_overhead.py`; {os.cpu_count()} shared CPU cores, {result['steps']} steps, demo model "
        f"({result['state_mb']:.0f} MB of state), every step logged.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| step alone (median) | {1e3 * result['step_alone_seconds']:.1f} ms |",
        f"| turn of the loop, mean / median | {1e3 * result['turn_seconds_mean']:.1f} / "
        f"{1e3 * result['turn_seconds_median']:.1f} ms |",
        f"| overhead, mean / median | {result['overhead']:.2%} / {result['overhead_median']:.2%} |",
        f"| share of the time spent waiting for data | {result['data_wait_share']:.2%} |",
        f"| longest stall by a checkpoint | {1e3 * result['stall_seconds_max']:.1f} ms |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
