"""openpi's pi0 in JAX from a checkout: `Pi0.sample_actions` through its own `module_jit`, as its Policy serves it.

Its code fixes sizes by name, so the functions that turn names into sizes are replaced; so is its list of three cameras
(one picture for everybody here). torch is stubbed where it is missing: its JAX modules import it for types alone.
Weights are drawn by NumPy, which takes seconds where its own initialisation compiles for minutes. Prepared outside of
what is timed: pixels as floats in [-1, 1].
"""

import functools
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import inference_sizes as sizes

CAMERA = "base_0_rgb"


def build(order: sizes.Order) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """-> run(flow steps) -> actions [1, Z, A], and `sizes.facts`. Always draws the weights of its network."""
    stubs = _stub_torch()
    sys.path.insert(0, str(pathlib.Path(order.checkout) / "src"))
    import flax
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    from openpi.models import gemma, model, pi0_config, siglip
    from openpi.shared import nnx_utils

    size, folder = sizes.SIZES[order.size], pathlib.Path(order.folder)
    common = {"depth": size.layers, "num_heads": size.heads, "num_kv_heads": 1, "head_dim": size.head_dim}
    experts = {
        "gemma_2b": gemma.Config(width=size.vlm_width, mlp_dim=size.vlm_mlp, **common),
        "gemma_300m": gemma.Config(width=size.action_width, mlp_dim=size.action_mlp, **common),
    }
    gemma.get_config, gemma.PALIGEMMA_VOCAB_SIZE = experts.__getitem__, size.vocabulary
    siglip.decode_variant = lambda variant: {
        "width": size.vision_width,
        "depth": size.vision_layers,
        "mlp_dim": size.vision_mlp,
        "num_heads": size.vision_heads,
        "patch_size": (size.patch, size.patch),
    }
    side = (size.image_size, size.image_size)
    model.IMAGE_RESOLUTION = side
    model.preprocess_observation = functools.partial(
        model.preprocess_observation, image_keys=(CAMERA,), image_resolution=side
    )
    config = pi0_config.Pi0Config(
        dtype=order.dtype, action_dim=size.action_dim, action_horizon=size.horizon, max_token_len=size.text_length
    )
    graph, state = nnx.split(nnx.eval_shape(config.create, jax.random.key(0)))
    rng, count, held = np.random.default_rng(1), 0, 0

    def draw(path, leaf) -> np.ndarray:
        nonlocal count, held
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # Kernels as wide as what they sum over, or nearly so: a network that forgets its input would hide an error.
        wide = max(leaf.shape[:-1][-2:]) ** -0.5 if name.rpartition(".")[2] not in ("bias", "scale") else 0.02
        value = wide * rng.standard_normal(leaf.shape, np.float32)
        if ".img." in name and name.endswith("scale"):
            value += 1.0
        np.save(folder / f"params.{name}.npy", value)
        count, held = count + value.size, held + value.nbytes
        return jnp.asarray(value)

    state.replace_by_pure_dict(jax.tree_util.tree_map_with_path(draw, state.to_pure_dict()))
    network = nnx.merge(graph, state)
    noise = sizes.draw_noise(size)
    np.save(folder / "noise.npy", noise)
    batch = sizes.observation(size)
    observation = model.Observation(
        images={CAMERA: jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1.0},
        image_masks={CAMERA: jnp.ones(1, bool)},
        state=jnp.asarray(batch["proprio"][:, 0]),
        tokenized_prompt=jnp.asarray(batch["text"]),
        tokenized_prompt_mask=jnp.asarray(batch["text"] != 0),
    )
    sample, key = nnx_utils.module_jit(network.sample_actions, static_argnames="num_steps"), jax.random.key(0)

    def run(steps: int) -> np.ndarray:
        return np.asarray(sample(key, observation, num_steps=steps, noise=jnp.asarray(noise)))

    notes = [*stubs, f"jax {jax.__version__}, flax {flax.__version__}", "scanned layers, as it always has them"]
    kind = jax.devices()[0].device_kind
    return run, sizes.facts(parameters=count, weight_bytes=held, notes=notes, device_kind=kind)


def _stub_torch() -> list[str]:
    """Empty stand-ins for torch and for its torch models, which its JAX modules import."""
    port = "openpi.models_pytorch"
    modules = [port, f"{port}.pi0_pytorch"]
    stubs = ["its torch models stubbed (not used here)"]
    if importlib.util.find_spec("torch") is None:
        modules += ["torch", "torch.nn", "torch.nn.functional"]
        stubs.append("torch stubbed (not used here)")
    for name in modules:
        sys.modules[name] = types.ModuleType(name)
    for name in modules:
        parent, _, last = name.rpartition(".")
        if parent in modules:
            setattr(sys.modules[parent], last, sys.modules[name])
    if "torch" in modules:
        sys.modules["torch"].Tensor = type("Tensor", (), {})
    return stubs
