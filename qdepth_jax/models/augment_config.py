"""Image augmentation as data: what may happen to a training image, and what others published. No JAX here.

The order of operations is fixed, as in octo, OpenVLA and open-pi-zero: crop, brightness, contrast, saturation, hue; the
result is clipped to [0, 1] after each. A range that changes nothing switches its operation off, so `ViewAugment()` is
no augmentation at all.
"""

import dataclasses
import math

from qdepth_jax import errors

COMPAT = ("none", "octo", "open_pi_zero")
ONE = (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class ViewAugment:
    """Ranges of the uniform draws for one view, on images in [0, 1].

    Attributes:
      crop_scale: share of the image's area that a crop keeps; it is resized back to the whole size.
      crop_ratio: width / height of the crop relative to the image's, drawn uniformly in its logarithm.
      brightness: d; a number of [-d, d] is added.
      contrast: factor on the distance from the mean of each channel.
      saturation: factor on the saturation (HSV).
      hue: d; a number of [-d, d] is added to the hue, where 1 is the whole circle.
    """

    crop_scale: tuple[float, float] = ONE
    crop_ratio: tuple[float, float] = ONE
    brightness: float = 0.0
    contrast: tuple[float, float] = ONE
    saturation: tuple[float, float] = ONE
    hue: float = 0.0

    def __post_init__(self):
        for name, lowest, highest in (
            ("crop_scale", 0.01, 1.0),
            ("crop_ratio", 0.01, 100.0),
            ("contrast", 0.0, math.inf),
            ("saturation", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if len(value) != 2 or not lowest <= value[0] <= value[1] <= highest:
                raise errors.UserError(
                    f"augmentation {name}={value} must be (low, high) with {lowest} <= low <= high <= {highest}"
                )
        for name, highest in (("brightness", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= highest:
                raise errors.UserError(f"augmentation {name}={getattr(self, name)} must lie in 0..{highest}")

    @property
    def crops(self) -> bool:
        """Whether pixels move."""
        return self.crop_scale != ONE or self.crop_ratio != ONE

    def colour_only(self) -> "ViewAugment":
        """The same without the crop."""
        return dataclasses.replace(self, crop_scale=ONE, crop_ratio=ONE)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images of a policy. Validation and inference never see it.

    Attributes:
      main: of the main view. Depth labels belong to the whole frame, so a policy that learns depth may not crop it.
      others: of every other view; published recipes leave the crop out for wrist cameras.
      compat: which draws are one and the same number. "none": eight independent ones for each image (crop scale, ratio,
        two offsets, four colours). The published pipelines hand dlimp one seed for several draws, so those are
        fully correlated and all crops lie on one diagonal: "open_pi_zero" (and OpenVLA, by their forks of dlimp) the
        four of the crop; "octo" all eight. This repeats the correlation, not TensorFlow's random bits.
    """

    main: ViewAugment = ViewAugment()
    others: ViewAugment = ViewAugment()
    compat: str = "none"

    def __post_init__(self):
        if self.compat not in COMPAT:
            raise errors.UserError(f"augment.compat={self.compat!r} is unknown: use one of {COMPAT}")

    @property
    def active(self) -> bool:
        return self.main != ViewAugment() or self.others != ViewAugment()


# Published values for the main view.
OPEN_PI_ZERO = ViewAugment((0.8, 1.0), (0.9, 1.1), 0.1, (0.9, 1.1), (0.9, 1.1), 0.05)  # octo's finetuning values too
OCTO_BASE = ViewAugment((0.8, 1.0), (0.9, 1.1), 0.2, (0.8, 1.2), (0.8, 1.2), 0.1)  # octo's pretraining config
OPENVLA = ViewAugment((0.9, 0.9), ONE, 0.2, (0.8, 1.2), (0.8, 1.2), 0.05)

# Whole recipes by name, for `config.augment = config_lib.section(PUBLISHED[...])`: other views get the colours alone.
PUBLISHED = {
    "none": AugmentConfig(),
    **{
        name: AugmentConfig(main=view, others=view.colour_only())
        for name, view in (("open_pi_zero", OPEN_PI_ZERO), ("octo_base", OCTO_BASE), ("openvla", OPENVLA))
    },
}


def colour_only(name: str) -> AugmentConfig:
    """A published recipe without its crop: what a policy with depth labels may use."""
    recipe = PUBLISHED[name]
    return dataclasses.replace(recipe, main=recipe.main.colour_only())
