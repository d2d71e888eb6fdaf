"""The shipped LIBERO sample on two CPU cores: the same code as the full recipes at a small size.

  python -m qdepth_jax.train --config=experiments/demo.py:tokenizer --workdir=runs/demo/tokenizer
  python tools/tokenize_depth.py --tokenizer=runs/demo/tokenizer
  python -m qdepth_jax.train --config=experiments/demo.py --workdir=runs/demo/policy \
      --config.tokenizer=runs/demo/tokenizer
  python -m qdepth_jax.train --config=experiments/baseline.py:demo --workdir=runs/demo/baseline

Nothing is pretrained: the policy starts from random weights, sees two dozen episodes, and is no robot policy.
"""

import pathlib

import ml_collections

from qdepth_jax import config as config_lib
from qdepth_jax import depth, errors
from qdepth_jax.models import depth_expert, gemma, policy, siglip, tokenizer

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
SUITES = ("libero_object", "libero_spatial")
RANGE = depth.DepthRange("metric", 0.25, 3.25)  # the sample's depth lies between 0.31 and 3.06 m
GRID, CODES, CODE_DIM = 8, 256, 32


def get_config(part: str = "policy") -> ml_collections.ConfigDict:
    parts = {"tokenizer": _tokenizer, "policy": _policy}
    if part not in parts:
        raise errors.UserError(f"experiments/demo.py has no part {part!r}: use one of {sorted(parts)}")
    config = config_lib.default()
    for suite in SUITES:
        config.datasets[suite] = config_lib.dataset(str(DATA / suite / "1.0.0"))
    config.eval_split = "val"
    config.optim.schedule = "cosine"
    config.optim.min_learning_rate = 1e-5
    parts[part](config)
    return config


def _tokenizer(config: ml_collections.ConfigDict) -> None:
    config.name = "demo_tokenizer"
    config.model_kind = "tokenizer"
    config.model = config_lib.section(
        tokenizer.TokenizerConfig(
            depth_size=128,
            grid=GRID,
            num_codes=CODES,
            code_dim=CODE_DIM,
            widths=(24, 48, 96),
            blocks=1,
            start_step=60,
            decay=0.95,  # few steps: codes must follow the encoder faster than the default 0.99 does
            range=RANGE,
        )
    )
    config.data.skip_unlabelled = False
    config.optim.learning_rate = 4e-3
    config.optim.warmup_steps = 30
    config.train.batch_size = 16
    config.train.total_steps = 660
    config.train.eval_every = 132
    config.train.eval_batches = 16
    config.train.checkpoint_every = 330


def _policy(config: ml_collections.ConfigDict) -> None:
    config.name = "demo_policy"
    small = gemma.ExpertConfig(width=96, mlp=256)
    config.model = config_lib.section(
        policy.sized(
            "demo",
            siglip=siglip.SiglipConfig(image_size=128, patch=16, width=128, depth=3, heads=4, mlp=256),
            vlm=gemma.ExpertConfig(width=96, mlp=256),
            action=small,
            depth=depth_expert.DepthConfig(
                expert=small, grid=GRID, codes=CODES, code_dim=CODE_DIM, conv_width=96, pixels_per_token=16,
                range=RANGE, loss_weight=0.1, loss_decay=0.9999,
            ),
            layers=3,
            text_length=24,
            proprio_dim=8,
            horizon=16,
            scan=False,
            # Random words need training; PaliGemma's are pretrained and stay frozen in the full recipes.
            freeze_embedding=False,
        )
    )  # fmt: skip
    config.data.text_tokenizer = str(DATA / "text_tokenizer" / "libero.model")
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.train.batch_size = 24
    config.train.total_steps = 400
    config.train.eval_every = 100
    config.train.eval_batches = 12
    config.train.checkpoint_every = 200
