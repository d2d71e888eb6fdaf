"""What a run takes from earlier ones: a trained model, a tokenizer's codebook and tokens, parameters to start from."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from qdepth_jax import checkpoint, checkpoint_read, errors, model_kinds, same_conventions, stored_model, train_step
from qdepth_jax.data import data_config
from qdepth_jax.models import policy, tokenizer

DEPTH_STARTS = ("fresh", "action")
_DEPTH = re.compile(r"llm/layers/depth/|llm/final_norm_depth/")
_ACTION_OWN = re.compile(r"llm/layers/action/|llm/final_norm_action/")
_DEPTH_NAME = re.compile(r"(?<=llm/layers/)depth|(?<=llm/final_norm_)depth")


def load_model(workdir: str, average: bool = True) -> tuple[str, Any, dict[str, Any], dict[str, Any]]:
    """A trained model on this process's first device.

    Args:
      workdir: of its training run; imported weights or an export serve too.
      average: take averaged parameters where kept.

    Returns:
      (model_kind, model config, {"params", "state"}, meta).
    """
    meta = stored_model.find(workdir).meta
    saved = ml_collections.ConfigDict(meta["config"])
    model = model_kinds.model_config(saved)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = stored_model.shapes(saved.model_kind, model)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    variables, meta = stored_model.restore_model(workdir, target, average)
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
    if model.running and int(variables["state"]["updates"]) == 0:
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
    state: train_step.TrainState,
    workdir: str,
    agree: Callable[[bool], bool] = lambda ok: ok,
    model: Any = None,
) -> train_step.TrainState:
    """Parameters of an earlier stage into a fresh state, leaf by leaf where path and shape agree; the rest stays fresh.

    They are read straight into the shardings of the leaves they replace, whose memory is given back before: `state` is
    used up. Which leaves stayed fresh is printed: a depth expert added to a baseline, another proprio size.

    Args:
      state: fresh, on its mesh.
      workdir: of the earlier run, imported weights or an export; averaged parameters are taken where it kept them.
      agree: see checkpoint.restore_latest.
      model: this experiment's model config; its conventions are compared with those there. None compares nothing.

    Raises:
      UserError: no leaf agrees, or the parameters there follow other conventions (same_conventions.py).
    """
    if model is not None:
        check_conventions(workdir, model)
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

    found, meta = stored_model.restore_leaves(workdir, choose, agree=agree)
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


def check_conventions(workdir: str, model: Any) -> None:
    """Refuses parameters of other conventions than the model's; says what differs by design. Reads no array.

    Raises:
      UserError: what differs.
    """
    for line in same_conventions.check(workdir, stored_model.find(workdir).meta["config"], model):
        checkpoint.say(f"{workdir} and this model differ by design: {line}")


def check_inputs(workdir: str, data: dict[str, Any], codes: str) -> None:
    """Compares what the ids of texts and depth tokens mean there and here; reads no array.

    Args:
      workdir: as of `take_parameters`; imported weights do not say what their ids mean, and nothing is compared.
      data: this run's `Loader.identity()`.
      codes: identity of the depth tokenizer whose codes this run predicts, or "".

    Raises:
      UserError: another text tokenizer: every row of the text embedding would stand for another piece.
    """
    meta = stored_model.find(workdir).meta
    before = meta.get("data") or {}
    there, here = before.get("text_tokenizer"), data.get("text_tokenizer")
    if there and here and there != here:
        raise errors.UserError(
            f"init_from={workdir!r} was trained with text tokenizer {there}, this run reads its texts with {here}: "
            "their ids mean other words. Set data.text_tokenizer to the file that was used there"
        )
    if there and here and (rules := [d.get("text_rule", "raw") for d in (before, data)]) and rules[0] != rules[1]:
        checkpoint.say(f"prompts were written by data.text_rule={rules[0]!r} in {workdir}, here by {rules[1]!r}")
    if codes and meta.get("tokenizer") and meta["tokenizer"] != codes:
        checkpoint.say(
            f"the depth expert of {workdir} predicts the codes of tokenizer {meta['tokenizer']}, here those of "
            f"{codes}: what its last layer knows of single codes is lost"
        )


def check_depth_start(start: str, model: Any) -> None:
    """Refuses config.init_depth_from before anything is loaded.

    Raises:
      UserError: an unknown way, or a model without a depth expert that could be a copy.
    """
    if start not in DEPTH_STARTS:
        raise errors.UserError(f"init_depth_from={start!r} is unknown: use one of {', '.join(DEPTH_STARTS)}")
    if start == "action" and getattr(model, "depth", None) is None:
        raise errors.UserError('init_depth_from="action", but the model has no depth expert: set it to "fresh"')


def start_depth_expert(state: train_step.TrainState, start: str, workdir: str = "") -> train_step.TrainState:
    """The state with the depth expert as config.init_depth_from says; `workdir` is where parameters came from.

    Raises:
      UserError: the parameters from there have a trained depth expert already, or the experts differ in shape.
    """
    if start == "fresh":
        return state
    if workdir and any(_DEPTH.match(path) for path in stored_model.find(workdir).leaves["params"]):
        raise errors.UserError(
            f"init_depth_from={start!r} would overwrite the depth expert that init_from={workdir!r} holds: set it to "
            '"fresh", which keeps what was loaded'
        )
    return copy_action_expert(state)


def copy_action_expert(state: train_step.TrainState) -> train_step.TrainState:
    """The depth expert starts as a copy of the action expert: of the one that `take_parameters` brought, usually.

    Raises:
      UserError: there is no depth expert, or its leaves have other paths or sizes than the action expert's.
    """

    def copied(tree: Any) -> Any:
        leaves = checkpoint_read.by_path(tree)
        pairs = {p: _DEPTH_NAME.sub("action", p) for p in leaves if _DEPTH.match(p)}
        others = {p for p in leaves if _ACTION_OWN.match(p)} - set(pairs.values())
        wrong = [f"{p} {leaves[p].shape}: the action expert has " + (f"{leaves[q].shape}" if q in leaves else f"no {q}")
                 for p, q in pairs.items() if q not in leaves or leaves[q].shape != leaves[p].shape]  # fmt: skip
        wrong += [f"{p}: the depth expert has no such leaf" for p in sorted(others)]
        if not pairs:
            raise errors.UserError('init_depth_from="action", but the model has no depth expert: set it to "fresh"')
        if wrong:
            raise errors.UserError(
                'init_depth_from="action" needs a depth expert of the shape of the action expert (model.depth.expert = '
                'model.action, both without adaptive norms); set it so, or use "fresh":\n  ' + "\n  ".join(wrong)
            )
        for path, source in pairs.items():
            placed = leaves[path].sharding
            _free(leaves[path])
            leaves[path] = jax.device_put(leaves[source].copy(), placed)
        return jax.tree_util.tree_unflatten(jax.tree.structure(tree), list(leaves.values()))

    state = state.replace(params=copied(state.params))
    return state if state.ema is None else state.replace(ema=copied(state.ema))


def origin(meta: dict[str, Any]) -> list[str]:
    """Formats of the foreign weights that a checkpoint descends from, nearest first; "unknown" ends a lost trail.

    Args:
      meta: of the checkpoint; `init_from` in its config leads on to the one before.
    """
    found, seen = [], set()
    while True:
        if "origin" in meta:  # of an export, or recorded at the start of a run
            return found + list(meta["origin"])
        if isinstance(meta.get("source"), dict) and "format" in meta["source"]:
            return [*found, meta["source"]["format"]]
        before = meta.get("config", {}).get("init_from", "")
        if not before:
            return found
        if before in seen:
            return [*found, "unknown"]
        seen.add(before)
        try:
            stored = stored_model.find(before)
        except errors.UserError:
            return [*found, "unknown"]
        if stored.manifest:
            return found + list(stored.manifest["origin"])
        meta = stored.meta


def _free(leaf: jax.Array) -> None:
    if not leaf.is_deleted():
        leaf.delete()
