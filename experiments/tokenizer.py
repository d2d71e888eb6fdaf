"""The depth tokenizer of a data set at full size: 256 codes of 160 dims on a 16x16 grid, input 256x256.

  python -m qdepth_jax.train --config=experiments/tokenizer.py:libero --workdir=runs/libero_tokenizer
  python tools/tokenize_depth.py --tokenizer=runs/libero_tokenizer

Arguments: libero, bridge or fractal. One tokenizer per data set, then frozen [QDepth-VLA]. And `sample`: the shipped
LIBERO data on two CPU cores at a size to compare quantisers with (benchmarks/tokenizer_table.py, docs/tokenizer.md).
"""

import pathlib

import ml_collections

from qdepth_jax import config as config_lib
from qdepth_jax import depth, errors
from qdepth_jax.models import tokenizer

# data -> (range, sources). LIBERO's simulator depth has 1st and 99th percentile 0.69 and 3.05 m (an independent
# re-implementation); Open-X has no depth of its own, so its labels are relative.
DATA = {
    "libero": (
        depth.DepthRange("metric", 0.4, 3.6),
        {f"libero_{s}": f"datasets/libero_{s}_no_noops/1.0.0" for s in ("spatial", "object", "goal", "10")},
    ),
    "bridge": (depth.DepthRange("relative", 1.0, 0.0), {"bridge_dataset": "datasets/bridge_dataset/1.0.0"}),
    "fractal": (
        depth.DepthRange("relative", 1.0, 0.0),
        {"fractal20220817_data": "datasets/fractal20220817_data/0.1.0"},
    ),
}


SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "data"


def get_config(data: str = "libero") -> ml_collections.ConfigDict:
    if data == "sample":
        return _sample()
    if data not in DATA:
        raise errors.UserError(f"data {data!r} is unknown: use one of {[*sorted(DATA), 'sample']}")
    depth_range, sources = DATA[data]
    config = config_lib.default()
    config.name = f"tokenizer_{data}"
    config.model_kind = "tokenizer"
    config.model = config_lib.section(tokenizer.TokenizerConfig(range=depth_range))
    for name, path in sources.items():
        config.datasets[name] = config_lib.dataset(path)
    config.data.held_out_every = 50
    config.data.skip_unlabelled = False  # depth needs no instruction
    # DEVIATION: the only known learning rate, 1e-5 (a third party's), belongs to the collapsing plain objective.
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 200
    config.optim.weight_decay = 1e-4  # [paper] AdamW, value not given
    config.train.batch_size = 256
    config.train.total_steps = 20_000
    config.train.eval_every = config.train.checkpoint_every = 1000
    return config


def _sample() -> ml_collections.ConfigDict:
    config = config_lib.default()
    config.name = "tokenizer_sample"
    config.model_kind = "tokenizer"
    # 16x16 tokens of 4x4 pixels. Few episodes need many steps more than capacity: the same time spent on small batches
    # (two maps are 512 tokens) and a narrow network gave lower errors, see docs/tokenizer.md.
    config.model = config_lib.section(
        tokenizer.TokenizerConfig(
            depth_size=64, grid=16, num_codes=256, code_dim=8, widths=(64,), blocks=1, start_step=300, decay=0.99,
            range=depth.DepthRange("metric", 0.25, 3.25),
        )
    )  # fmt: skip
    for suite in ("libero_object", "libero_spatial"):
        config.datasets[suite] = config_lib.dataset(str(SAMPLE / suite / "1.0.0"))
    config.eval_split = "val"
    config.data.skip_unlabelled = False
    config.optim.learning_rate = 6e-3
    config.optim.warmup_steps = 30
    config.optim.schedule = "cosine"
    config.optim.min_learning_rate = 1e-5
    config.train.batch_size = 2
    config.train.total_steps = 18_000
    config.train.log_every = 100
    config.train.eval_every = config.train.checkpoint_every = 4500
    return config
