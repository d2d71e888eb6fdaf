r"""Loss and every gradient on 8 simulated devices beside one device: all meshes x accumulation x recomputation.

The real train step on a small policy in float32. Of each combination: the relative difference of the loss, and of the
worst leaf the largest difference over that leaf's largest gradient. One leaf has no gradient but rounding (a bias of
the keys moves all logits of a row alike) and is measured against the largest gradient of all.

python benchmarks/sharded_gradients.py
python benchmarks/sharded_gradients.py --meshes=1x8x1,2x2x2 --micro_batches=1,2 --remat=none,full
"""

import json
import os
import sys
from typing import Any

from absl import flags

from qdepth_jax import command

_MESHES = flags.DEFINE_list(
    "meshes", ["1x8x1", "1x1x8", "8x1x1", "2x4x1", "1x4x2", "2x2x2", "1x2x4"], "replica x fsdp x tensor of 8 devices."
)
_MICRO = flags.DEFINE_list("micro_batches", ["1", "4"], "Parts that the step accumulates over.")
_REMAT = flags.DEFINE_list("remat", ["none", "full"], "Names of models/stack.REMAT.")
_LIMIT = flags.DEFINE_float("limit", 1e-5, "Exit status 1 above this difference.")

NO_GRADIENT = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"
BATCH = 32


def main(argv: list[str]) -> int:
    """Prints a line per combination to stderr and the JSON object last; 1 where a difference is above the limit."""
    del argv
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # the compiler's time is all the time there is
    start, *expected = step("1x1x1", 1, "none")
    rows = []
    for mesh in _MESHES.value:
        for micro_batches in map(int, _MICRO.value):
            for remat in _REMAT.value:
                _, *found = step(mesh, micro_batches, remat, start)
                row = {"mesh": mesh, "micro_batches": micro_batches, "remat": remat} | compare(expected, found)
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    worst = {name: max(row[name] for row in rows) for name in ("loss", "gradient", "zero_gradient")}
    print(json.dumps({"combinations": len(rows), "worst": worst, "limit": _LIMIT.value, "rows": rows}))
    return int(max(worst.values()) > _LIMIT.value)


def step(mesh_name: str, micro_batches: int, remat: str, start: Any = None) -> tuple[Any, dict[str, Any], float]:
    """(state before on the host, gradients by path, loss) of one train step on a fixed batch; start None is fresh."""
    import functools
    import math

    import jax
    import jax.numpy as jnp
    import optax

    from qdepth_jax import config as config_lib
    from qdepth_jax import sharding, train_loop, train_step
    from qdepth_jax.models import policy, siglip

    vision = siglip.SiglipConfig(image_size=28, patch=14, width=32, depth=2, heads=8, mlp=32)
    config = policy.sized("tiny", layers=2, heads=8, siglip=vision, remat=remat)
    objective, frozen = policy.make_objective(config), policy.frozen_table(config)
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )
    sizes = tuple(map(int, mesh_name.split("x")))
    mesh = sharding.make_mesh(config_lib.MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    key = jax.random.key(0)
    init = functools.partial(train_step.init_state, objective=objective, tx=keep, ema=False)
    placed = sharding.state_shardings(mesh, jax.eval_shape(init, key))
    run = functools.partial(
        train_step.train_step,
        objective=objective,
        tx=keep,
        frozen=frozen,
        micro_batches=micro_batches,
        ema_decay=0.0,
        placed=placed.params,
    )
    with jax.set_mesh(mesh):
        start = jax.device_get(jax.jit(init)(key)) if start is None else start
        state = jax.device_put(start, placed)
        batch = train_loop.put_batch(_batch(config, objective.features), mesh)
        end, metrics = jax.device_get(jax.jit(run, out_shardings=(placed, None))(state, batch, key))
    leaves = jax.tree_util.tree_leaves_with_path(end.opt_state)
    return start, {sharding.path_of(path): x for path, x in leaves}, float(metrics["loss"])


def _batch(config: Any, features: tuple[str, ...]) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    side, codes = config.siglip.image_size, (BATCH, config.depth.tokens)
    everything = {
        "image_main": rng.integers(0, 256, (BATCH, side, side, 3)).astype(np.uint8),
        "text": rng.integers(0, config.vocabulary, (BATCH, config.text_length)).astype(np.int32),
        "proprio": rng.normal(size=(BATCH, config.proprio_steps, config.proprio_dim)).astype(np.float32),
        "action": rng.normal(size=(BATCH, config.horizon, config.action_dim)).astype(np.float32),
        "action_mask": rng.random((BATCH, config.horizon)) < 0.8,
        "position": np.arange(BATCH, dtype=np.uint32),
        "depth_tokens": rng.integers(0, config.depth.codes, codes).astype(np.int32),
        "depth_tokens_mask": rng.random(codes) < 0.9,
    }
    return {name: everything[name] for name in features}


def compare(expected: tuple[dict[str, Any], float], found: tuple[dict[str, Any], float]) -> dict[str, float | str]:
    """Relative differences of two (gradients by path, loss)."""
    import numpy as np

    (grads, loss), (others, other_loss) = expected, found
    largest = max(float(np.max(np.abs(x))) for x in grads.values())
    errors = {}
    for path, x in grads.items():
        own = largest if path == NO_GRADIENT else float(np.max(np.abs(x)))
        difference = float(np.max(np.abs(x - others[path])))
        errors[path] = difference / own if difference else 0.0
    zero = errors.pop(NO_GRADIENT)
    leaf = max(errors, key=errors.__getitem__)
    return {"loss": abs(loss - other_loss) / abs(loss), "gradient": errors[leaf], "leaf": leaf, "zero_gradient": zero}


if __name__ == "__main__":
    command.run(main)
