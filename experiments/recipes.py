"""The recipes that an ablation can change: NAME or NAME,ARGUMENT, e.g. `bridge`, `libero,object`, `demo`."""

import importlib

import ml_collections

from qdepth_jax import errors

NAMES = ("bridge", "fractal", "libero", "oxe", "openpi", "demo", "cpu_study")


def get(recipe: str) -> ml_collections.ConfigDict:
    """The config of a recipe.

    Raises:
      UserError: unknown recipe.
    """
    name, _, argument = recipe.partition(",")
    if name not in NAMES:
        raise errors.UserError(f"recipe {name!r} is unknown: use one of {NAMES}, e.g. experiments/baseline.py:bridge")
    module = importlib.import_module(f"experiments.{name}")
    return module.get_config(argument) if argument else module.get_config()
