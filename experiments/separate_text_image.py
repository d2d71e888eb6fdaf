"""Reading R2 of the paper's mask: image and text tokens see only their own kind.

  python -m qdepth_jax.train --config=experiments/separate_text_image.py:bridge --workdir=runs/bridge_r2

The paper's rule 1 to the letter. The default is R1, one bidirectional block as in PaliGemma.
"""

import ml_collections

from experiments import recipes


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_separate_text_image"
    config.model.visibility = "r2"
    return config
