"""From an experiment's ConfigDict to everything the training loop needs: model, optimiser, data, mesh.

The only place that knows which model kinds exist and how a policy depends on a depth tokenizer.
"""

import dataclasses
import math
from typing import Any

import ml_collections
import numpy as np

from qdepth_jax import config as config_lib
from qdepth_jax import (
    depth,
    distributed,
    earlier_stages,
    errors,
    model_kinds,
    optim,
    progress,
    sharding,
    train_loop,
    train_step,
)
from qdepth_jax.data import data_config, held_out_check, index, loader, spec, text
from qdepth_jax.models import augment_config, policy
from qdepth_jax.models import objective as objective_lib

KINDS, MAKE_OBJECTIVE, model_config = model_kinds.KINDS, model_kinds.MAKE_OBJECTIVE, model_kinds.model_config
SECTIONS = ("model",)


def check_keys(config: ml_collections.ConfigDict) -> None:
    """Every top-level key is known, every section builds.

    Raises:
      UserError: naming the unknown key and the nearest known one.
    """
    known = (*config_lib.default().keys(), *SECTIONS)
    for key in config:
        if key not in known:
            raise errors.UserError(f"unknown config key {key}{config_lib.suggest(key, known)}")
    train = config_lib.build(config_lib.TrainConfig, config.train, "train")
    config_lib.build(config_lib.OptimConfig, config.optim, "optim")
    config_lib.build(config_lib.MeshConfig, config.mesh, "mesh")
    data = data_section(config)
    make_objective(config)
    if config.model_kind == "policy" and data.normalisation == "normal" and (clip := model_config(config).flow.clip):
        raise errors.UserError(
            f"data.normalisation=normal with model.flow.clip={clip:g}: planned actions would be cut off {clip:g} "
            "standard deviations from their mean; set model.flow.clip=0, or data.normalisation=bounds"
        )
    if config.model_kind == "policy" and train.keep_best and train.best_metric == "val/loss":
        model = model_config(config)
        if model.depth_labels is not None and model.depth.loss_decay < 1:
            raise errors.UserError(
                f"train.keep_best={train.keep_best} by val/loss, in which the depth loss weighs less at every step "
                f"(model.depth.loss_decay={model.depth.loss_decay:g}): later checkpoints look better by that alone; "
                "set train.best_metric=val/flow_loss"
            )


def make_objective(config: ml_collections.ConfigDict) -> objective_lib.Objective:
    """The experiment's model as the training loop sees it, with its augmentation.

    Raises:
      UserError: an augmentation that does not fit the model.
    """
    model = model_config(config)
    augmentation = config_lib.build(augment_config.AugmentConfig, config.augment, "augment")
    if config.model_kind == "policy":
        return policy.make_objective(model, augmentation)
    if augmentation.active:
        raise errors.UserError(
            f"augment is set, but a {config.model_kind} reads no images: leave config.augment at its default"
        )
    if config.model_kind not in MAKE_OBJECTIVE:
        raise errors.UserError(
            f"a {config.model_kind} is not trained by itself: start a policy from it with --config.init_from"
        )
    return MAKE_OBJECTIVE[config.model_kind](model)


def data_section(config: ml_collections.ConfigDict) -> data_config.DataConfig:
    """DataConfig of the training split; the sources of the mix are `config.datasets`, by name.

    Raises:
      UserError: a field that the model determines (views, horizon, text length) says something else in `data`.
    """
    data = config_lib.build(data_config.DataConfig, config.data, "data")
    sources = tuple(
        config_lib.build(data_config.DatasetConfig, {**source.to_dict(), "name": name}, f"datasets.{name}")
        for name, source in config.datasets.items()
    )
    if config.model_kind == "policy":
        model = model_config(config)
        for field, value in (
            ("views", model.views),
            ("horizon", model.horizon),
            ("max_text_tokens", model.text_length),
            ("proprio_steps", max(1, model.proprio_steps)),
            ("image_steps", model.image_steps),
            ("missing_views", "mask" if model.missing_views else "error"),
        ):
            default = getattr(data_config.DataConfig(), field)
            if getattr(data, field) not in (default, value):
                raise errors.UserError(
                    f"data.{field}={getattr(data, field)!r} but the model has {value!r}: set the model's field alone, "
                    f"data.{field} follows it"
                )
            data = dataclasses.replace(data, **{field: value})
    return dataclasses.replace(data, datasets=sources)


def held_out_section(config: ml_collections.ConfigDict, data: data_config.DataConfig) -> data_config.DataConfig | None:
    """DataConfig of the held-out episodes, or None when the experiment sets none aside."""
    if config.eval_split:
        return dataclasses.replace(data, split=config.eval_split, held_out_every=0, max_frames_per_episode=0)
    if data.held_out_every:
        return dataclasses.replace(data, held_out=True, max_frames_per_episode=0)
    return None


def assemble(config: ml_collections.ConfigDict) -> train_loop.Run:
    """Builds the Run of an experiment; opens the data, loads nothing onto devices yet.

    Raises:
      UserError: anything in configuration, data or earlier stages that does not fit, each with the fix.
    """
    check_keys(config)
    train = config_lib.build(config_lib.TrainConfig, config.train, "train")
    optim_config = config_lib.build(config_lib.OptimConfig, config.optim, "optim")
    mesh = sharding.make_mesh(config_lib.build(config_lib.MeshConfig, config.mesh, "mesh"))
    model = model_config(config)
    objective = make_objective(config)
    frozen = policy.frozen_table(model) if config.model_kind == "policy" else ()

    earlier_stages.check_depth_start(config.init_depth_from, model)
    codes, data = None, data_section(config)
    if config.model_kind == "policy" and model.depth_labels == "codes":
        codes = earlier_stages.load_codebook(config.tokenizer, model)
        data = earlier_stages.with_tokens(data, config.tokenizer)
    # The main host reads a new data set once and writes its index; the others open it (or build their own, where
    # data.index_dir is a disk of each host). Without a limit: a scan of terabytes takes hours.
    for build in (lambda: _build_indexes(data) if distributed.is_main() else None, lambda: _build_indexes(data)):
        distributed.together(build, "index", timeout=math.inf)
    sharding.check_batch(train, mesh.shape)
    rows = sharding.batch_rows(mesh, train.batch_size)
    batches = loader.Loader(
        data,
        (*objective.features, "position") if "position" not in objective.features else objective.features,
        train.batch_size,
        seed=config.seed,
        rows=rows,
    )
    distributed.same_everywhere("data", batches.identity())
    for line in batches.summary():
        train_loop.say(line)
    _check_fit(config, model, batches, codes)
    held_out, eval_batches = held_out_section(config, data), None
    if train.eval_every:
        if held_out is None:
            raise errors.UserError(
                "train.eval_every is set but nothing is held out: set eval_split (e.g. 'val') or data.held_out_every, "
                "or train.eval_every=0"
            )
        eval_loader = loader.Loader(
            held_out,
            batches.features,
            train.batch_size,
            seed=config.seed,
            rows=rows,
            normalisers=batches.normalisers,
        )
        for line in (
            *held_out_check.check(batches.sources, eval_loader.sources),
            *held_out_check.repeats(
                [item.definition.name for item in eval_loader.sources],
                eval_loader.order,
                train.eval_batches,
                train.batch_size,
            ),
        ):
            train_loop.say(line)
        eval_batches = lambda: (eval_loader.batch(i) for i in range(train.eval_batches))  # noqa: E731

    def initialise(state: train_step.TrainState) -> train_step.TrainState:
        if codes is not None:
            state = earlier_stages.place_codebook(state, codes["codebook"])
        # Here and not above: a resumed run takes nothing from there, and the folder may be gone.
        if config.init_from:
            earlier_stages.check_inputs(config.init_from, batches.identity(), codes["identity"] if codes else "")
            if config.model_kind == "tokenizer" and model.running:
                train_loop.say(
                    f"init_from brings encoder and decoder; the codebook is no parameter and is drawn anew at step "
                    f"{model.start_step} (model.start_step)"
                )
            state = earlier_stages.take_parameters(state, config.init_from, distributed.all_agree, model)
        return earlier_stages.start_depth_expert(state, config.init_depth_from, config.init_from)

    return train_loop.Run(
        objective=objective,
        tx=optim.make(optim_config, train.total_steps, frozen),
        frozen=(*frozen, *optim_config.frozen),
        learning_rate=optim.schedule(optim_config, train.total_steps),
        mesh=mesh,
        config=config_lib.to_json(config),
        train=train,
        ema_decay=optim_config.ema_decay,
        seed=config.seed,
        rows=rows,
        batches=lambda start: batches.iterate(start, train.prefetch),
        eval_batches=eval_batches,
        initialise=initialise,
        meta={
            "data": batches.identity(),
            "pictures": batches.picture_sizes,
            "tokenizer": codes["identity"] if codes else "",
            **_origin(config.init_from),
        },
    )


def _origin(init_from: str) -> dict[str, list[str]]:
    """Recorded when a run starts: the folder it started from may be gone when its weights are given away."""
    return {"origin": earlier_stages.origin({"config": {"init_from": init_from}})} if init_from else {}


def _build_indexes(data: data_config.DataConfig) -> None:
    """Indexes what has no index yet, with a progress bar: the first run on a data set reads it once."""
    for entry in data.datasets:
        bars: list[progress.Progress] = []

        def on_shard(shard: str, size: int, entry=entry, bars=bars) -> None:
            if not bars:
                dataset = spec.read_spec(entry.path)
                bars.append(progress.Progress(index.total_bytes(dataset), f"indexing {dataset.name}", unit="B"))
            bars[0].update(size, shard)

        index.open_index(entry.path, data.index_dir, on_shard=on_shard)
        for bar in bars:
            bar.close()


def _check_fit(config, model, batches: loader.Loader, codes: dict[str, Any] | None) -> None:
    """Depth kinds, token identity and vocabulary: what only data and model together can tell."""
    depth_range = None
    if config.model_kind == "tokenizer":
        depth_range = model.range
    elif model.depth_labels == "pixels":
        depth_range = model.depth.range
    if depth_range is not None and depth_range.kind != batches.depth_kind:
        raise errors.UserError(
            f"the model's depth range is {depth_range.kind!r} (near {depth_range.near}, far {depth_range.far}), the "
            f"data has {batches.depth_kind!r} depth: set model{'.depth' if config.model_kind == 'policy' else ''}.range"
        )
    if depth_range is not None:
        _check_range(batches, depth_range)
    if config.model_kind == "tokenizer" and model.running and model.start_step >= config.train.total_steps:
        raise errors.UserError(
            f"model.start_step={model.start_step} is not before train.total_steps={config.train.total_steps}: the "
            "codebook would never start; lower start_step"
        )
    if codes is not None:
        for source in batches.sources:
            found = source.depth_tokens.metadata.identity
            if found != codes["identity"]:
                raise errors.UserError(
                    f"depth tokens of {source.definition.name} come from tokenizer {found}, but {config.tokenizer!r} "
                    f"is {codes['identity']}: run tools/tokenize_depth.py with this tokenizer"
                )
    if config.model_kind == "policy":
        action, proprio = batches.sources[0].frames.action, batches.sources[0].frames.proprio
        used = "action_used" if model.action_used else "action_dim"
        for name, want, got in (
            (used, model.robot_action_dim, action.shape[1]),
            ("proprio_dim", model.proprio_dim, batches.config.proprio_dim or proprio.shape[1]),
        ):
            if want != got and (model.proprio_steps or name == used):  # pi0.5 reads no proprio
                fill = f", or data.proprio_dim={want} to fill it with zeros" if name != used and want > got else ""
                raise errors.UserError(
                    f"model.{name}={want}, but {batches.sources[0].definition.name} has {got}: set it{fill}"
                )
        vocabulary = text.TextTokenizer(batches.config.text_tokenizer).vocabulary
        if vocabulary > model.vocabulary:
            raise errors.UserError(
                f"text tokenizer {batches.config.text_tokenizer!r} has {vocabulary} pieces, model.vocabulary is "
                f"{model.vocabulary}: raise it"
            )


def _check_range(batches: loader.Loader, depth_range: depth.DepthRange) -> None:
    """Depth outside the range is masked: a range beside the data would train on nothing and look perfect."""
    first = batches.batch(0)
    raw = first["depth"]
    value = raw * first["depth_scale"][:, None, None] + first["depth_offset"][:, None, None]
    value = value[raw > 0]
    low, high = sorted((depth_range.near, depth_range.far))
    share = float(((value >= low) & (value <= high)).mean()) if value.size else 0.0
    if share < 0.5:
        found = (
            f"1 to 99 percent of it lie in {np.percentile(value, [1, 99]).round(3).tolist()}" if value.size else "none"
        )
        raise errors.UserError(
            f"only {share:.1%} of the depth in the first batch lies inside the range {low}..{high} ({found}): set the "
            "model's range.near and range.far"
        )
    if share < 0.98:
        train_loop.say(f"{1 - share:.1%} of the depth lies outside the range {low}..{high} and is masked out")
