"""Future depth: the depth tokens of frame t + horizon, the paper's own future work.

  python -m qdepth_jax.train --config=experiments/future_depth.py:bridge --workdir=runs/bridge_future_depth

The only change is which frame's depth is the target.
"""

import ml_collections

from experiments import recipes


def get_config(recipe: str = "bridge") -> ml_collections.ConfigDict:
    config = recipes.get(recipe)
    config.name += "_future_depth"
    config.data.depth_offset = config.model.horizon
    return config
