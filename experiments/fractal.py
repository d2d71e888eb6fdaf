"""QDepth-VLA on Fractal (RT-1), the recipe for SIMPLER's Google robot and the first stage of LIBERO: 9 epochs, chunk 4.

  python -m qdepth_jax.train --config=experiments/fractal.py --workdir=runs/fractal \
      --config.datasets.fractal20220817_data.path=DIR --config.tokenizer=runs/fractal_tokenizer
"""

import ml_collections

from experiments import qdepth
from qdepth_jax import config as config_lib

FRAMES = 3_786_400  # [open-pi-zero]


def get_config() -> ml_collections.ConfigDict:
    config = qdepth.get_config(horizon=4, proprio_dim=8)  # [paper]; [open-pi-zero] POS_QUAT
    config.name = "fractal"
    config.datasets.fractal20220817_data = config_lib.dataset("datasets/fractal20220817_data/0.1.0")
    config.data.split = "train[:95%]"  # [open-pi-zero] the data set has one split
    config.eval_split = "train[95%:]"
    config.train.total_steps = qdepth.steps(9, FRAMES)  # [paper] 9 epochs
    config.data.max_frames_per_episode = 100  # [open-pi-zero]
    return config
