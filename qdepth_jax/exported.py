"""An exported model: one folder with everything a robot needs, and nothing of training.

  README.md               model card                experiment_config.json   the whole experiment
  model.json              model, conventions, weights and their sums, identities; sealed by a CRC, written last
  statistics.json         data set -> {"action", "proprio"}: how numbers were normalised (data/normalise.py)
  text_tokenizer.model    the SentencePiece model   NOTICE.md   terms of the weights it was started from
  depth_tokenizer/        an export of its own: decodes predicted depth tokens
and the weights, by format:
  orbax                   checkpoints/STEP: the folder is a workdir without optimiser, read into any sharding
  safetensors             model.safetensors (or shards and an index); keys are our paths with dots
  hf_paligemma            the same files with the key names of published PaliGemmas in transformers
  open_pi_zero[_pt]       the same files (or model.pt) with the key names of github.com/allenzren/open-pi-zero

The folder appears whole: it is written beside its place and renamed, in a bucket model.json comes last.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from qdepth_jax import earlier_stages, errors, model_kinds, stored_model, workdirs
from qdepth_jax.data import normalise, text

VERSION = 1
TEXT, DEPTH, STATISTICS = "text_tokenizer.model", "depth_tokenizer", "statistics.json"


class Exported(NamedTuple):
    """Attributes:
    kind, model: "policy" and its PolicyConfig (or another of model_kinds).
    variables: {"params", "state"}.
    statistics: data set -> {"action", "proprio"} -> Normaliser.
    text_tokenizer: path of the SentencePiece model, "" where the model reads no text.
    max_text_tokens: to which its ids are padded. text_rule: how a prompt is written (data/text.py).
    proprio_dim: to which a shorter state is filled with zeros; 0 = as it is.
    depth_tokenizer: folder of its export (load_export reads it too), "" where there is none.
    manifest: model.json, {} of a run.
    pictures: view -> [height, width] of the pictures it was trained on, before they were resized; None = the run did
      not say.
    codes: identity of the depth tokenizer whose codes it predicts, "" where none is recorded.
    depth_ahead: frames by which the depth that it says lies ahead of its pictures (data.depth_offset); None = not
      recorded.
    """

    kind: str
    model: Any
    variables: dict[str, Any]
    statistics: dict[str, dict[str, normalise.Normaliser]]
    text_tokenizer: str
    max_text_tokens: int
    text_rule: str
    proprio_dim: int
    depth_tokenizer: str
    manifest: dict[str, Any]
    pictures: dict[str, list[int]] | None = None
    codes: str = ""
    depth_ahead: int | None = None


def load(path: str, dtype: str = "float32") -> Exported:
    """An export, or the workdir of a run as if it had been exported: whatever a robot can be given.

    Raises:
      UserError: nothing of the kind, damaged, or its text tokenizer is no longer the one that it was trained with.
    """
    if (workdirs.folder(path) / stored_model.MANIFEST).exists():
        return load_export(path, dtype)
    kind, model, variables, meta = earlier_stages.load_model(path)
    config = meta["config"]
    data = config.get("data", {})
    recorded, words = (meta.get("data") or {}).get("text_tokenizer", ""), data.get("text_tokenizer", "")
    # A run has the path alone, and whatever lies there now would be read.
    if recorded and (found := text.TextTokenizer(words).identity) != recorded:
        raise errors.UserError(
            f"{path!r} was trained with text tokenizer {recorded}, what lies at {words!r} now is {found}: its ids mean "
            "other words. Put that file back, or use an export: tools/export_checkpoint.py --text_tokenizer=FILE"
        )
    return Exported(
        kind,
        model,
        variables,
        {name: _normalisers(pair) for name, pair in statistics_of(meta).items()},
        words,
        getattr(model, "text_length", 0),
        data.get("text_rule", "raw"),
        data.get("proprio_dim", 0),
        config.get("tokenizer", ""),
        {},
        meta.get("pictures"),
        meta.get("tokenizer", ""),
        data.get("depth_offset"),
    )


def statistics_of(meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Data set -> {"action", "proprio"} -> Normaliser as JSON, from what stands beside a checkpoint."""
    stored = (meta.get("data") or {}).get("normalisation") or {}
    return {name: {key: json.loads(value) for key, value in pair.items()} for name, pair in stored.items()}


def _normalisers(pair: dict[str, Any]) -> dict[str, normalise.Normaliser]:
    return {key: normalise.Normaliser.from_json(json.dumps(value)) for key, value in pair.items()}


def load_export(path: str, dtype: str = "float32") -> Exported:
    """An exported model on this process's first device.

    Args:
      path: of the export, any format; local or a bucket.
      dtype: of the parameters in memory; an export in bfloat16 becomes float32 without change of value.

    Raises:
      UserError: no export, a damaged one, or one that was written by a later version.
    """
    manifest = stored_model.read_manifest(path)
    if manifest["version"] > VERSION:
        raise errors.UserError(f"{path!r} was written by a later version ({manifest['version']}, known: {VERSION})")
    kind = manifest["model_kind"]
    model = model_kinds.model_config(ml_collections.ConfigDict({"model_kind": kind, "model": manifest["model"]}))
    shapes = stored_model.shapes(kind, model)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf, cast: bool):
        floating = cast and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype, sharding=device)

    wanted = {name: jax.tree.map(lambda x, n=name: target(x, n == "params"), shapes[name]) for name in shapes}
    variables, _ = stored_model.restore_model(path, wanted, average=False)
    folder = workdirs.folder(path)
    saved = manifest["text_tokenizer"]
    for name in (STATISTICS, *([TEXT] if saved else [])):
        if not (folder / name).exists():
            raise errors.UserError(f"{path!r} is damaged: {name} is missing; export again")
    if saved and (found := text.file_identity(str(folder / TEXT))) != saved["identity"]:
        raise errors.UserError(
            f"{folder / TEXT} is not the text tokenizer of this model ({found}, not {saved['identity']})"
        )
    statistics = {name: _normalisers(pair) for name, pair in json.loads((folder / STATISTICS).read_text()).items()}
    data = manifest["meta"]["config"].get("data", {})
    return Exported(
        kind,
        model,
        variables,
        statistics,
        str(folder / TEXT) if saved else "",
        saved.get("max_text_tokens", 0) if saved else 0,
        data.get("text_rule", "raw"),
        data.get("proprio_dim", 0),
        str(folder / DEPTH) if manifest["depth_tokenizer"] else "",
        manifest,
        manifest["meta"].get("pictures"),
        manifest["meta"].get("tokenizer", ""),
        data.get("depth_offset"),
    )
