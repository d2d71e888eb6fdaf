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

from qdepth_jax import errors, model_kinds, stored_model, workdirs
from qdepth_jax.data import normalise, text

VERSION = 1
TEXT, DEPTH, STATISTICS = "text_tokenizer.model", "depth_tokenizer", "statistics.json"


class Exported(NamedTuple):
    """Attributes:
    kind, model: "policy" and its PolicyConfig (or another of model_kinds).
    variables: {"params", "state"}.
    statistics: data set -> {"action", "proprio"} -> Normaliser.
    text_tokenizer: path of the SentencePiece model, "" where the model reads no text.
    max_text_tokens: to which its ids are padded.
    depth_tokenizer: folder of its export (load_export reads it too), "" where there is none.
    manifest: model.json.
    """

    kind: str
    model: Any
    variables: dict[str, Any]
    statistics: dict[str, dict[str, normalise.Normaliser]]
    text_tokenizer: str
    max_text_tokens: int
    depth_tokenizer: str
    manifest: dict[str, Any]


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
    if saved and (found := text.file_identity(str(folder / TEXT))) != saved["identity"]:
        raise errors.UserError(
            f"{folder / TEXT} is not the text tokenizer of this model ({found}, not {saved['identity']})"
        )
    statistics = {
        name: {key: normalise.Normaliser.from_json(json.dumps(value)) for key, value in pair.items()}
        for name, pair in json.loads((folder / STATISTICS).read_text()).items()
    }
    return Exported(
        kind,
        model,
        variables,
        statistics,
        str(folder / TEXT) if saved else "",
        saved.get("max_text_tokens", 0) if saved else 0,
        str(folder / DEPTH) if manifest["depth_tokenizer"] else "",
        manifest,
    )
