"""Pretraining on a published mix of Open X-Embodiment data sets: `experiments/oxe.py:magic_soup`, `:bridge_rt_1`...

  python -m qdepth_jax.train --config=experiments/oxe.py:oxe_simple --workdir=runs/oxe --config.tokenizer=runs/tokenizer
  python -m qdepth_jax.train --config=experiments/baseline.py:oxe,magic_soup --workdir=runs/oxe_baseline

Data sets are looked for in datasets/NAME (one version each); --config.datasets.NAME.path=DIR names another place. The
mixes and their weights stand in qdepth_jax/data/mixes.py; octo's own oxe_magic_soup and rtx hold a data set that has a
wrist camera alone: only the baseline takes them, with --config.model.missing_views=True. DEVIATION: the paper pretrains
on single data sets alone.
"""

import ml_collections

from experiments import qdepth
from qdepth_jax import config as config_lib
from qdepth_jax.data import mixes

STEPS = 300_000  # [octo] its published pretraining length


def get_config(mix: str = "oxe_simple") -> ml_collections.ConfigDict:
    config = qdepth.get_config(horizon=4, proprio_dim=8)
    config.name = f"oxe_{mix}"
    for name, weight in mixes.find(mix):
        config.datasets[name] = config_lib.dataset(f"datasets/{name}", weight=weight)
    config.data.proprio_dim = 8  # robots with fewer numbers are filled with zeros
    config.data.image_size = (224, 224)  # native sizes differ, a batch has one
    config.data.held_out_every = 20  # few of these data sets have a validation split
    config.data.max_frames_per_episode = 100  # [octo]
    config.train.total_steps = STEPS
    return config
