"""Training images on the device: random resized crop and colour changes, one draw per operation, example and view.

Each operation is the one of `tf.image` that octo, OpenVLA and open-pi-zero call through dlimp, on f32 in [0, 1]. Every
random number is a function of (run key, global position of the example, view, operation) and of nothing else:
neither host nor device numbers nor micro-batches change an image.

Axis letters: B batch, H W input size, S R output rows and columns.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from qdepth_jax.models import augment_config, flow, images

DRAWS = ("crop_scale", "crop_ratio", "crop_top", "crop_left", "brightness", "contrast", "saturation", "hue")
# For each draw, whose random number it takes (see AugmentConfig.compat).
_TAKES = {"none": (0, 1, 2, 3, 4, 5, 6, 7), "open_pi_zero": (0, 0, 0, 0, 4, 5, 6, 7), "octo": (0,) * 8}


# ---- the operations, at given parameters ----


def crop_and_resize(image: Array, boxes: Array, size: tuple[int, int]) -> Array:
    """`tf.image.crop_and_resize`, bilinear: corners of the box fall on corner pixels; no antialiasing.

    Two products with interpolation matrices instead of a gather, which accelerators are slow at. DEVIATION: a box that
    rounding lets end a hair outside keeps its last row; TensorFlow paints that row black.

    Args:
      image: f32 [B, H, W, 3].
      boxes: f32 [B, 4], (top, left, bottom, right) as shares of the image.
      size: (S, R).

    Returns:
      f32 [B, S, R, 3].
    """
    rows = _bilinear(boxes[:, 0], boxes[:, 2], image.shape[1], size[0])
    columns = _bilinear(boxes[:, 1], boxes[:, 3], image.shape[2], size[1])
    # Full precision: the fast default of accelerators keeps 8 bits, as few as a grey value has.
    x = jnp.einsum("BSH,BHWC->BSWC", rows, image, precision="highest")
    return jnp.einsum("BRW,BSWC->BSRC", columns, x, precision="highest")


def _bilinear(low: Array, high: Array, size_in: int, size_out: int) -> Array:
    """Weights f32 [B, size_out, size_in] along one axis; low and high [B] are shares of the axis."""
    steps = jnp.arange(size_out, dtype=jnp.float32) / max(size_out - 1, 1)
    if size_out == 1:
        steps = jnp.full((1,), 0.5)
    place = (low[:, None] + (high - low)[:, None] * steps[None]) * (size_in - 1)
    place = jnp.clip(place, 0.0, size_in - 1.0)
    return jnp.maximum(0.0, 1.0 - jnp.abs(place[:, :, None] - jnp.arange(size_in, dtype=jnp.float32)[None, None]))


def adjust_brightness(image: Array, delta: Array) -> Array:
    """x + delta; image [B, H, W, 3], delta [B]."""
    return image + _wide(delta)


def adjust_contrast(image: Array, factor: Array) -> Array:
    """(x - mean) * factor + mean, the mean over all pixels of a channel; factor [B]."""
    mean = image.mean(axis=(1, 2), keepdims=True)
    return (image - mean) * _wide(factor) + mean


def adjust_saturation(image: Array, factor: Array) -> Array:
    """Saturation times factor [B], at most 1; hue and value stay.

    With value v and chroma c of a pixel, each channel lies at v - c * g(hue), so scaling c does it without the hue.
    """
    value = image.max(axis=-1, keepdims=True)
    chroma = value - image.min(axis=-1, keepdims=True)
    most = value / jnp.where(chroma > 0, chroma, 1.0)
    return value - (value - image) * jnp.minimum(_wide(factor), jnp.where(chroma > 0, most, 1.0))


def adjust_hue(image: Array, delta: Array) -> Array:
    """Hue plus delta [B], in turns; saturation and value stay."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(axis=-1)
    chroma = value - image.min(axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sector = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    hue = jnp.mod(sector + 6.0 * delta[:, None, None], 6.0)
    # Each channel is a trapezoid of the hue, red, green and blue a third of a turn apart.
    k = jnp.mod(hue[..., None] + jnp.array([5.0, 3.0, 1.0])[None, None, None], 6.0)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def _wide(x: Array) -> Array:
    """[B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


# ---- the random numbers ----


def uniforms(key: Array, position: Array, view: int) -> Array:
    """One number in [0, 1) for each of DRAWS, f32 [B, 8], for examples at global positions u32 [B]."""

    def one(key: Array) -> Array:
        key = jax.random.fold_in(key, view)
        return jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n)))(jnp.arange(len(DRAWS)))

    return jax.vmap(one)(flow.example_keys(key, position))


def assign(numbers: Array, compat: str = "none") -> dict[str, Array]:
    """`uniforms` by name, f32 [B] each; with `compat` several names share one number (see AugmentConfig)."""
    return {name: numbers[:, n] for name, n in zip(DRAWS, _TAKES[compat])}


def crop_boxes(u: dict[str, Array], config: augment_config.ViewAugment) -> Array:
    """(top, left, bottom, right) f32 [B, 4] of dlimp's random_resized_crop from the first four of DRAWS."""
    scale = _between(u["crop_scale"], config.crop_scale)
    low, high = config.crop_ratio
    ratio = jnp.exp(_between(u["crop_ratio"], (math.log(low), math.log(high))))
    height = jnp.clip(jnp.sqrt(scale / ratio), 0.0, 1.0)
    width = jnp.clip(jnp.sqrt(scale * ratio), 0.0, 1.0)
    top, left = u["crop_top"] * (1.0 - height), u["crop_left"] * (1.0 - width)
    return jnp.stack([top, left, top + height, left + width], axis=1)


def _between(u: Array, bounds: tuple[float, float]) -> Array:
    return bounds[0] + u * (bounds[1] - bounds[0])


# ---- together ----


def apply(image: Array, u: dict[str, Array], config: augment_config.ViewAugment) -> Array:
    """All operations of `config` in the published order, with the uniform numbers `u` of `assign`.

    Args:
      image: u8 [B, S, S, 3].

    Returns:
      u8 [B, S, S, 3]: back to whole grey values, as in the published pipelines.
    """
    one, none = augment_config.ONE, 0.0
    x = image.astype(jnp.float32) * (1 / 255)
    if config.crops:
        x = jnp.clip(crop_and_resize(x, crop_boxes(u, config), image.shape[1:3]), 0.0, 1.0)
    for name, adjust, bounds, identity in (
        ("brightness", adjust_brightness, (-config.brightness, config.brightness), (none, none)),
        ("contrast", adjust_contrast, config.contrast, one),
        ("saturation", adjust_saturation, config.saturation, one),
        ("hue", adjust_hue, (-config.hue, config.hue), (none, none)),
    ):
        if bounds != identity:
            x = jnp.clip(adjust(x, _between(u[name], bounds)), 0.0, 1.0)
    # tf.image.convert_image_dtype: equal shares of [0, 1] for all 256 grey values.
    return jnp.clip(jnp.floor(x * 255.5), 0.0, 255.0).astype(jnp.uint8)


def augment_views(
    batch: dict[str, Array], views: tuple[str, ...], size: int, config: augment_config.AugmentConfig, key: Array
) -> dict[str, Array]:
    """The batch with every `image_{view}` resized to `size` and augmented; everything else as it is.

    Args:
      batch: u8 images [B, H, W, 3] or [B, steps, H, W, 3], and "position" u32 [B].
      views: the main view first.
      size: S of the vision tower; the published pipelines augment after the resize.
      config: ranges; views whose range is the identity are left as they are.
      key: of the run, the same at every step.

    Returns:
      A new dict; augmented images are u8 [B, S, S, 3] or [B, steps, S, S, 3].

    Raises:
      ValueError: an image that is not u8.
    """
    out = dict(batch)
    for number, view in enumerate(views):
        ranges = config.main if number == 0 else config.others
        name = f"image_{view}"
        if ranges == augment_config.ViewAugment():
            continue
        image = batch[name]
        if image.dtype != jnp.uint8:
            raise ValueError(f"{name} is {image.dtype}; augmentation takes the uint8 images of the loader")
        flat = image.reshape(-1, *image.shape[-3:])
        if flat.shape[1:3] != (size, size):
            flat = images.resize(flat, size).astype(jnp.uint8)
        numbers = assign(uniforms(key, batch["position"], number), config.compat)
        # All steps of one example are changed alike: they show one scene.
        numbers = {operation: jnp.repeat(u, len(flat) // len(image)) for operation, u in numbers.items()}
        out[name] = apply(flat, numbers, ranges).reshape(*image.shape[:-3], size, size, 3)
    return out
