"""What a run takes from earlier ones: a trained model, a tokenizer's codebook and tokens, parameters to start from."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from qdepth_jax import checkpoint, checkpoint_read, errors, model_kinds, train_step
from qdepth_jax.data import data_config
from qdepth_jax.models import policy, tokenizer


def load_model(workdir: str, average: bool = True) -> tuple[str, Any, dict[str, Any], dict[str, Any]]:
    """A trained model on this process's first device.

    Args:
      workdir: of its training run.
      average: take averaged parameters where kept.

    Returns:
      (model_kind, model config, {"params", "state"}, meta).
    """
    meta = checkpoint.read_meta(workdir)
    saved = ml_collections.ConfigDict(meta["config"])
    model = model_kinds.model_config(saved)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(model_kinds.MAKE_OBJECTIVE[saved.model_kind](model).init, jax.random.key(0))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    variables, meta = checkpoint.restore_model(workdir, target, average)
    return saved.model_kind, model, variables, meta


def load_tokenizer(workdir: str) -> tuple[tokenizer.TokenizerConfig, dict[str, Any], dict[str, Any]]:
    """A trained depth tokenizer: (config, {"params", "state"}, meta).

    Raises:
      UserError: the workdir is not one of a tokenizer.
    """
    if not workdir:
        raise errors.UserError(
            "a policy with depth tokens needs a depth tokenizer: train one (experiments/tokenizer.py), run "
            "tools/tokenize_depth.py, and pass --config.tokenizer=ITS_WORKDIR"
        )
    kind, model, variables, meta = load_model(workdir)
    if kind != "tokenizer":
        raise errors.UserError(f"{workdir!r} holds a {kind}, not a depth tokenizer: set --config.tokenizer")
    if model.quantiser == "ema" and int(variables["state"]["updates"]) == 0:
        raise errors.UserError(
            f"the tokenizer in {workdir!r} was stopped at step {meta['step']}, before its codebook started "
            f"(model.start_step={model.start_step}): train it further"
        )
    return model, variables, meta


def load_codebook(workdir: str, model: policy.PolicyConfig) -> dict[str, Any]:
    """{"codebook" f32 [C, D], "identity"} of a trained tokenizer, checked against the policy's depth expert.

    Raises:
      UserError: grid, number of codes or their size differ.
    """
    found, variables, _ = load_tokenizer(workdir)
    want = (model.depth.grid, model.depth.codes, model.depth.code_dim)
    have = (found.grid, found.num_codes, found.feature_dim)
    if want != have:
        raise errors.UserError(
            f"the tokenizer in {workdir!r} has (grid, codes, code_dim) = {have}, the policy's depth expert {want}: set "
            "model.depth.grid, model.depth.codes and model.depth.code_dim, or train another tokenizer"
        )
    codes = tokenizer.codes_of(found, variables["params"], variables["state"])
    return {
        "codebook": jax.device_get(codes),
        "identity": tokenizer.identity(found, variables["params"], variables["state"]),
    }


def place_codebook(state: train_step.TrainState, codebook: Any) -> train_step.TrainState:
    """The state with a tokenizer's codes, f32 [C, D] on the host, where its own lie."""
    placed = state.state["codebook"].sharding
    codes = jax.make_array_from_callback(codebook.shape, placed, lambda index: codebook[index])
    return state.replace(state=state.state | {"codebook": codes})


def token_dir(workdir: str, dataset: str) -> str:
    """Where tools/tokenize_depth.py puts the tokens of a data set: beside the tokenizer that made them."""
    return f"{workdir.rstrip('/')}/tokens/{dataset}"


def with_tokens(data: data_config.DataConfig, workdir: str) -> data_config.DataConfig:
    """Sources without an explicit token sidecar read the one beside the tokenizer."""
    sources = tuple(
        s if s.depth_tokens else dataclasses.replace(s, depth_tokens=token_dir(workdir, s.name)) for s in data.datasets
    )
    return dataclasses.replace(data, datasets=sources)


def take_parameters(
    state: train_step.TrainState, workdir: str, agree: Callable[[bool], bool] = lambda ok: ok
) -> train_step.TrainState:
    """Parameters of an earlier stage into a fresh state, leaf by leaf where path and shape agree; the rest stays fresh.

    They are read straight into the shardings of the leaves they replace, whose memory is given back before: `state` is
    used up. Which leaves stayed fresh is printed: a depth expert added to a baseline, another proprio size.

    Args:
      state: fresh, on its mesh.
      workdir: of the earlier run; its averaged parameters are taken where it kept them.
      agree: see checkpoint.restore_latest.

    Raises:
      UserError: no leaf agrees.
    """
    here, average = checkpoint_read.by_path(state.params), checkpoint_read.by_path(state.ema)
    taken: dict[str, jax.ShapeDtypeStruct] = {}
    report: dict[str, list[str]] = {}

    def choose(there: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        report["unused"], report["fresh"] = [path for path in there if path not in here], []
        chosen = {}
        for path, leaf in here.items():
            source = there.get(path)
            if source is not None and tuple(source["shape"]) == leaf.shape:
                chosen[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(source["dtype"]), sharding=leaf.sharding)
            else:
                other = f" (there {tuple(source['shape'])})" if source is not None else ""
                report["fresh"].append(f"{path} {leaf.shape}{other}")
        if not chosen:
            raise errors.UserError(f"init_from={workdir!r} shares no parameter with this model")
        if taken and chosen != taken:  # a damaged checkpoint and one before it that is not of the same model
            raise errors.UserError(f"the checkpoints in init_from={workdir!r} hold different parameters: choose one")
        taken.update(chosen)
        for path in chosen:
            _free(here[path])
            if path in average:
                _free(average[path])
        return chosen

    found, meta = checkpoint.restore_leaves(workdir, choose, agree=agree)
    for path in list(found):
        if found[path].dtype != here[path].dtype:
            found[path] = found[path].astype(here[path].dtype)
    params = jax.tree_util.tree_unflatten(
        jax.tree.structure(state.params), [found.get(path, leaf) for path, leaf in here.items()]
    )
    checkpoint.say(
        f"parameters from {workdir} step {meta['step']}; fresh: {report['fresh'] or 'none'}; "
        f"unused: {report['unused'] or 'none'}"
    )
    if state.ema is None:
        return state.replace(params=params)
    copies = [found[path].copy() if path in found else leaf for path, leaf in average.items()]
    return state.replace(params=params, ema=jax.tree_util.tree_unflatten(jax.tree.structure(state.ema), copies))


def _free(leaf: jax.Array) -> None:
    if not leaf.is_deleted():
        leaf.delete()
