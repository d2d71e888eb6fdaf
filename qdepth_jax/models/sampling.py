"""What a trained policy says: action chunks by integrating the flow, and depth.

The prefix (images, text, depth, proprio) runs once and leaves its keys and values; every step of the flow runs the
action stream alone.
"""

from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import depth_expert, flow, objective, policy, visibility


def sample_actions(
    config: policy.PolicyConfig, params, state, batch: objective.Batch, noise: Array, cached: bool = True
) -> Array:
    """Euler sampling of an action chunk.

    Args:
      batch: images, text, proprio.
      noise: f32 [B, Z, A], x at the flow time of noise.
      cached: compute everything but the action stream once; False runs the whole network at every step.

    Returns:
      f32 [B, Z, config.robot_action_dim], normalised actions.
    """
    del state  # Actions need no codebook; the argument keeps the signature of all predictions equal.
    network, variables = policy.Policy(config), {"params": params}
    views, text, proprio = policy.prepare_images(config, batch), batch["text"], batch.get("proprio")
    there = policy.view_mask(config, batch)
    if not cached:
        return flow.integrate(
            lambda x, t: network.apply(variables, views, text, proprio, x, t, there).velocity, noise, config.flow
        )[..., : config.robot_action_dim]
    visibility.check_cacheable(visibility.resolve(config.visibility))
    cache, _ = network.apply(variables, views, text, proprio, view_mask=there, method=policy.Policy.prefill)
    return flow.integrate(
        lambda x, t: network.apply(variables, cache, text, x, t, there, method=policy.Policy.denoise),
        noise,
        config.flow,
    )[..., : config.robot_action_dim]


def predict_depth(config: policy.PolicyConfig, params, state, batch: objective.Batch) -> Array:
    """Depth from images, text and proprio alone.

    Returns:
      f32 [B, P, C] code logits for the head `codes`, or f32 [B, P, R*R] normalised depth for `pixels`.
    """
    if config.depth is None:
        raise errors.UserError("predict_depth needs a policy with a depth expert; this one has depth=None")
    _, prediction = policy.Policy(config).apply(
        {"params": params},
        policy.prepare_images(config, batch),
        batch["text"],
        batch.get("proprio"),
        depth=True,
        view_mask=policy.view_mask(config, batch),
        method=policy.Policy.prefill,
    )
    if config.depth.head == "pixels":
        return prediction
    return depth_expert.code_logits(prediction, state["codebook"], config.depth.temperature)
