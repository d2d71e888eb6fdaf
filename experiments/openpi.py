"""QDepth-VLA from openpi's weights, on LIBERO: `experiments/openpi.py:pi0` or `:pi05`, all four suites, two cameras.

  python tools/import_weights.py --format=openpi --output=weights/pi0 \
      --input=gs://openpi-assets/checkpoints/pi0_base/params
  python -m qdepth_jax.train --config=experiments/openpi.py:pi0 --workdir=runs/pi0 --config.init_from=weights/pi0 \
      --config.tokenizer=runs/libero_tokenizer
  python -m qdepth_jax.train --config=experiments/baseline.py:openpi,pi0 --workdir=runs/pi0_baseline \
      --config.init_from=weights/pi0

The conventions of the weights (time direction, positions, adaptive norms, 32 action numbers, 7 of them used) come
with the model; what the data must do for them is set here. Sources: [openpi] its training configs; DEVIATION: ours.
"""

import ml_collections

from experiments import libero
from qdepth_jax import config as config_lib
from qdepth_jax import errors
from qdepth_jax.models import policy, policy_config

# Which statistics and which prompt each model was pretrained with [openpi]: pi0 mean and deviation, pi0.5 quantiles
# and the state as text.
READS = {
    "pi0": {"normalisation": "normal", "text_rule": "openpi", "proprio_dim": 32},
    "pi05": {"normalisation": "bounds", "text_rule": "openpi_state"},
}


def get_config(weights: str = "pi0") -> ml_collections.ConfigDict:
    if weights not in READS:
        raise errors.UserError(f"weights {weights!r} are unknown: use one of {sorted(READS)}")
    config = libero.get_config("all")
    config.name = f"libero_{weights}"
    # A view that is always masked takes no position in openpi, so LIBERO's two cameras are the same as three there.
    model = policy.sized(
        weights,
        depth=policy_config.DepthConfig(),
        views=("main", "wrist"),
        action_used=7,
        dtype="bfloat16",
        remat="full",
    )
    config.model = config_lib.section(model)
    config.data.update(READS[weights])
    config.data.normalise_gripper = True  # [openpi] treats all numbers alike
    config.optim.learning_rate = 5e-5 if weights == "pi05" else 2.5e-5  # [openpi] pi05_libero; the default
    config.optim.min_learning_rate = config.optim.learning_rate if weights == "pi05" else 2.5e-6
    config.optim.warmup_steps = 10_000 if weights == "pi05" else 1_000
    config.optim.cycle_steps = 0
    config.optim.b2 = 0.95
    config.train.batch_size = 256
    config.train.micro_batches = 1
    config.train.total_steps = 30_000
    return config
