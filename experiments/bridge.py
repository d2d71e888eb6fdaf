"""QDepth-VLA on BridgeData V2, the recipe for SIMPLER's WidowX tasks: 13 epochs, chunk 4.

  python -m qdepth_jax.train --config=experiments/bridge.py --workdir=runs/bridge \
      --config.datasets.bridge_dataset.path=DIR --config.datasets.bridge_dataset.depth=ANNOTATION \
      --config.tokenizer=runs/bridge_tokenizer --config.data.text_tokenizer=paligemma_tokenizer.model

Needs depth labels (tools/annotate_depth.py) and a tokenizer (experiments/tokenizer.py:bridge, tools/tokenize_depth.py).
"""

import ml_collections

from experiments import qdepth
from qdepth_jax import config as config_lib

LABELLED_FRAMES = 1_550_000  # [open-pi-zero] transitions with an instruction


def get_config() -> ml_collections.ConfigDict:
    config = qdepth.get_config(horizon=4, proprio_dim=7)  # [paper] chunk 4 in simulation; [open-pi-zero] POS_EULER
    config.name = "bridge"
    config.datasets.bridge_dataset = config_lib.dataset("datasets/bridge_dataset/1.0.0")
    config.eval_split = "val"
    config.train.total_steps = qdepth.steps(13, LABELLED_FRAMES)  # [paper] 13 epochs
    config.data.max_frames_per_episode = 100  # [open-pi-zero]
    return config
