"""A small controlled study on simulators: does depth help at the size of two CPU cores?

  python -m qdepth_jax.train --config=experiments/cpu_study.py:metaworld,tokenizer --workdir=...
  python -m qdepth_jax.train --config=experiments/cpu_study.py:metaworld --workdir=... --config.tokenizer=...
  python -m qdepth_jax.train --config=experiments/baseline.py:cpu_study,metaworld --workdir=... --config.seed=1

tools/run_study.py runs all of it and writes the tables. Arguments: libero or metaworld; `,tokenizer` for the depth
tokenizer of its data.
The variants are the ablation files that change the full-size recipes too; model, data, steps and seeds are the same.
"""

import dataclasses
import pathlib

import ml_collections

from qdepth_jax import config as config_lib
from qdepth_jax import depth, errors
from qdepth_jax.models import depth_expert, gemma, policy, siglip, tokenizer

DATA = "datasets/study"  # of runs started by hand; tools/run_study.py collects and names its own
TEXT = str(pathlib.Path(__file__).resolve().parent.parent / "data" / "text_tokenizer" / "study.model")
IMAGE, PATCH = 96, 16
GRID = IMAGE // PATCH
CODES, CODE_DIM = 256, 16


@dataclasses.dataclass(frozen=True)
class Part:
    """One simulator's half of the study.

    Attributes:
      suites: data set -> the suite whose episodes it is and on which its policies are judged.
      views, proprio_dim, action_dim: of the policy. range: of depth that becomes tokens; the rest is masked.
      text_length: tokens of the longest instruction.
      demonstrations, held_out: scripted episodes per task to train on and for validation.
      execute: actions of a chunk that are executed before the next plan.
      episodes: closed-loop episodes per task.
      steps: training steps of every variant.
      pretraining: steps of the one run of the baseline that every variant and seed starts from; 0 = random weights.
    """

    suites: dict[str, str]
    views: tuple[str, ...]
    proprio_dim: int
    action_dim: int
    range: depth.DepthRange
    text_length: int
    demonstrations: int
    held_out: int
    execute: int
    episodes: int
    steps: int
    pretraining: int


PARTS = {
    "metaworld": Part(
        suites={"metaworld": "metaworld_mt10"},
        views=("main",),
        proprio_dim=4,
        action_dim=4,
        # The table lies at 0.6 to 1.3 m; behind it is the sky of the simulator, up to 84 m.
        range=depth.DepthRange("metric", 0.5, 1.7),
        text_length=16,
        demonstrations=30,
        held_out=3,
        execute=16,
        episodes=10,
        steps=1000,
        pretraining=0,
    ),
    "libero": Part(
        suites={"libero_object": "libero_object", "libero_spatial": "libero_spatial"},
        views=("main", "wrist"),
        proprio_dim=8,
        action_dim=7,
        range=depth.DepthRange("metric", 0.25, 3.25),
        text_length=24,
        demonstrations=15,
        held_out=1,
        execute=8,
        episodes=3,
        # Few demonstrations of twenty tasks that all need a grasp: a thousand steps from random weights solve none.
        steps=800,
        pretraining=6000,
    ),
}
# Name -> (experiment file that makes it of this recipe, "" = this file itself; whether it needs depth tokens).
VARIANTS = {
    "qdepth": ("", True),
    "baseline": ("baseline", False),
    "no_depth_loss": ("no_depth_loss", False),
    "pixel_depth": ("pixel_depth", False),
    "proprio_sees_depth": ("proprio_sees_depth", True),
    "future_depth": ("future_depth", True),
}
SEEDS = (0, 1, 2)


def get_config(argument: str = "metaworld") -> ml_collections.ConfigDict:
    name, _, kind = argument.partition(",")
    if name not in PARTS or kind not in ("", "tokenizer"):
        raise errors.UserError(
            f"experiments/cpu_study.py:{argument} is unknown: use one of {', '.join(PARTS)}, or {next(iter(PARTS))},"
            "tokenizer"
        )
    part = PARTS[name]
    config = config_lib.default()
    config.name = f"study_{name}"
    for dataset in part.suites:
        config.datasets[dataset] = config_lib.dataset(f"{DATA}/{dataset}/1.0.0")
    config.eval_split = "val"
    config.optim.schedule = "cosine"
    config.optim.min_learning_rate = 1e-5
    _tokenizer(config, part) if kind else _policy(config, part)
    return config


def _tokenizer(config: ml_collections.ConfigDict, part: Part) -> None:
    config.name += "_tokenizer"
    config.model_kind = "tokenizer"
    config.model = config_lib.section(
        tokenizer.TokenizerConfig(
            depth_size=IMAGE, grid=GRID, num_codes=CODES, code_dim=CODE_DIM, widths=(24, 48, 96), blocks=1,
            start_step=100, decay=0.97, range=part.range,
        )
    )  # fmt: skip
    config.data.skip_unlabelled = False
    config.optim.learning_rate = 4e-3
    config.optim.warmup_steps = 50
    config.train.batch_size = 16
    config.train.total_steps = 1500
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 500


def _policy(config: ml_collections.ConfigDict, part: Part) -> None:
    small = gemma.ExpertConfig(width=128, mlp=384)
    config.model = config_lib.section(
        policy.sized(
            "demo",
            siglip=siglip.SiglipConfig(image_size=IMAGE, patch=PATCH, width=128, depth=4, heads=4, mlp=384),
            vlm=small,
            action=small,
            depth=depth_expert.DepthConfig(
                expert=small, grid=GRID, codes=CODES, code_dim=CODE_DIM, conv_width=96, pixels_per_token=PATCH,
                range=part.range, loss_weight=0.1, loss_decay=0.9999,
            ),
            views=part.views,
            layers=4,
            text_length=part.text_length,
            proprio_dim=part.proprio_dim,
            action_dim=part.action_dim,
            horizon=16,
            scan=False,
            # Random words need training; PaliGemma's are pretrained and stay frozen in the full recipes.
            freeze_embedding=False,
        )
    )  # fmt: skip
    config.data.text_tokenizer = TEXT
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.train.batch_size = 32
    config.train.total_steps = part.steps
    config.train.log_every = 50
    config.train.eval_every = part.steps // 4
    config.train.eval_batches = 8
    config.train.checkpoint_every = part.steps // 4
