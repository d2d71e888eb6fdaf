"""What a trained policy says: action chunks by integrating the flow, and depth.

The prefix (images, text, depth, proprio) runs once and leaves its keys and values; every step of the flow runs the
action stream alone. Everything is one program, so the cache never leaves it: there is nothing to donate and nothing to
copy. Parameters may be as they are trained or as inference.py packs them.
"""

from typing import NamedTuple

from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import depth_expert, flow, inference, objective, policy, visibility


class Prefix(NamedTuple):
    """Attributes:
    velocity: of the flow, given everything but the actions.
    depth: the raw depth prediction (policy.Output.depth), or None if it was not asked for.
    """

    velocity: flow.Velocity
    depth: Array | None


def run_prefix(config: policy.PolicyConfig, params, batch: objective.Batch, depth: bool = False) -> Prefix:
    """One pass over everything that does not depend on the flow time.

    Args:
      batch: images, text, proprio.
      depth: also decode the depth prediction; the actions cost no second pass then.
    """
    network, text, there = policy.Policy(config), batch["text"], policy.view_mask(config, batch)
    cache, prediction = network.apply(
        {"params": inference.unpack(params)},
        policy.prepare_images(config, batch),
        text,
        batch.get("proprio"),
        depth=depth,
        view_mask=there,
        method=policy.Policy.prefill,
    )
    cache = inference.apart(config, cache)

    def velocity(x: Array, t: Array) -> Array:
        visibility.check_cacheable(visibility.resolve(config.visibility))
        # Unpacked in here: inside the loop over flow steps the compiler sees each part at its use.
        variables = {"params": inference.unpack(params)}
        return network.apply(variables, inference.unpack(cache), text, x, t, there, method=policy.Policy.denoise)

    return Prefix(velocity, prediction)


def sample_actions(
    config: policy.PolicyConfig,
    params,
    state,
    batch: objective.Batch,
    noise: Array,
    cached: bool = True,
    solver: str = "euler",
) -> Array:
    """An action chunk, in `config.flow.steps` steps.

    Args:
      batch: images, text, proprio.
      noise: f32 [B, Z, A], x at the flow time of noise.
      cached: compute everything but the action stream once; False runs the whole network at every step.
      solver: of flow.SOLVERS.

    Returns:
      f32 [B, Z, config.robot_action_dim], normalised actions.
    """
    del state  # Actions need no codebook; the argument keeps the signature of all predictions equal.
    if cached:
        return integrate(config, run_prefix(config, params, batch).velocity, noise, solver)
    network, variables = policy.Policy(config), {"params": inference.unpack(params)}
    views, text, proprio = policy.prepare_images(config, batch), batch["text"], batch.get("proprio")
    there = policy.view_mask(config, batch)

    def velocity(x: Array, t: Array) -> Array:
        return network.apply(variables, views, text, proprio, x, t, there).velocity

    return integrate(config, velocity, noise, solver)


def integrate(config: policy.PolicyConfig, velocity: flow.Velocity, noise: Array, solver: str = "euler") -> Array:
    """The flow from noise f32 [B, Z, A] to actions f32 [B, Z, config.robot_action_dim]."""
    return flow.integrate(velocity, noise, config.flow, solver)[..., : config.robot_action_dim]


def predict_depth(config: policy.PolicyConfig, params, state, batch: objective.Batch) -> Array:
    """Depth from images, text and proprio alone.

    Returns:
      f32 [B, P, C] code logits for the head `codes`, or f32 [B, P, R*R] normalised depth for `pixels`.
    """
    if config.depth is None:
        raise errors.UserError("predict_depth needs a policy with a depth expert; this one has depth=None")
    return depth_of(config, state, run_prefix(config, params, batch, depth=True).depth)


def depth_of(config: policy.PolicyConfig, state, prediction: Array) -> Array:
    """A raw prediction as `predict_depth` returns it."""
    if config.depth.head == "pixels":
        return prediction
    return depth_expert.code_logits(prediction, state["codebook"], config.depth.temperature)
