"""Golden vectors of Video-Depth-Anything: tokens and depth of a window, and depth of a whole video.

Arrays: `w/<state-dict key>`; `ref/frames` f32 [B, T, H, W, 3], normalised -> `ref/patch_tokens_last` [B*T, P, D] and
`ref/depth` [B, T, H, W]; `ref/video_uint8` [T, H, W, 3] -> `ref/video_depth` [T, H, W]; `ref/config` (JSON).
"""

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax import errors, video_depth
from qdepth_jax.models import depth_anything, dinov2, dpt
from qdepth_jax.weights import depth_anything as names
from qdepth_jax.weights import parity, table

NEEDED = tuple(
    f"ref/{name}" for name in ("config", "frames", "patch_tokens_last", "depth", "video_uint8", "video_depth")
)
# Scale and shift of a window are sums over its pixels, taken in another order than the original's: five times the
# tolerance of a single window.
VIDEO = 5.0


def compare(arrays: dict[str, np.ndarray], absolute: float, relative: float) -> list[parity.Row]:
    """Runs our network and the procedure around it; one row for each output. Nothing here is relative."""
    del relative
    config, params, c = network_from(arrays)
    network, frames = depth_anything.DepthAnything(config), jnp.asarray(arrays["ref/frames"])
    flat = frames.reshape(-1, *frames.shape[2:])
    tokens = jax.jit(lambda p, x: network.apply({"params": p}, x, method="tokens"))(params, flat)
    depth = jax.jit(lambda p, x: depth_anything.estimate(config, p, x))(params, frames)
    video = arrays["ref/video_uint8"]
    window = jax.jit(video_depth.make_window_fn(config, *video.shape[1:3], c.get("input_size", 518)))
    whole = video_depth.video_depth(lambda x: window(params, x), video)
    return [
        parity.absolute("patch_tokens_last", tokens, arrays["ref/patch_tokens_last"], absolute),
        parity.absolute("depth", depth, arrays["ref/depth"], absolute),
        parity.absolute("video_depth", whole, arrays["ref/video_depth"], VIDEO * absolute),
    ]


def network_from(arrays: dict[str, np.ndarray]) -> tuple[depth_anything.DepthAnythingConfig, dict, dict]:
    """(config, our parameters, the file's own description)."""
    c = parity.description(arrays, "ref/config")
    try:
        trunk = dinov2.Dinov2Config(
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            patch=c["patch_size"],
            trained_size=c["pos_embed_image_size"],
            taps=tuple(c["intermediate_layers"]),
            offset=c["interpolate_offset"],
        )
        head = dpt.DptConfig(
            features=c["features"],
            out_channels=tuple(c["out_channels"]),
            frames=c["num_frames"],
            temporal_heads=c["temporal_heads"],
        )
        if c["temporal_pos"] != "ape":
            raise errors.UserError(f"temporal positions {c['temporal_pos']!r} are not supported: only 'ape'")
    except KeyError as error:
        raise errors.UserError(f"the file's config lacks {error}") from error
    config = depth_anything.DepthAnythingConfig(trunk=trunk, head=head)
    shapes = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    weights = {name.removeprefix("w/"): array for name, array in arrays.items() if name.startswith("w/")}
    loaded = table.load(weights, names.TABLE, shapes, "Video-Depth-Anything")
    return config, jax.tree.map(jnp.asarray, loaded.params), c
