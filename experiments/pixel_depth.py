"""Ablation: the depth expert regresses depth pixels instead of codebook indices.

  python -m qdepth_jax.train --config=experiments/pixel_depth.py:bridge --workdir=runs/bridge_pixel_depth

No tokenizer is needed; the loss is L1 on valid pixels of the normalised depth, in the range of the
tokenizer that the main experiment has (experiments/tokenizer.py).
"""

import ml_collections

from experiments import recipes


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_pixel_depth"
    config.model.depth.head = "pixels"
    return config
