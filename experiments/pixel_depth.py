"""Ablation: the depth expert regresses depth pixels instead of codebook indices.

  python -m qdepth_jax.train --config=experiments/pixel_depth.py:bridge --workdir=runs/bridge_pixel_depth

No tokenizer is needed; the loss is L1 on valid pixels of the normalised depth, in the range of the codes
that the pixels replace.
"""

import ml_collections

from experiments import recipes, tokenizer
from qdepth_jax import config as config_lib

# recipe -> the data of experiments/tokenizer.py whose range its labels have, where the two are not named alike.
LABELS = {"openpi": "libero", "oxe": "bridge"}


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_pixel_depth"
    config.model.depth.head = "pixels"
    name = recipe.partition(",")[0]
    data = LABELS.get(name, name)
    if data in tokenizer.DATA:  # the others have their range beside their tokenizer
        config.model.depth.range = config_lib.section(tokenizer.DATA[data][0])
    return config
