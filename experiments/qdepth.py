"""QDepth-VLA at full size: every hyperparameter of the paper (arXiv 2510.14836), with its source.

Not run by itself: experiments/bridge.py, fractal.py and libero.py add data and length. Sources: [paper] its text;
[notes] independent readers of it agree; [open-pi-zero] the base code at commit c3df7fb, where the paper says
nothing; DEVIATION: ours.
"""

import ml_collections

from qdepth_jax import config as config_lib
from qdepth_jax.models import augment_config, policy

GLOBAL_BATCH = 1024  # [paper] 32 per GPU on 8 GPUs, accumulated


def get_config(**model) -> ml_collections.ConfigDict:
    """The main experiment; `model` replaces fields of PolicyConfig."""
    config = config_lib.default()
    config.name = "qdepth"
    # Sizes [paper, table 1]; lambda_0 0.01, code size 160, K 256 [notes]; gamma 0.9999 [a third party's value]; views,
    # chunk and proprio size are set by the recipe. Flow time Beta(1.5, 1), 10 Euler steps [open-pi-zero].
    # DEVIATION: time period and expert rope theta are 10000, the values of the released open-pi-zero checkpoints; its
    # training configs say 100, and the two never meet in one file.
    config.model = config_lib.section(policy.sized("full", dtype="bfloat16", remat="full", **model))
    # [open-pi-zero] its colour changes. DEVIATION: no random crop, because depth tokens belong to the whole frame; the
    # baseline does without it too, so that the two stay comparable. The published baseline crops:
    # --config.augment.main.crop_scale='(0.8, 1.0)' --config.augment.main.crop_ratio='(0.9, 1.1)'.
    config.augment = config_lib.section(augment_config.colour_only("open_pi_zero"))
    config.optim.learning_rate = 5e-5  # [notes] vlm and action expert; DEVIATION: the depth expert too (not published)
    config.optim.warmup_steps = 200  # [open-pi-zero]
    config.optim.cycle_steps = 10_000_000  # [open-pi-zero] in effect constant
    config.optim.min_learning_rate = 1e-8  # [open-pi-zero]
    config.optim.weight_decay = 0.0  # [open-pi-zero]; the paper: "decoupled weight decay", no value
    config.optim.clip_norm = 1.0  # [open-pi-zero]
    config.train.batch_size = GLOBAL_BATCH
    config.train.micro_batches = 4  # [paper] 8 x 32 at a time
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_batches = 1
    config.train.checkpoint_every = 1000
    config.data.normalisation = "bounds"  # [open-pi-zero] q01/q99 to [-1, 1], gripper left in {0, 1}
    config.data.text_tokenizer = "paligemma_tokenizer.model"  # the path of PaliGemma's own file
    return config


def steps(epochs: float, frames: int) -> int:
    """Optimiser steps of `epochs` passes over `frames`."""
    return round(epochs * frames / GLOBAL_BATCH)
