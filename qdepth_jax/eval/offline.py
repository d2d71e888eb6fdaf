"""A policy against held-out episodes without a simulator: action error and depth tokens, each beside its baselines.

Baselines: for actions, the mean action of the training frames and repeating the action before; for depth tokens, the
most frequent code of each position in the training split. A number without its baseline says nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax.data import data_config, loader, normalise, sidecar
from qdepth_jax.models import flow, policy, sampling

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Result:
    """`figures` is JSON-able; the arrays are what the report draws (N frames).

    predicted, true f32 [N, Z, A] normalised actions; mask bool [N, Z]; codes, tokens i32 [N, P] or None; pixels f32
    [N, P, R*R] normalised depth of the head `pixels`, or None; images u8 [N, H, W, 3]; raw_depth u16 [N, H, W] with
    scale [N], offset [N], or None; instruction ids are not kept.
    """

    figures: dict[str, Any]
    predicted: np.ndarray
    true: np.ndarray
    mask: np.ndarray
    images: np.ndarray
    frames: np.ndarray
    codes: np.ndarray | None
    tokens: np.ndarray | None
    pixels: np.ndarray | None
    raw_depth: np.ndarray | None
    scale: np.ndarray | None
    offset: np.ndarray | None


def evaluate(
    config: policy.PolicyConfig,
    variables: dict[str, Any],
    data: data_config.DataConfig,
    normalisers: dict[str, Any],
    batches: int,
    seed: int = 0,
) -> Result:
    """Predicts action chunks (one sample each) and depth tokens for `batches` x 32 held-out frames.

    Args:
      config, variables: a trained policy, {"params", "state"}.
      data: of the held-out episodes.
      normalisers: of the training data, as stored with the checkpoint.
      batches: at most one pass over the held-out frames is made.
      seed: of the frame choice and the flow noise.
    """
    has_codes, has_pixels = config.depth_labels == "codes", config.depth_labels == "pixels"
    features = [f"image_{v}" for v in config.views]
    features += ["text", "proprio", "action", "action_mask", "position", "frame", "dataset"]
    if config.missing_views:
        features.append("view_mask")
    if has_codes:
        features += ["depth_tokens", "depth_tokens_mask"]
    reader = loader.Loader(dataclasses.replace(data, shuffle=True), features, BATCH, seed=seed, normalisers=normalisers)
    if has_codes or has_pixels:
        depth_reader = loader.Loader(
            dataclasses.replace(data, shuffle=True), ("depth", "depth_scale", "depth_offset"), BATCH, seed=seed,
            normalisers=normalisers,
        )  # fmt: skip
    else:
        depth_reader = None

    @jax.jit
    def predict(variables, batch, key):
        keys = flow.example_keys(key, batch["position"])
        noise = flow.sample_noise(keys, (config.horizon, config.action_dim))
        actions = sampling.sample_actions(config, variables["params"], variables["state"], batch, noise)
        depth = ()
        if has_codes or has_pixels:
            depth = sampling.predict_depth(config, variables["params"], variables["state"], batch)
        return actions, jnp.argmax(depth, axis=-1) if has_codes else depth

    batches = max(1, min(batches, reader.frames // BATCH))
    rows: list[dict[str, np.ndarray]] = []
    for i in range(batches):
        batch = reader.batch(i)
        actions, depth = jax.device_get(predict(variables, batch, jax.random.key(seed)))
        row = batch | {"predicted": actions, "previous": _previous(reader, batch)}
        if has_codes:
            row["codes"] = depth
        if has_pixels:
            row["pixels"] = depth
        if depth_reader is not None:
            row |= depth_reader.batch(i)
        rows.append(row)
    out = {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}
    figures = {"frames": len(out["frame"]), "actions": _action_figures(reader, out)}
    if has_codes:
        figures["depth_tokens"] = _token_figures(reader, data, out)
    reader.close()
    return Result(
        figures=figures,
        predicted=out["predicted"],
        true=out["action"],
        mask=out["action_mask"],
        images=out[f"image_{config.views[0]}"],
        frames=out["frame"],
        codes=out.get("codes"),
        tokens=np.where(out["depth_tokens_mask"], out["depth_tokens"], sidecar.INVALID_TOKEN) if has_codes else None,
        pixels=out.get("pixels"),
        raw_depth=out.get("depth"),
        scale=out.get("depth_scale"),
        offset=out.get("depth_offset"),
    )


def _previous(reader: loader.Loader, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Normalised action of the frame before, f32 [B, A]; NaN on the first frame of an episode."""
    out = np.full((len(batch["frame"]), batch["action"].shape[-1]), np.nan, np.float32)
    for number, source in enumerate(reader.sources):
        rows = np.flatnonzero(batch["dataset"] == number)
        frames = batch["frame"][rows]
        start = source.frames.start[frames]
        later = frames > start
        out[rows[later]] = normalise.normalise(source.frames.action[frames[later] - 1], source.action)
    return out


def _action_figures(reader: loader.Loader, out: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean absolute error in normalised units over the real (not repeated) steps of the chunks, by method."""
    true, mask = out["action"], out["action_mask"]
    mean = np.stack(
        [normalise.normalise(np.asarray([s.action.statistics.mean], np.float32), s.action)[0] for s in reader.sources]
    )
    guesses = {
        "policy": out["predicted"],
        "mean_action": np.broadcast_to(mean[out["dataset"]][:, None], true.shape),
        "repeat_last_action": np.broadcast_to(out["previous"][:, None], true.shape),
    }
    # The first frame of an episode has no action before it: no method is judged there.
    rows = ~np.isnan(out["previous"]).any(axis=1)
    figures: dict[str, Any] = {"first_frames_left_out": int((~rows).sum())}
    for name, guess in guesses.items():
        error = np.abs(guess[rows] - true[rows])[mask[rows]]
        figures[name] = {"l1": float(error.mean()), "l1_by_dimension": error.mean(axis=0).round(5).tolist()}
    return figures


def _token_figures(reader: loader.Loader, data: data_config.DataConfig, out: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of the predicted codes and of the most frequent code per position of the training split."""
    mask = out["depth_tokens_mask"]
    frequent = np.zeros_like(out["depth_tokens"])
    for number in range(len(reader.sources)):
        train = sidecar.open_sidecar(data.datasets[number].depth_tokens, data.statistics_split or "train")
        frequent[out["dataset"] == number] = most_frequent(np.asarray(train.values), train.metadata.details["codes"])
    right = out["codes"] == out["depth_tokens"]
    baseline = frequent == out["depth_tokens"]
    return {
        "accuracy": float(right[mask].mean()),
        "most_frequent_per_position_accuracy": float(baseline[mask].mean()),
        "positions": int(out["depth_tokens"].shape[1]),
    }


def most_frequent(tokens: np.ndarray, codes: int) -> np.ndarray:
    """The most frequent code of each position, i32 [P], of u16 [F, P] tokens; invalid ones do not count."""
    valid = tokens != sidecar.INVALID_TOKEN
    columns = [np.bincount(tokens[valid[:, p], p], minlength=codes).argmax() for p in range(tokens.shape[1])]
    return np.asarray(columns, np.int32)
