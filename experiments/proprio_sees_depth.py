"""Ablation: no hybrid attention, the proprio token sees the depth tokens.

  python -m qdepth_jax.train --config=experiments/proprio_sees_depth.py:bridge --workdir=runs/bridge_proprio_sees_depth

One zero of the visibility table becomes a one (QDepth-VLA, ablation 4).
"""

import ml_collections

from experiments import recipes


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_proprio_sees_depth"
    config.model.visibility = "proprio_sees_depth"
    return config
