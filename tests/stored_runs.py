"""Workdirs of runs with tiny models and random numbers, as training leaves them behind, in a second."""

import contextlib
import importlib.util
import json
import pathlib

import jax
import ml_collections
import numpy as np
from absl import flags

from qdepth_jax import checkpoint, stored_model, train_step
from qdepth_jax import config as config_lib
from qdepth_jax.data import normalise, text
from qdepth_jax.models import policy, tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = str(ROOT / "data" / "text_tokenizer" / "libero.model")
TOKENIZER = tokenizer.TokenizerConfig(depth_size=8, grid=2, num_codes=8, code_dim=6, widths=(8,), blocks=1)
QDEPTH = policy.sized("tiny", vocabulary=640, text_length=24)
BASELINE = policy.sized("tiny", vocabulary=640, text_length=24, depth=None)


shapes = stored_model.shapes


def random_like(tree, seed):
    rng = np.random.default_rng(seed)

    def leaf(x):
        value = rng.standard_normal(x.shape) * 0.3
        return value.astype(x.dtype) if np.issubdtype(x.dtype, np.floating) else np.full(x.shape, 3, x.dtype)

    return jax.tree.map(leaf, tree)


def normaliser(dims, seed):
    values = np.random.default_rng(seed).standard_normal((50, dims)).astype(np.float32)
    return normalise.Normaliser(normalise.compute(values)).to_json()


def experiment(kind, model, **fields):
    config = config_lib.default()
    config.name, config.model_kind = f"tiny_{kind}", kind
    config.model = config_lib.section(model)
    for name, value in fields.items():
        config[name] = value
    if kind == "policy":
        config.data.text_tokenizer = WORDS
    return config


def meta_of(config, model, step=7, **more):
    data = {
        "datasets": [{"name": "libero_object", "frames": 1234, "fingerprint": "f" * 40, "split": "train"}],
        "shares": [1.0],
        "position": step * 32,
        "text_tokenizer": text.file_identity(WORDS) if config.model_kind == "policy" else "",
        "normalisation": {
            "libero_object": {
                "action": normaliser(getattr(model, "action_dim", 7), 1),
                "proprio": normaliser(getattr(model, "proprio_dim", 7), 2),
            }
        },
    }
    return {
        "step": step,
        "config": config_lib.to_json(config),
        "data": data,
        "pictures": {"main": [128, 128]},
        "tokenizer": "",
        "experiment_id": "e1",
    } | more


def write(folder, kind, model, config=None, steps=(7,), ema=True, seed=0, **more):
    """A run's workdir with checkpoints of some steps; returns the state of the last."""
    config = ml_collections.ConfigDict(config or experiment(kind, model))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with checkpoint.open_manager(str(folder), config_lib.TrainConfig(keep_checkpoints=9)) as manager:
        for step in steps:
            variables = random_like(shapes(kind, model), seed + step)
            state = train_step.TrainState(
                **{name: np.int32(step) for name in ("step", "skipped", "skipped_in_row")},
                params=variables["params"],
                state=variables["state"],
                opt_state=({"mu": {"x": np.ones(3, np.float32)}},),
                ema=random_like(shapes(kind, model)["params"], seed + step + 100) if ema else None,
            )
            state = jax.device_put(state, device)
            checkpoint.save(manager, state, meta_of(config, model, step, **more), step)
    rows = [{"step": s, "loss": 1 / s, "grad_norm": 2.0} for s in range(1, steps[-1] + 3)]
    rows.append({"step": steps[-1], "val/loss": 0.25, "val/depth_accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return state


def write_tokenizer(folder):
    """A trained depth tokenizer of the grid and codes of QDEPTH; returns its identity."""
    state = write(folder, "tokenizer", TOKENIZER, ema=False)
    return tokenizer.identity(TOKENIZER, state.params, state.state)


def write_qdepth(folder, **more):
    """A policy with a depth expert and its tokenizer beside it."""
    identity = write_tokenizer(folder / "tokenizer")
    config = experiment("policy", QDEPTH, tokenizer=str(folder / "tokenizer"))
    return write(folder / "policy", "policy", QDEPTH, config, tokenizer=identity, **more)


@contextlib.contextmanager
def command(name):
    """A command of tools/: `main(arguments) -> exit code` in this process; its flags go when the block ends."""
    with tool_module(name) as tool:
        yield lambda *arguments: tool.main(flags.FLAGS([name, *arguments]))


@contextlib.contextmanager
def tool_module(name, folder="tools"):
    """A command as a module. Flags of other commands, which may have the same names, are away meanwhile."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    absl = {flag for flag in flags.FLAGS if (flags.FLAGS.find_module_defining_flag(flag) or "").startswith("absl.")}
    others = {flag: flags.FLAGS[flag] for flag in flags.FLAGS if flag not in absl}
    _remove(others)
    try:
        spec.loader.exec_module(tool)
        yield tool
    finally:
        flags.FLAGS.unparse_flags()
        _remove(set(flags.FLAGS) - absl)
        for flag, value in others.items():
            flags.FLAGS[flag] = value


def _remove(names):
    for name in names:
        if name in flags.FLAGS:  # a short name goes with its long one
            delattr(flags.FLAGS, name)
