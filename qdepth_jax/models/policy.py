"""The policy: SigLIP + Gemma mixture + flow matching (open-pi-zero, pi0), with an optional depth expert (QDepth-VLA).

Token order in the joint attention, by visibility group and by expert:

    [ image tokens of every view | text ] [ depth ] [ proprio | action ]
      vlm                                   depth     action

Parameters: img/... (siglip.py), llm/... (gemma.py), and around them, with D = 1024, Dp proprio and A action numbers:
  proprio_encoder/{kernel [Dp,D], bias}         action_decoder/{kernel [D,A], bias [A]}
  action_encoder/linear_1/{kernel [A,D], bias}  linear_2/{kernel [2D,D], bias}  linear_3/{kernel [D,D], bias}
  depth_encoder/linear_1/{kernel [1152,D], bias}  linear_2/{kernel [D,D], bias}
  depth_decoder/conv_1/{kernel [3,3,D,384], bias}  conv_2/{kernel [3,3,384,160], bias}
Where the flow time enters by adaptive norms (pi0.5), action_encoder has linear_1 alone, and beside it is
  time_encoder/linear_1/{kernel [D,D], bias}    linear_2/{kernel [D,D], bias}
State: codebook f32 [C, E] of the frozen tokenizer, if the loss needs it; else empty.

Conventions are fields of the config (policy_config.CONVENTIONS). In open-pi-zero's every stream is multiplied by the
square root of its width on entry, the depth stream too; in pi0's only the text is.

Axis letters: B batch, T query, S key, D width, L text tokens, P patches of one view, Z horizon, A action dim, C codes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import (
    augment,
    augment_config,
    depth_expert,
    flops,
    flow,
    gemma,
    images,
    layout,
    linear,
    objective,
    policy_config,
    siglip,
    visibility,
)

PolicyConfig = policy_config.PolicyConfig
sized = policy_config.sized
frozen_table = policy_config.frozen_table

# Parts whose gradient norms are reported; every parameter is in one. `depth` only where there is a depth expert.
GROUPS = (
    ("vision", "img/.*"),
    ("vlm", "llm/(embedder|layers/vlm|final_norm_vlm)/.*"),
    ("depth", "llm/(layers/depth|final_norm_depth)/.*|depth_(encoder|decoder)/.*"),
    ("action", "llm/(layers/action|final_norm_action)/.*|(proprio|action|time)_encoder/.*|action_decoder/.*"),
)

PREFIX = ("image", "text", "depth", "proprio")


@struct.dataclass
class Output:
    """Of one training forward pass.

    Attributes:
      velocity: f32 [B, Z, A].
      depth: f32 [B, P, E] x' of depth_expert.py (or [B, P, R*R] normalised depth); None without depth expert.
      vision_features: [B, P, D_vision] of the main view, after SigLIP's final norm, before the projector.
    """

    velocity: Array
    depth: Array | None
    vision_features: Array


class ActionEncoder(nn.Module):
    """Noisy actions and time -> tokens: linear (no activation), time concatenated first, linear, SiLU, linear.

    Without time (it enters elsewhere), the first linear layer is all.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_t: Array, time: Array | None) -> Array:
        """x_t f32 [B, Z, A], time embedding f32 [B, D] -> `dtype` [B, Z, D]."""
        u = linear.Linear(self.width, self.dtype, name="linear_1")(x_t)
        if time is None:
            return u
        time = time.astype(self.dtype)
        time = jnp.broadcast_to(time[:, None], u.shape)
        h = jax.nn.silu(linear.Linear(self.width, self.dtype, name="linear_2")(jnp.concatenate([time, u], axis=-1)))
        return linear.Linear(self.width, self.dtype, name="linear_3")(h)


class TimeEncoder(nn.Module):
    """Time embedding -> condition of the adaptive norms: linear, SiLU, linear, SiLU."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, time: Array) -> Array:
        """f32 [B, D] -> `dtype` [B, D]."""
        h = jax.nn.silu(linear.Linear(self.width, self.dtype, name="linear_1")(time))
        return jax.nn.silu(linear.Linear(self.width, self.dtype, name="linear_2")(h))


class Policy(nn.Module):
    """The network. Methods: `__call__` (training), `prefill` and `denoise` (cached sampling)."""

    config: PolicyConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.img = siglip.Siglip(c.siglip, c.vlm.width, dtype, c.scan, c.remat)
        self.llm = gemma.Mixture(c.mixture, dtype, c.scan, c.remat)
        if c.proprio_steps:
            self.proprio_encoder = linear.Linear(c.action.width, dtype)
        self.action_encoder = ActionEncoder(c.action.width, dtype)
        if c.action_time == "adaptive":
            self.time_encoder = TimeEncoder(c.action.width, dtype)
        self.action_decoder = linear.Linear(c.action_dim, dtype)
        if c.depth is not None:
            self.depth_encoder = depth_expert.DepthEncoder(c.depth.expert.width, dtype)
            self.depth_decoder = depth_expert.DepthDecoder(c.depth, dtype)

    def __call__(
        self, images: Array, text: Array, proprio: Array | None, x_t: Array, t: Array, view_mask: Array | None = None
    ) -> Output:
        """Velocity and depth prediction for one flow time.

        Args:
          images: f32 [B, pictures, H, W, 3] in [-1, 1], at SigLIP's size, see `prepare_images`.
          text: i32 [B, L], right-padded with 0. proprio: f32 [B, steps, Dp], or None for a policy without.
          x_t: f32 [B, Z, A]. t: f32 [B].
          view_mask: bool [B, views]; tokens of a view that an example lacks are seen by nobody, nor are depth tokens
            without the main view. None = all are there.
        """
        streams, features = self._prefix(images, text, proprio)
        action, conditions = self._action(x_t, t)
        streams["action"] = jnp.concatenate([streams["action"], action], axis=1) if "action" in streams else action
        finals, _ = self.llm(
            streams,
            self._positions(visibility.GROUPS, text, view_mask),
            self._mask(text, visibility.GROUPS, visibility.GROUPS, view_mask),
            conditions=conditions,
            outputs=tuple(name for name in streams if name != "vlm"),
        )
        velocity = self.action_decoder(finals["action"][:, self.config.proprio_steps :])
        depth = self.depth_decoder(finals["depth"]) if self.config.depth is not None else None
        return Output(velocity.astype(jnp.float32), depth, features)

    def prefill(
        self, images: Array, text: Array, proprio: Array | None, depth: bool = False, view_mask: Array | None = None
    ):
        """Everything that does not depend on the flow time.

        Args:
          depth: also decode the depth prediction.

        Returns:
          The cache over image, text, depth and proprio tokens; the depth prediction as in `Output` or None.
        """
        streams, _ = self._prefix(images, text, proprio)
        finals, cache = self.llm(
            streams,
            self._positions(PREFIX, text, view_mask),
            self._mask(text, PREFIX, PREFIX, view_mask),
            return_cache=True,
            outputs=("depth",) if depth else (),
        )
        return cache, self.depth_decoder(finals["depth"]) if depth else None

    def denoise(self, cache: gemma.KVCache, text: Array, x_t: Array, t: Array, view_mask: Array | None = None) -> Array:
        """One velocity f32 [B, Z, A] with the action stream alone against the cache."""
        action, conditions = self._action(x_t, t)
        finals, _ = self.llm(
            {"action": action},
            self._positions(("action",), text, view_mask),
            self._mask(text, ("action",), visibility.GROUPS, view_mask),
            conditions=conditions,
            cache=cache,
            outputs=("action",),
        )
        return self.action_decoder(finals["action"]).astype(jnp.float32)

    def _action(self, x_t: Array, t: Array) -> tuple[Array, dict[str, Array]]:
        """The stream of the noisy actions, and the conditions of adaptive experts."""
        time = flow.time_embedding(t, self.config.action.width, self.config.flow)
        if self.config.action_time == "adaptive":
            return self._scale_expert(self.action_encoder(x_t, None)), {"action": self.time_encoder(time)}
        return self._scale_expert(self.action_encoder(x_t, time)), {}

    def _prefix(self, images: Array, text: Array, proprio: Array | None) -> tuple[dict[str, Array], Array]:
        """Streams of all groups but action, and the main view's vision features."""
        config = self.config
        if images.shape[1] != config.pictures or text.shape[1] != config.text_length:
            raise errors.UserError(
                f"the policy takes {config.pictures} images (views {config.views} x {config.image_steps} steps) and "
                f"{config.text_length} text tokens, got {images.shape[1]} and {text.shape[1]}"
            )
        b, views = images.shape[:2]
        # Batch stays the major axis, so that its sharding survives the fold.
        features = self.img(images.reshape(b * views, *images.shape[2:]))
        tokens = self.img.project(features).reshape(b, -1, config.vlm.width)
        # Divided here and multiplied below: open-pi-zero scales the merged sequence.
        tokens = tokens / jnp.asarray(config.vlm.width**0.5, tokens.dtype)
        words = layout.pin(self.llm.embed(text, trainable=not config.freeze_embedding))
        words = jnp.where((text != 0)[..., None], words, jnp.zeros((), words.dtype))
        streams = {"vlm": self._scale(jnp.concatenate([tokens, words], axis=1))}
        main = features.reshape(b, views, *features.shape[1:])[:, 0]
        if config.depth is not None:
            streams["depth"] = self._scale_expert(self.depth_encoder(main))
        if config.proprio_steps:
            streams["action"] = self._scale_expert(self.proprio_encoder(proprio))
        return streams, main

    def _scale(self, x: Array) -> Array:
        """Times sqrt(width), the factor rounded to the activation dtype first."""
        return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)

    def _scale_expert(self, x: Array) -> Array:
        return self._scale(x) if self.config.scale_experts else x

    def _positions(
        self, groups: tuple[str, ...], text: Array, view_mask: Array | None
    ) -> dict[str, np.ndarray] | dict[str, Array]:
        """Expert -> position ids [T] (NumPy: the same for every example) or [B, T]."""
        config, concatenate = self.config, np.concatenate
        if config.positions.count == "slots":
            ids = policy_config.position_ids(config)
        else:
            there = jnp.ones((text.shape[0], config.sizes["image"]), bool)
            there = there if view_mask is None else self._image_valid(view_mask)
            ids, concatenate = policy_config.valid_position_ids(config, there, text != 0), jnp.concatenate
        parts = {"vlm": ("image", "text"), "depth": ("depth",), "action": ("proprio", "action")}
        out = {expert: [ids[group] for group in members if group in groups] for expert, members in parts.items()}
        return {expert: concatenate(rows, axis=-1) for expert, rows in out.items() if rows}

    def _image_valid(self, view_mask: Array) -> Array:
        return jnp.repeat(view_mask, self.config.image_steps * self.config.siglip.tokens, axis=1)

    def _mask(
        self, text: Array, queries: tuple[str, ...], keys: tuple[str, ...], view_mask: Array | None = None
    ) -> Array:
        config = self.config
        there = ()
        if view_mask is not None:
            # Depth tokens are made of the main view.
            there = self._image_valid(view_mask), jnp.repeat(view_mask[:, :1], config.sizes["depth"], axis=1)
        table = visibility.resolve(config.visibility)
        return visibility.mask(table, config.sizes, text != 0, queries, keys, *there)


def prepare_images(config: PolicyConfig, batch: objective.Batch) -> Array:
    """Batch images (see images.prepare) -> f32 [B, pictures, S, S, 3] in [-1, 1].

    The pictures are view after view, of each view the newest first: the present main view always comes first.
    """
    size, pictures = config.siglip.image_size, []
    for view in config.views:
        image = batch[f"image_{view}"]
        if config.image_steps == 1:
            pictures.append(images.prepare(image, size)[:, None])
        else:
            flat = images.prepare(image.reshape(-1, *image.shape[2:]), size)
            pictures.append(flat.reshape(*image.shape[:2], *flat.shape[1:])[:, ::-1])
    return jnp.concatenate(pictures, axis=1)


def features(config: PolicyConfig) -> tuple[str, ...]:
    """Batch keys the loss reads."""
    keys = [f"image_{view}" for view in config.views] + ["text", "proprio", "action", "position"]
    if not config.proprio_steps:
        keys.remove("proprio")
    if not config.faithful:
        keys.append("action_mask")
    if config.missing_views:
        keys.append("view_mask")
    if config.depth_labels == "codes":
        keys += ["depth_tokens", "depth_tokens_mask"]
    if config.depth_labels == "pixels":
        keys += ["depth", "depth_scale", "depth_offset"]
    return tuple(keys)


def _padded_action(config: PolicyConfig, action: Array) -> Array:
    """Actions of the data f32 [B, Z, robot_action_dim] -> [B, Z, A], zeros behind."""
    if action.shape[-1] != config.robot_action_dim:
        raise errors.UserError(
            f"the policy takes actions of {config.robot_action_dim} numbers, the batch has {action.shape[-1]}: set "
            + ("model.action_used" if config.action_used else "model.action_dim (or model.action_used to pad)")
        )
    if not config.action_used:
        return action
    return jnp.pad(action, ((0, 0), (0, 0), (0, config.action_dim - config.action_used)))


def view_mask(config: PolicyConfig, batch: objective.Batch) -> Array | None:
    return batch["view_mask"] if config.missing_views else None


def init(config: PolicyConfig, key: Array) -> dict[str, objective.Tree]:
    """Fresh `{"params", "state"}`.

    The codebook is a placeholder (random, unit variance): the tokenizer's must take its place before training.
    """
    size = config.siglip.image_size
    key_params, key_codes = jax.random.split(key)
    variables = Policy(config).init(
        key_params,
        jnp.zeros((1, config.pictures, size, size, 3)),
        jnp.zeros((1, config.text_length), jnp.int32),
        jnp.zeros((1, config.proprio_steps, config.proprio_dim)) if config.proprio_steps else None,
        jnp.zeros((1, config.horizon, config.action_dim)),
        jnp.zeros((1,)),
    )
    state = {}
    if config.depth_labels == "codes":
        state["codebook"] = linear.normal_like(1.0)(key_codes, (config.depth.codes, config.depth.code_dim))
    return {"params": variables["params"], "state": state}


def loss(config: PolicyConfig, params, state, batch, key: Array, step: Array) -> objective.LossOutput:
    """flow + lambda(step) * depth, time and noise drawn from the key and the global example index alone.

    Metrics: loss, flow_loss; with depth labels also depth_loss and lambda; with codes also depth_accuracy.
    """
    keys = jax.vmap(jax.random.split)(flow.example_keys(key, batch["position"]))
    t = flow.sample_time(keys[:, 0], config.flow)
    noise = flow.sample_noise(keys[:, 1], (config.horizon, config.action_dim))
    return loss_at(config, params, state, batch, noise, t, step)


def loss_at(config: PolicyConfig, params, state, batch, noise: Array, t: Array, step: Array) -> objective.LossOutput:
    """The same at given noise f32 [B, Z, A] and time f32 [B]."""
    action = _padded_action(config, batch["action"])
    x_t = flow.interpolate(noise, action, t, config.flow)
    out = Policy(config).apply(
        {"params": params},
        prepare_images(config, batch),
        batch["text"],
        batch.get("proprio"),
        x_t,
        t,
        view_mask(config, batch),
    )
    # Actions past the end of an episode repeat the last one; open-pi-zero trains on them, we do not.
    valid = jnp.ones(action.shape[:2], bool) if config.faithful else batch["action_mask"]
    flow_loss = flow.loss(out.velocity, flow.target_velocity(noise, action, config.flow), valid)
    metrics = {"flow_loss": flow_loss}
    total = flow_loss
    if config.depth_labels is not None:
        weight = config.depth.loss_weight * config.depth.loss_decay ** jnp.asarray(step, jnp.float32)
        if config.depth_labels == "codes":
            logits = depth_expert.code_logits(out.depth, state["codebook"], config.depth.temperature)
            depth_loss, accuracy = depth_expert.code_loss(logits, batch["depth_tokens"], batch["depth_tokens_mask"])
            metrics["depth_accuracy"] = accuracy
        else:
            depth_loss = depth_expert.pixel_loss(out.depth, *depth_expert.pixel_targets(batch, config.depth))
        metrics |= {"depth_loss": depth_loss, "lambda_t": weight}
        total = flow_loss + weight * depth_loss
    return objective.LossOutput(total, {"loss": total, **metrics}, state)


def make_objective(
    config: PolicyConfig, augmentation: augment_config.AugmentConfig | None = None
) -> objective.Objective:
    """The policy as the training loop sees it; `augmentation` of its training images, None = none.

    Raises:
      UserError: a crop of the main view although depth labels belong to the whole frame.
    """
    augmentation = augmentation or augment_config.AugmentConfig()
    if config.depth_labels is not None and augmentation.main.crops:
        raise errors.UserError(
            f"augment.main crops the main view (crop_scale={augmentation.main.crop_scale}, "
            f"crop_ratio={augmentation.main.crop_ratio}), but the depth {config.depth_labels} that this policy learns "
            "belong to the whole frame: set augment.main.crop_scale and crop_ratio to (1.0, 1.0) (colour changes may "
            "stay), or train without depth labels (model.depth=None or model.depth.loss_weight=0)"
        )
    size = config.siglip.image_size
    return objective.Objective(
        init=lambda key: init(config, key),
        loss=lambda params, state, batch, key, step: loss(config, params, state, batch, key, step),
        features=features(config),
        augment=(lambda batch, key: augment.augment_views(batch, config.views, size, augmentation, key))
        if augmentation.active
        else None,
        flops=flops.model_flops(flops.policy(config)),
        groups=tuple(row for row in GROUPS if row[0] != "depth" or config.depth is not None),
    )
