"""What fewer flow steps, other solvers and int8 weights change in a policy's actions.

  python benchmarks/inference_accuracy.py --checkpoint=runs/demo/policy [--batches=4] [--append_results]

Held-out frames of the policy's own data, one noise for each. Solvers: distance from --reference Euler steps with the
same noise. Weights: int8 and bfloat16 activations against float32, at the policy's own number of Euler steps. A
distance is the root mean square over all actions, divided by the spread (standard deviation) of the reference's
actions; beside it the error to the demonstrated actions, which says whether a distance matters. The last line of stdout
is JSON.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import sys
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's qdepth_jax before an installed one

from qdepth_jax import command  # noqa: E402

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a policy", required=True)
_BATCHES = flags.DEFINE_integer("batches", 4, "batches of 32 held-out frames", lower_bound=1)
_REFERENCE = flags.DEFINE_integer("reference", 100, "Euler steps that count as exact", lower_bound=2)
_APPEND = flags.DEFINE_bool("append_results", False, "append the tables to benchmarks/RESULTS.md")

# (solver, steps): rows with equal numbers of network evaluations stand together.
RUNS = (
    ("euler", 1), ("euler", 2), ("midpoint", 1), ("heun", 1), ("euler", 4), ("midpoint", 2), ("heun", 2),
    ("euler", 10), ("midpoint", 5), ("heun", 5), ("euler", 20), ("midpoint", 10), ("heun", 10),
)  # fmt: skip


def main(argv: list[str]) -> None:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    result = measure()
    text = table(result)
    print(text)
    if _APPEND.value:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    print(json.dumps(result))


def measure() -> dict[str, Any]:
    import jax
    import ml_collections
    import numpy as np

    from qdepth_jax import earlier_stages, experiment, progress
    from qdepth_jax.data import loader, normalise
    from qdepth_jax.models import flow, inference

    _, config, variables, meta = earlier_stages.load_model(_CHECKPOINT.value)
    stored = ml_collections.ConfigDict(meta["config"])
    data = experiment.held_out_section(stored, experiment.data_section(stored))
    normalisers = {
        name: {key: normalise.Normaliser.from_json(text) for key, text in pair.items()}
        for name, pair in meta["data"]["normalisation"].items()
    }
    features = [f"image_{view}" for view in config.views] + ["text", "proprio", "position", "action", "action_mask"]
    reader = loader.Loader(data, features, 32, normalisers=normalisers)
    # Own number of steps, float32, is what everything else is compared with.
    half = dataclasses.replace(config, dtype="bfloat16")
    networks = {
        name: _network(used, variables, weights)
        for name, used, weights in (
            ("float32", config, "float"),
            ("bfloat16", half, "float"),
            ("int8", config, "int8"),
            ("int8, bfloat16", half, "int8"),
        )
    }
    draw = jax.jit(lambda keys: flow.sample_noise(keys, (config.horizon, config.action_dim)))
    found: dict[str, list[np.ndarray]] = {}
    batches = min(_BATCHES.value, max(1, reader.frames // 32))
    bar = progress.Progress(batches * len(networks), "accuracy", unit="run")
    for number in range(batches):
        batch = reader.batch(number)
        noise = draw(flow.example_keys(jax.random.key(0), batch["position"]))
        given = {key: batch[key] for key in batch if key not in ("action", "action_mask", "position")}
        for name, (start, velocity, _) in networks.items():
            cache, codes = start(given)
            runs = (*RUNS, ("euler", _REFERENCE.value)) if name == "float32" else ()
            for solver, steps in {*runs, ("euler", config.flow.steps)}:
                at = functools.partial(velocity, given, cache)
                found.setdefault(f"{name} {solver} {steps}", []).append(_integrate(config, solver, steps, at, noise))
            found.setdefault(f"{name} codes", []).append(np.asarray(codes))
            bar.update()
        found.setdefault("true", []).append(np.asarray(batch["action"]))
        found.setdefault("mask", []).append(np.asarray(batch["action_mask"]))
    bar.close()
    reader.close()
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    exact, own = arrays[f"float32 euler {_REFERENCE.value}"], f"euler {config.flow.steps}"
    plain = arrays[f"float32 {own}"]

    def against(actions: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        error = np.abs(actions - arrays["true"])[arrays["mask"]].mean()
        spread = reference.reshape(-1, reference.shape[-1]).std(axis=0)
        away = (actions - reference) / spread
        return {"rms": float(np.sqrt((away**2).mean())), "max": float(np.abs(away).max()), "error": float(error)}

    solvers = {f"{solver} {steps}": against(arrays[f"float32 {solver} {steps}"], exact) for solver, steps in RUNS}
    weights = {}
    for name, (_, _, size) in networks.items():
        weights[name] = against(arrays[f"{name} {own}"], plain) | {"bytes": size}
        if config.depth_labels == "codes":
            weights[name]["same_codes"] = float((arrays[f"{name} codes"] == arrays["float32 codes"]).mean())
    return {
        "frames": len(exact),
        "reference_steps": _REFERENCE.value,
        "own": own,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "reference_error": against(exact, exact)["error"],
        "solvers": solvers,
        "weights": weights,
        "trained_bytes": inference.size_in_bytes(variables["params"]),
    }


def _network(config, variables, weights: str):
    """-> start(batch) -> (cache, depth codes), velocity(batch, cache, x, t), bytes of the packed parameters."""
    import jax
    import jax.numpy as jnp

    from qdepth_jax.models import inference, policy, sampling

    packed, network = inference.pack(config, variables["params"], weights), policy.Policy(config)
    asked = config.depth_labels == "codes"

    @jax.jit
    def start(packed, batch):
        given = (policy.prepare_images(config, batch), batch["text"], batch.get("proprio"))
        cache, depth = network.apply(
            {"params": inference.unpack(packed)}, *given, depth=asked, method=policy.Policy.prefill
        )
        codes = jnp.argmax(sampling.depth_of(config, variables["state"], depth), axis=-1) if asked else jnp.zeros(0)
        return cache, codes

    @jax.jit
    def velocity(packed, batch, cache, x, t):
        variables = {"params": inference.unpack(packed)}
        return network.apply(variables, cache, batch["text"], x, t, method=policy.Policy.denoise)

    return (
        lambda batch: start(packed, batch),
        lambda batch, cache, x, t: velocity(packed, batch, cache, x, t),
        inference.size_in_bytes(packed),
    )


def _integrate(config, solver: str, steps: int, velocity, noise):
    """`flow.integrate` step by step in Python, so that one compiled velocity serves every solver."""
    import jax.numpy as jnp
    import numpy as np

    from qdepth_jax.models import flow

    direction = -1.0 if config.flow.noise_at else 1.0
    x, t, dt = noise, np.float32(config.flow.noise_at), direction / steps
    at = lambda x, t: velocity(x, np.full(len(x), t, np.float32))  # noqa: E731
    for _ in range(steps):
        x, t = x + dt * flow.SOLVERS[solver][0](at, x, t, dt), np.float32(t + dt)
    clip = config.flow.clip or np.inf
    return np.asarray(jnp.clip(x, -clip, clip))[..., : config.robot_action_dim]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"## {datetime.date.today()} solvers and weights: {result['frames']} held-out frames, "
        f"{result['parameters']:,} parameters",
        "",
        f"Distance from Euler with {result['reference_steps']} steps (whose error is {result['reference_error']:.4f}), "
        "in spreads of its actions; error: mean absolute, to the demonstrated actions.",
        "",
        "| solver, steps | action expert runs | rms distance | largest | error |",
        "|---" * 5 + "|",
    ]
    for name, row in result["solvers"].items():
        solver, steps = name.split()
        runs = int(steps) * (1 if solver == "euler" else 2)
        lines.append(f"| {name} | {runs} | {row['rms']:.4f} | {row['max']:.3f} | {row['error']:.4f} |")
    lines += [
        "",
        f"Distance from float32 at {result['own']} steps. Trained parameters: {result['trained_bytes'] / 1e6:.2f} MB.",
        "",
        "| weights, activations | parameters MB | rms distance | largest | error | depth codes unchanged |",
        "|---" * 6 + "|",
    ]
    for name, row in result["weights"].items():
        codes = f"{row['same_codes']:.1%}" if "same_codes" in row else "-"
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.2f} | {row['rms']:.5f} | {row['max']:.4f} | {row['error']:.4f} | "
            f"{codes} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    command.run(main)
