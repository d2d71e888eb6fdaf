"""Random batches of the documented layout, for tests that need numbers but no data set."""

import jax.numpy as jnp
import numpy as np

from qdepth_jax.models import policy_config


def policy_batch(config: policy_config.PolicyConfig, size: int, seed: int = 0, image_size: int | None = None) -> dict:
    """Every key a policy can ask for; positions 0..size-1."""
    rng = np.random.default_rng(seed)
    side = image_size or config.siglip.image_size
    shape = (size, side, side, 3) if config.image_steps == 1 else (size, config.image_steps, side, side, 3)
    batch = {f"image_{v}": rng.integers(0, 256, shape).astype(np.uint8) for v in config.views}
    text = rng.integers(1, config.vocabulary, (size, config.text_length))
    for i, row in enumerate(text):
        row[2 + i % (config.text_length - 1) :] = 0
    batch |= {
        "text": text.astype(np.int32),
        "proprio": rng.normal(size=(size, config.proprio_steps, config.proprio_dim)).astype(np.float32),
        "action": rng.normal(size=(size, config.horizon, config.robot_action_dim)).astype(np.float32),
        "action_mask": rng.random((size, config.horizon)) < 0.8,
        "view_mask": np.ones((size, len(config.views)), bool),
        "position": np.arange(size, dtype=np.uint32),
        "depth": rng.integers(500, 3500, (size, 32, 32)).astype(np.uint16),
        "depth_scale": np.full((size,), 0.001, np.float32),
        "depth_offset": np.zeros((size,), np.float32),
    }
    if config.depth is not None:
        shape = (size, config.depth.tokens)
        batch["depth_tokens"] = rng.integers(0, config.depth.codes, shape).astype(np.int32)
        batch["depth_tokens_mask"] = rng.random(shape) < 0.9
    return {k: jnp.asarray(v) for k, v in batch.items()}
