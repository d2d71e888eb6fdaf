"""The open-pi-zero baseline: no depth expert, everything else as in the recipe.

  python -m qdepth_jax.train --config=experiments/baseline.py:bridge --workdir=runs/bridge_baseline

Compare with it before any claim about depth.
"""

import ml_collections

from experiments import recipes


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_baseline"
    config.model.depth = None
    return config
