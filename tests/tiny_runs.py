"""A policy with every part, small enough to compile in seconds, as flags of the train command and as a config."""

import importlib

SIZES = {
    "model.siglip.image_size": 32,
    "model.siglip.patch": 16,
    "model.siglip.width": 32,
    "model.siglip.depth": 1,
    "model.siglip.heads": 4,
    "model.siglip.mlp": 64,
    "model.vlm.width": 32,
    "model.vlm.mlp": 64,
    "model.action.width": 32,
    "model.action.mlp": 64,
    "model.depth.expert.width": 32,
    "model.depth.expert.mlp": 64,
    "model.depth.grid": 2,
    "model.depth.conv_width": 16,
    "model.depth.pixels_per_token": 4,
    "model.layers": 1,
    "model.heads": 4,
    "model.head_dim": 16,
    "model.scan": False,
    "train.batch_size": 16,
    "train.log_every": 1,
    "train.eval_every": 0,
    "optim.schedule": "constant",
    "optim.ema_decay": 0.9,
}

# With depth and without a tokenizer: the ablation that regresses depth pixels, on the shipped sample.
CONFIG = "experiments/pixel_depth.py:demo"


def flags(**more: object) -> list[str]:
    """`--config...` of the tiny policy; keywords replace fields ("train__total_steps=5")."""
    values = SIZES | {name.replace("__", "."): value for name, value in more.items()}
    return [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in values.items())]


def config(**more: object):
    """The same as a ConfigDict."""
    out = importlib.import_module("experiments.pixel_depth").get_config("demo")
    values = SIZES | {name.replace("__", "."): value for name, value in more.items()}
    out.update_from_flattened_dict(values)
    return out
