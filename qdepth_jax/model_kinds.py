"""Which kinds of model there are: the table from `config.model_kind` to config class and objective."""

from typing import Any

import ml_collections

from qdepth_jax import config as config_lib
from qdepth_jax import errors
from qdepth_jax.models import paligemma, policy, tokenizer

KINDS = {
    "policy": policy.PolicyConfig,
    "tokenizer": tokenizer.TokenizerConfig,
    "paligemma": paligemma.PaligemmaConfig,  # imported, inspected, exported, started from; not trained by itself
}
MAKE_OBJECTIVE = {"policy": policy.make_objective, "tokenizer": tokenizer.make_objective}


def model_config(config: ml_collections.ConfigDict) -> Any:
    """The frozen dataclass of the experiment's model.

    Raises:
      UserError: unknown model_kind, unknown key, or sizes that do not fit.
    """
    if config.model_kind not in KINDS:
        raise errors.UserError(f"model_kind={config.model_kind!r} is unknown: use one of {sorted(KINDS)}")
    return config_lib.build(KINDS[config.model_kind], config.model, "model")
