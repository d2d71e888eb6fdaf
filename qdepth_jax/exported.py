"""An exported model: one folder with everything a robot needs, and nothing of training.

  README.md               model card             config.json       the experiment
  model.json              model, conventions, weights and their sums, identities; sealed by a CRC, written last
  statistics.json         data set -> {"action", "proprio"}: how numbers were normalised (data/normalise.py)
  text_tokenizer.model    the SentencePiece model   NOTICE.md      terms of the weights it was started from
  depth_tokenizer/        an export of its own: decodes predicted depth tokens
and the weights, by format:
  orbax                   checkpoints/STEP: the folder is a workdir without optimiser, read into any sharding
  safetensors             model.safetensors (or shards and an index); keys are our paths with dots
  open_pi_zero[_pt]       the same files (or model.pt) with the key names of github.com/allenzren/open-pi-zero

The folder appears whole: it is written beside its place and renamed, in a bucket model.json comes last.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from qdepth_jax import (
    checkpoint,
    checkpoint_read,
    checkpoint_sum,
    earlier_stages,
    errors,
    metrics,
    model_card,
    model_kinds,
    same_conventions,
    stored_model,
    workdirs,
)
from qdepth_jax.data import normalise, text
from qdepth_jax.models import policy, tokenizer
from qdepth_jax.weights import open_pi_zero, safetensors_write

FORMATS = ("orbax", *stored_model.FILES)
DTYPES = ("float32", "bfloat16")
VERSION = 1
TEXT, DEPTH = "text_tokenizer.model", "depth_tokenizer"


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


@dataclasses.dataclass(frozen=True)
class Options:
    """What an export takes and how it is written.

    Attributes:
      average: averaged parameters where the run kept them. step: of the checkpoint, None = the newest.
      dtype: of the parameters. format: one of FORMATS. shard_bytes: of one weight file.
      text_tokenizer, tokenizer: where these lie now; "" = where the run had them.
      without_depth_tokenizer: leave it out: depth tokens are then predicted, but not decoded.
      origin: weights the run was started from ("big_vision", ...), where its own records do not say.
    """

    average: bool = True
    step: int | None = None
    dtype: str = "float32"
    format: str = "orbax"
    shard_bytes: int = 5 * 10**9
    text_tokenizer: str = ""
    tokenizer: str = ""
    without_depth_tokenizer: bool = False
    origin: tuple[str, ...] = ()

    def __post_init__(self):
        if self.format not in FORMATS:
            raise errors.UserError(f"format {self.format!r} is unknown: use one of {', '.join(FORMATS)}")
        if self.dtype not in DTYPES:
            raise errors.UserError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if self.shard_bytes < 1:
            raise errors.UserError(f"shards of {self.shard_bytes} bytes hold nothing: use 1 or more")


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
    shapes = jax.eval_shape(model_kinds.MAKE_OBJECTIVE[kind](model).init, jax.random.key(0))
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
        for name, pair in json.loads((folder / "statistics.json").read_text()).items()
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


def write_export(workdir: str, output: str, options: Options | None = None, say: Callable[[str], None] = print) -> dict:
    """Exports the model of a workdir: of a run, an import, or an earlier export.

    Returns:
      {"output", "format", "dtype", "step", "averaged", "parameters", "bytes", "files"}.

    Raises:
      UserError: the output exists, something the export needs is missing or another than the run's, the format cannot
        express the model, or the disk is full; nothing is left behind.
    """
    options, out = options or Options(), workdirs.folder(output)
    if out.exists():
        raise errors.UserError(f"--output={output} exists: choose another folder")
    stored = stored_model.find(workdir, options.step)
    config = ml_collections.ConfigDict(stored.meta["config"])
    model = model_kinds.model_config(config)
    item = stored_model.parameters_of(stored, options.average)
    _check_whole(stored, item, config.model_kind, model)
    if options.format.startswith("open_pi_zero"):
        check_open_pi_zero(model)
    words = _text_tokenizer(stored, model, options)
    depth = _depth_tokenizer(stored, model, options)
    say(f"exporting {item} of step {stored.meta['step']} of {workdir} as {options.format} in {options.dtype}")

    with workdirs.full_disk(str(out.parent)), _appears_whole(out) as folder:
        files, leaves = _write_weights(stored, item, folder, options)
        (folder / "statistics.json").write_text(_json(statistics_of(stored.meta)))
        (folder / "config.json").write_text(json.dumps(stored.meta["config"], indent=1))
        if words:
            (folder / TEXT).write_bytes(epath.Path(words).read_bytes())
        if depth:
            nested = dataclasses.replace(
                options, step=None, dtype="float32", format="orbax" if options.format == "orbax" else "safetensors"
            )
            write_export(depth, str(folder / DEPTH), nested, say)
        manifest = _manifest(stored, config, model, item, options, files, leaves, words, bool(depth))
        (folder / "NOTICE.md").write_text(model_card.notice(manifest["origin"]))
        (folder / "README.md").write_text(model_card.card(manifest, statistics_of(stored.meta), figures(stored)))
        (folder / stored_model.MANIFEST).write_text(json.dumps(checkpoint_read.sealed(manifest), indent=1) + "\n")
        listed = sorted(p.name for p in folder.iterdir())
    return {
        "output": output,
        "format": options.format,
        "dtype": options.dtype,
        "step": stored.meta["step"],
        "averaged": manifest["weights"]["averaged"],
        "parameters": manifest["weights"]["parameters"],
        "bytes": sum(files.values()),
        "files": listed,
    }


def statistics_of(meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Data set -> {"action", "proprio"} -> Normaliser as JSON, from what stands beside a checkpoint."""
    stored = (meta.get("data") or {}).get("normalisation") or {}
    return {name: {key: json.loads(value) for key, value in pair.items()} for name, pair in stored.items()}


def check_open_pi_zero(model: Any) -> None:
    """Refuses a model that open-pi-zero's own code could not run.

    Raises:
      UserError: what it lacks, all of it.
    """
    if not isinstance(model, policy.PolicyConfig):
        raise errors.UserError("open_pi_zero files hold policies; this is none: use --format=safetensors")
    plain, wrong = policy.PolicyConfig(depth=None), []
    if model.depth is not None:
        wrong.append("a depth expert (the actions see it, so it cannot be left out)")
    for name in ("views", "image_steps", "missing_views"):
        if name == "views" and len(model.views) > 1 or name != "views" and getattr(model, name) != getattr(plain, name):
            wrong.append(f"{name}={getattr(model, name)!r}")
    here, there = same_conventions.conventions(model), same_conventions.conventions(plain)
    for name in sorted(here.keys() | there.keys()):
        # Sizes of heads, soft-cap, rotary bases and time period are fields of its configs, the rest is its code.
        if name in _THEIR_FIELDS:
            continue
        if here.get(name) != there.get(name):
            wrong.append(f"{name}={here.get(name)!r} (there {there.get(name)!r})")
    if wrong:
        raise errors.UserError(
            "open-pi-zero cannot express this model: use --format=safetensors or orbax. It has\n  " + "\n  ".join(wrong)
        )


_THEIR_FIELDS = (
    "heads", "kv_heads", "head_dim", "softcap", "norm_eps", "vlm.rope_theta", "action.rope_theta", "flow.sigma_min",
    "flow.time_period",
)  # fmt: skip


def figures(stored: stored_model.Stored) -> dict[str, float]:
    """The last metrics row of training and of validation up to the exported step; of an export those it came with."""
    if stored.manifest:
        return stored.manifest["figures"]
    path = workdirs.folder(stored.path) / "metrics.jsonl"
    if not path.exists():
        return {}
    found: dict[str, float] = {}
    for row in metrics.read(path):
        if row["step"] <= stored.meta["step"]:
            found |= {name: value for name, value in row.items() if isinstance(value, int | float)}
    return found


def _manifest(stored, config, model, item, options, files, leaves, words, with_depth) -> dict[str, Any]:
    meta = {name: value for name, value in stored.meta.items() if name not in ("random_key", "leaves")}
    earlier = stored.manifest
    return {
        "version": VERSION,
        "model_kind": config.model_kind,
        "name": config.get("name", "unnamed"),
        "model": meta["config"]["model"],
        "conventions": json.loads(json.dumps(same_conventions.conventions(model))),
        "weights": {
            "format": options.format,
            "dtype": options.dtype,
            "averaged": item == "ema" or bool(earlier and earlier["weights"]["averaged"]),
            "parameters": sum(int(np.prod(leaf["shape"])) for leaf in leaves["params"].values()),
            "files": files,
            "leaves": leaves,
        },
        "text_tokenizer": {
            "identity": text.file_identity(words),
            "max_text_tokens": getattr(model, "text_length", 0),
        }
        if words
        else None,
        "depth_tokenizer": {"identity": meta.get("tokenizer", "")} if with_depth else None,
        "origin": origin_of(stored, options),
        "figures": figures(stored),
        "meta": meta,
    }


def origin_of(stored: stored_model.Stored, options: Options) -> list[str]:
    """Formats of the foreign weights from which this model descends, nearest first; "unknown" where a link is lost."""
    if options.origin:
        return list(options.origin)
    if stored.manifest:
        return list(stored.manifest["origin"])
    return earlier_stages.origin(stored.meta)


def _check_whole(stored, item: str, kind: str, model: Any) -> None:
    """Every parameter of the model is there, in its shape; types may differ (an export in bfloat16)."""
    shapes = jax.eval_shape(model_kinds.MAKE_OBJECTIVE[kind](model).init, jax.random.key(0))
    wanted, there = {item: shapes["params"]}, {item: dict(stored.leaves[item])}
    if jax.tree.leaves(shapes["state"]):
        wanted["state"], there["state"] = shapes["state"], stored.leaves.get("state", {})
    for path, leaf in checkpoint_read.by_path(shapes["params"]).items():
        if path in there[item]:
            there[item][path] = there[item][path] | {"dtype": str(leaf.dtype)}
    checkpoint_read.check_fits(stored.folder, {"leaves": there}, wanted)


def _text_tokenizer(stored, model, options: Options) -> str:
    """Path of the text tokenizer of a policy, with the identity that the run recorded."""
    if not isinstance(model, policy.PolicyConfig):
        return ""
    recorded = (stored.meta.get("data") or {}).get("text_tokenizer", "")
    kept = str(workdirs.folder(stored.path) / TEXT) if stored.manifest and stored.manifest["text_tokenizer"] else ""
    named = stored.meta["config"].get("data", {}).get("text_tokenizer", "")
    path = options.text_tokenizer or kept or named
    if not path and not recorded:
        return ""  # imported weights: nobody has said yet
    found = text.TextTokenizer(path)
    if recorded and found.identity != recorded:
        raise errors.UserError(
            f"{path} is another text tokenizer ({found.identity}) than the run was trained with ({recorded}): pass "
            "--text_tokenizer=FILE with the one that was"
        )
    if found.vocabulary > model.vocabulary:
        raise errors.UserError(
            f"{path} has {found.vocabulary} ids, the model's text embedding {model.vocabulary} rows: pass "
            "--text_tokenizer=FILE with the one that it was trained with"
        )
    return path


def _depth_tokenizer(stored, model, options: Options) -> str:
    """Folder of the depth tokenizer whose codes the policy predicts."""
    if not isinstance(model, policy.PolicyConfig) or model.depth_labels != "codes" or options.without_depth_tokenizer:
        return ""
    kept = str(workdirs.folder(stored.path) / DEPTH) if stored.manifest and stored.manifest["depth_tokenizer"] else ""
    path, recorded = (
        options.tokenizer or kept or stored.meta["config"].get("tokenizer", ""),
        stored.meta.get("tokenizer"),
    )
    if not path and not recorded:
        return ""
    advice = "pass --tokenizer=ITS_WORKDIR, or --nodepth_tokenizer to export without it"
    try:
        found, variables, _ = earlier_stages.load_tokenizer(path)
    except errors.UserError as error:
        raise errors.UserError(f"the depth tokenizer of this policy cannot be read ({error}): {advice}") from error
    identity = tokenizer.identity(found, variables["params"], variables["state"])
    if recorded and identity != recorded:
        raise errors.UserError(
            f"{path!r} is another depth tokenizer ({identity}) than the policy learnt ({recorded}): {advice}"
        )
    return path


def _write_weights(stored, item: str, folder: epath.Path, options: Options) -> tuple[dict[str, int], dict[str, Any]]:
    """Writes parameters and state: (file -> bytes, item -> path -> {"shape", "dtype", "sum"})."""
    wanted = {"params": (item, stored_model.whole(stored, item, options.dtype))}
    wanted["state"] = ("state", stored_model.whole(stored, "state"))
    leaves: dict[str, Any] = {"params": {}} | ({"state": {}} if wanted["state"][1] else {})

    def read(name: str) -> Iterator[tuple[str, jax.Array]]:
        for path, array in stored_model.read_leaves(stored, *wanted[name]):
            found = checkpoint_sum.sums({path: array})[path]
            leaves[name][path] = {"shape": list(array.shape), "dtype": str(array.dtype), "sum": found}
            yield path, array

    if options.format == "orbax":
        tree = {name: checkpoint_read._nested(dict(read(name))) for name in leaves}
        meta = {name: value for name, value in stored.meta.items() if name not in ("step", "metrics", "crc32")}
        checkpoint.save_params(str(folder), tree["params"], meta, tree.get("state"), stored.meta["step"])
        (folder / "lock").unlink(missing_ok=True)
        return _sizes(folder / checkpoint.FOLDER), leaves
    if options.format == "safetensors":
        entries = [
            safetensors_write.Entry(stored_model.key_of(name, path), leaf.shape, str(leaf.dtype))
            for name in leaves
            for path, leaf in wanted[name][1].items()
        ]
        arrays = (np.asarray(array) for name in leaves for _, array in read(name))
        return safetensors_write.write(folder, entries, arrays, options.shard_bytes, {"format": "np"}), leaves
    entries, arrays = _open_pi_zero(wanted["params"][1], read("params"))
    if options.format == "open_pi_zero":
        return safetensors_write.write(folder, entries, arrays, options.shard_bytes, {"format": "pt"}), leaves
    return _write_pt(folder / "model.pt", entries, arrays), leaves


def _open_pi_zero(
    wanted: dict[str, jax.ShapeDtypeStruct], leaves: Iterator[tuple[str, jax.Array]]
) -> tuple[list[safetensors_write.Entry], Iterator[np.ndarray]]:
    """The entries of a state dict, leaf after leaf of ours, and their arrays; the shared expert under both its names."""
    slices = stored_model.open_pi_zero_slices({path: {"shape": leaf.shape} for path, leaf in wanted.items()})
    entries = []
    for path, leaf in wanted.items():
        for key, index, row in slices[path]:
            part = np.broadcast_to(np.zeros((), jnp.dtype(leaf.dtype)), leaf.shape[len(index) :])
            entries += [
                safetensors_write.Entry(name, row.save(part).shape, str(leaf.dtype)) for name in _copies(key, row)
            ]

    def arrays() -> Iterator[np.ndarray]:
        for path, leaf in leaves:
            array = np.asarray(leaf)
            for key, index, row in slices[path]:
                value = row.save(array[index])
                for _ in _copies(key, row):
                    yield value

    return entries, arrays()


def _copies(key: str, row: open_pi_zero.Row) -> list[str]:
    """open-pi-zero saves the module that actions and proprioception share twice, and loads both."""
    return [key, key.replace("mixtures.action.", "mixtures.proprio.")] if "{expert}" in row.source else [key]


def _write_pt(path: epath.Path, entries, arrays) -> dict[str, int]:
    try:
        import torch
    except ImportError as error:
        raise errors.UserError(
            "--format=open_pi_zero_pt needs torch: pip install -e '.[interop]', or take --format=open_pi_zero, the same "
            "keys in safetensors"
        ) from error
    content = {}
    for entry, array in zip(entries, arrays, strict=True):
        array = np.ascontiguousarray(array)
        bits = torch.from_numpy(array.view(np.int16).copy() if entry.dtype == "bfloat16" else array.copy())
        content[entry.key] = bits.view(torch.bfloat16) if entry.dtype == "bfloat16" else bits
    with path.open("wb") as file:
        torch.save({"model": content}, file)
    return {path.name: path.stat().length}


@contextlib.contextmanager
def _appears_whole(out: epath.Path) -> Iterator[epath.Path]:
    """A folder to write to, in its place when the block ends; nothing of it stays when the block fails.

    A bucket has no rename: there readers go by model.json, which comes last.
    """
    if workdirs.is_remote(out):
        try:
            yield out
        except BaseException:
            if out.exists():
                out.rmtree()
            raise
        return
    os.makedirs(out.parent, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    os.mkdir(temporary)
    try:
        yield temporary
        os.rename(temporary, out)
    except OSError as error:
        if out.exists():
            raise errors.UserError(f"--output={out} appeared meanwhile: choose another folder") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sizes(folder: epath.Path) -> dict[str, int]:
    """File -> bytes of everything below a folder, in order."""
    found = {}
    for path in sorted(folder.glob("**/*")):
        if not path.is_dir():
            found[str(path.relative_to(folder.parent))] = path.stat().length
    return found


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
