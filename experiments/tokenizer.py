"""The depth tokenizer of a data set at full size: 256 codes of 160 dims on a 16x16 grid, input 256x256.

  python -m qdepth_jax.train --config=experiments/tokenizer.py:libero --workdir=runs/libero_tokenizer
  python tools/tokenize_depth.py --tokenizer=runs/libero_tokenizer

Arguments: libero, bridge or fractal. One tokenizer per data set, then frozen [QDepth-VLA].
"""

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


def get_config(data: str = "libero") -> ml_collections.ConfigDict:
    if data not in DATA:
        raise errors.UserError(f"data {data!r} is unknown: use one of {sorted(DATA)}")
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
