"""Ablation: the depth expert and its tokens stay, the depth loss is off.

  python -m qdepth_jax.train --config=experiments/no_depth_loss.py:bridge --workdir=runs/bridge_no_depth_loss

In the paper most of the gain remains here (65.6 against 68.5 and 60.0 without the expert): capacity, not supervision.
"""

import ml_collections

from experiments import recipes


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_no_depth_loss"
    config.model.depth.loss_weight = 0.0
    return config
