"""What TensorFlow makes of a small image: the golden values of test_augment.py and test_images.py.

python tests/models/augment_by_tensorflow.py      writes tests/golden/augment.npz again
"""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "augment.npz"
BOXES = np.array(
    [[0.0, 0.0, 1.0, 1.0], [0.05, 0.1, 0.95, 0.97], [0.13, 0.0, 1.0, 0.9], [0.5, 0.25, 0.75, 0.5]], np.float32
)
FACTORS = {
    "brightness": (-0.1, 0.07),
    "contrast": (0.8, 1.15),
    "saturation": (0.4, 1.1, 2.5),
    "hue": (-0.05, 0.1, 0.45),
}
# (rows, columns, size): shrinking, growing, and by 8:7 as 256 to 224 does.
RESIZES = ((40, 30, 14), (9, 12, 14), (64, 64, 56))
# Parameters of the whole chain: box, then the four factors.
CHAINS = (
    ((0.04, 0.02, 0.96, 0.93), 0.08, 0.93, 1.08, -0.04),
    ((0.1, 0.0, 1.0, 0.94), -0.1, 1.1, 0.9, 0.05),
)


def picture(height: int = 12, width: int = 14) -> np.ndarray:
    """u8 [H, W, 3] with noise, grey, black, white, the pure colours and the ties between two of them."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image[0, :8] = [(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 200, 10),
                    (10, 77, 77)]  # fmt: skip
    image[1, :4] = [(1, 0, 0), (254, 255, 255), (0, 120, 120), (130, 5, 130)]
    return image


def photograph(height: int, width: int) -> np.ndarray:
    """u8 [H, W, 3], smooth with edges."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(0.21 * x + 0.13 * y) * 60, np.cos(0.09 * x * y / width) * 50, np.sin(0.4 * y) * 40]
    edges = 70 * ((x // 7 + y // 5) % 2)
    return np.clip(np.stack([110 + w + edges for w in waves], -1), 0, 255).astype(np.uint8)


def compute() -> dict[str, np.ndarray]:
    """Every golden array, from TensorFlow."""
    import tensorflow as tf

    image = tf.image.convert_image_dtype(picture()[None], tf.float32)
    out = {}
    for size in (image.shape[1:3], (7, 5)):
        for i, box in enumerate(BOXES):
            out[f"crop_{size[0]}_{i}"] = tf.image.crop_and_resize(image, box[None], [0], size)
    for name, factors in FACTORS.items():
        adjust = getattr(tf.image, f"adjust_{name}")
        for i, factor in enumerate(factors):
            out[f"{name}_{i}"] = adjust(image, factor)
    for i, (box, *factors) in enumerate(CHAINS):
        x = tf.clip_by_value(tf.image.crop_and_resize(image, [box], [0], image.shape[1:3]), 0, 1)
        for name, factor in zip(FACTORS, factors):
            x = tf.clip_by_value(getattr(tf.image, f"adjust_{name}")(x, factor), 0, 1)
        out[f"chain_{i}"] = tf.image.convert_image_dtype(x, tf.uint8, saturate=True)
    for height, width, size in RESIZES:
        x = tf.image.resize(photograph(height, width), (size, size), method="lanczos3", antialias=True)
        out[f"lanczos_{height}"] = tf.cast(tf.clip_by_value(tf.round(x), 0, 255), tf.uint8)
    return {name: np.asarray(value) for name, value in out.items()}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **compute())
    print(GOLDEN, GOLDEN.stat().st_size)
