"""Every experiment file: full size by eval_shape, and one real train step at a shrunk size."""

import dataclasses
import functools
import importlib
import math
import pathlib
import re

import jax
import numpy as np
import pytest
import synthetic
import tiny_runs

from qdepth_jax import config as config_lib
from qdepth_jax import errors, experiment, optim, sharding, train_step
from qdepth_jax.data import definitions
from qdepth_jax.models import policy, tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIANTS = ("baseline", "no_depth_loss", "pixel_depth", "proprio_sees_depth", "separate_text_image", "future_depth")
FILES = (
    ("bridge", None),
    ("fractal", None),
    ("oxe", "oxe_magic_soup"),
    ("libero", "object"),
    ("libero", "90"),
    ("libero", "all"),
    ("openpi", "pi0"),
    ("openpi", "pi05"),
    ("demo", "policy"),
    ("demo", "tokenizer"),
    ("tokenizer", "libero"),
    ("tokenizer", "bridge"),
    ("tokenizer", "fractal"),
    ("tokenizer", "sample"),
    ("cpu_study", "metaworld"),
    ("cpu_study", "libero"),
    ("cpu_study", "metaworld,tokenizer"),
    *((name, "bridge") for name in VARIANTS),
    *((name, "demo") for name in VARIANTS),
)
BASE = 3_238_100_727  # open-pi-zero on bridge, by its own count
ADDED = 317_787_680  # depth expert, its encoder and decoder
PARAMETERS = {"bridge": BASE + ADDED, "fractal": BASE + 1024 + ADDED, "baseline:bridge": BASE}


def load(name, argument):
    module = importlib.import_module(f"experiments.{name}")
    return module.get_config(argument) if argument else module.get_config()


@pytest.mark.parametrize(("name", "argument"), FILES)
def test_full_size_is_valid_and_shards(name, argument):
    config = load(name, argument)
    experiment.check_keys(config)
    model = experiment.model_config(config)
    objective = experiment.MAKE_OBJECTIVE[config.model_kind](model)
    frozen = policy.frozen_table(model) if config.model_kind == "policy" else ()
    tx = optim.make(config_lib.build(config_lib.OptimConfig, config.optim, "optim"), config.train.total_steps, frozen)
    state = jax.eval_shape(lambda key: train_step.init_state(key, objective, tx, True), jax.random.key(0))
    sharding.state_shardings(sharding.make_mesh(config_lib.MeshConfig(1, 4, 2)), state)
    expected = PARAMETERS.get(name) or PARAMETERS.get(f"{name}:{argument}")
    if expected:
        assert sum(x.size for x in jax.tree.leaves(state.params)) == expected


def test_mixes_that_are_advertised_have_the_views_of_their_model():
    told = (ROOT / "README.md").read_text() + (ROOT / "experiments" / "oxe.py").read_text()
    found = {(name, argument) for name, argument in re.findall(r"experiments/(oxe|baseline)\.py:(\w+(?:,\w+)?)", told)}
    found = {(name, argument) for name, argument in found if name == "oxe" or argument.startswith("oxe,")}
    assert len(found) >= 3
    for name, argument in found:
        config = load(name, argument)
        model = experiment.model_config(config)
        for data_set in config.datasets:
            views = definitions.find(data_set).views
            assert model.missing_views or set(model.views) <= set(views), (name, argument, data_set)
            assert model.depth is None or views[model.views[0]] == definitions.find(data_set).main_view


def shrink(config):
    """The experiment's model at the size of the test model, with every switch of the experiment kept."""
    full = experiment.model_config(config)
    if config.model_kind == "tokenizer":
        return dataclasses.replace(full, depth_size=32, grid=4, num_codes=64, code_dim=8, widths=(8, 8), blocks=1)
    tiny = policy.sized("tiny")
    keep = (
        "views",
        "horizon",
        "proprio_dim",
        "visibility",
        "freeze_embedding",
        "faithful",
        "softcap",
        "positions",
        "flow",
        "action_dim",
        "action_used",
        "action_time",
        "proprio_steps",
        "scale_experts",
        "vlm_final_norm",
    )
    depth = full.depth and dataclasses.replace(
        tiny.depth, head=full.depth.head, loss_weight=full.depth.loss_weight, loss_decay=full.depth.loss_decay
    )
    switches = {name: getattr(full, name) for name in keep}
    # One layer and no remat: the shortest to compile; depth, scan and remat have tests of their own.
    siglip = dataclasses.replace(tiny.siglip, depth=1)
    return dataclasses.replace(tiny, siglip=siglip, depth=depth, layers=1, scan=False, dtype=full.dtype, **switches)


# Every file once; other arguments of a file differ in data and length only.
STEPS = [
    ("bridge", None),
    # Data and length differ from bridge, the program is the same.
    pytest.param("fractal", None, marks=pytest.mark.slow),
    pytest.param("libero", "object", marks=pytest.mark.slow),
    pytest.param("oxe", None, marks=pytest.mark.slow),
    pytest.param("openpi", "pi0", marks=pytest.mark.slow),
    pytest.param("openpi", "pi05", marks=pytest.mark.slow),
    ("demo", "policy"),
    ("demo", "tokenizer"),
    # The demo's programs at other sizes.
    pytest.param("tokenizer", "libero", marks=pytest.mark.slow),
    pytest.param("baseline", "bridge", marks=pytest.mark.slow),
    # A head, a number, a table or an offset away from bridge: the same program but for that.
    *(pytest.param(name, "bridge", marks=pytest.mark.slow) for name in VARIANTS if name != "baseline"),
]


@pytest.mark.parametrize(("name", "argument"), STEPS)
def test_one_step_at_shrunk_size(name, argument):
    config = load(name, argument)
    model = shrink(config)
    objective = experiment.MAKE_OBJECTIVE[config.model_kind](model)
    everything = synthetic.policy_batch(model if config.model_kind == "policy" else policy.sized("tiny"), 4)
    batch = {k: everything[k] for k in (*objective.features, "position")}
    tx = optim.make(config_lib.OptimConfig(learning_rate=1e-3, warmup_steps=0), 10)
    step = functools.partial(
        train_step.train_step, objective=objective, tx=tx, frozen=(), micro_batches=1, ema_decay=0.0
    )
    start = jax.jit(lambda key: train_step.init_state(key, objective, tx, False))(jax.random.key(0))
    end, metrics = jax.jit(step)(start, batch, jax.random.key(0))
    metrics = {k: float(v) for k, v in metrics.items()}
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert metrics["grad_norm"] > 0
    moved = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(end.params))]
    assert sum(moved) > 0.7 * len(moved)
    if config.model_kind == "policy":
        assert ("depth_loss" in metrics) == (name not in ("baseline", "no_depth_loss"))


def test_variants_differ_from_their_recipe_in_one_thing():
    base = config_lib.to_json(load("bridge", None))
    pixel_range = {
        f"model.depth.range.{field}" for field in ("kind", "near", "far")
    }  # codes have theirs in the tokenizer
    expected = {
        "baseline": {"model.depth"},
        "no_depth_loss": {"model.depth.loss_weight"},
        "pixel_depth": {"model.depth.head"} | pixel_range,
        "proprio_sees_depth": {"model.visibility"},
        "separate_text_image": {"model.visibility"},
        "future_depth": {"data.depth_offset"},
    }
    for name in VARIANTS:
        found = config_lib.differences(base, config_lib.to_json(load(name, "bridge")))
        assert {line.split(":")[0] for line in found} == expected[name] | {"name"}


@pytest.mark.parametrize("recipe", ["bridge", "fractal", "libero,object", "openpi", "oxe", "demo", "cpu_study,libero"])
def test_pixels_are_regressed_in_the_range_of_the_codes_that_they_replace(recipe):
    name, _, argument = recipe.partition(",")
    tokens = {
        "demo": ("demo", "tokenizer"),
        "cpu_study": (name, f"{argument},tokenizer"),
        "openpi": ("tokenizer", "libero"),
        "oxe": ("tokenizer", "bridge"),
    }
    codes = experiment.model_config(load(*tokens.get(name, ("tokenizer", name))))
    assert experiment.model_config(load("pixel_depth", recipe)).depth.range == codes.range


def test_the_demo_tokenizer_and_policy_share_their_codebook():
    tokens = experiment.model_config(load("demo", "tokenizer"))
    model = experiment.model_config(load("demo", "policy"))
    assert isinstance(tokens, tokenizer.TokenizerConfig)
    assert (tokens.grid, tokens.num_codes, tokens.feature_dim) == (
        model.depth.grid,
        model.depth.codes,
        model.depth.code_dim,
    )
    assert tokens.range == model.depth.range


def test_the_best_checkpoint_is_not_chosen_by_a_loss_whose_weight_falls():
    config = load("demo", "policy")
    config.train.update({"keep_best": 1, "eval_every": 10, "checkpoint_every": 10})
    with pytest.raises(errors.UserError, match=r"keep_best=1 by val/loss.*loss_decay=0.9999.*=val/flow_loss"):
        experiment.check_keys(config)
    config.train.best_metric = "val/flow_loss"
    experiment.check_keys(config)
    config.train.best_metric, config.model.depth.loss_decay = "val/loss", 1.0
    experiment.check_keys(config)
    config.model.depth.loss_decay, config.model.depth.loss_weight = 0.9999, 0.0
    experiment.check_keys(config)


def test_actions_are_not_cut_off_one_deviation_from_their_mean():
    config = load("demo", "policy")
    config.data.normalisation = "normal"
    with pytest.raises(errors.UserError, match=r"normalisation=normal with model.flow.clip=1: .*set model.flow.clip=0"):
        experiment.check_keys(config)
    config.model.flow.clip = 0.0
    experiment.check_keys(config)


def test_a_run_records_the_size_of_its_pictures():
    """The shipped sample has 128 pixels, the model takes 32."""
    assert experiment.assemble(tiny_runs.config()).meta["pictures"] == {"main": [128, 128]}


def test_the_folder_of_the_start_is_needed_by_a_fresh_run_alone(tmp_path):
    run = experiment.assemble(tiny_runs.config(init_from=str(tmp_path / "gone")))
    with pytest.raises(errors.UserError, match="gone"):
        run.initialise(None)


def test_nobody_ends_a_long_scan_by_waiting_for_it(monkeypatch):
    waits = {}
    monkeypatch.setattr(
        experiment.distributed,
        "together",
        lambda fn, what="start", timeout=3600: (waits.update({what: timeout}), fn())[1],
    )
    experiment.assemble(tiny_runs.config())
    assert waits["index"] == math.inf
