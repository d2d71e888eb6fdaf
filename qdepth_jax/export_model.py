"""Exports a model: gathers what a robot needs, checks that it belongs together, writes the folder (exported.py)."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import ml_dtypes
import numpy as np
from etils import epath

from qdepth_jax import (
    checkpoint_read,
    earlier_stages,
    errors,
    export_weights,
    exported,
    metrics,
    model_card,
    model_kinds,
    same_conventions,
    stored_model,
    workdirs,
)
from qdepth_jax.data import text
from qdepth_jax.models import policy, tokenizer

FORMATS = ("orbax", *stored_model.FILES)
DTYPES = ("float32", "bfloat16")


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
        known = [name for name in model_card.ORIGINS if name != "unknown"]
        if wrong := [name for name in self.origin if name not in known]:
            raise errors.UserError(f"--derived_from={','.join(wrong)} is unknown: use {', '.join(known)}")
        if self.shard_bytes < 1:
            raise errors.UserError(f"shards of {self.shard_bytes} bytes hold nothing: use 1 or more")


def write_export(workdir: str, output: str, options: Options | None = None, say: Callable[[str], None] = print) -> dict:
    """Exports the model of a workdir: of a run, an import, or an earlier export.

    Returns:
      {"output", "format", "dtype", "step", "averaged", "parameters", "bytes", "files"}, and of a depth tokenizer its
      "identity", which stands in every sidecar that it makes.

    Raises:
      UserError: the output exists, a depth tokenizer in another dtype than float32, something the export needs is
        missing or another than the run's, the format cannot express the model, or the disk is full; nothing is left
        behind.
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
    if options.format == "hf_paligemma" and config.model_kind != "paligemma":
        raise errors.UserError(f"hf_paligemma files hold a PaliGemma, this is a {config.model_kind}: use safetensors")
    identity = _frozen_identity(workdir, config.model_kind, options)
    words = _text_tokenizer(stored, model, options)
    depth = _depth_tokenizer(stored, model, options)
    if not words and not isinstance(model, tokenizer.TokenizerConfig):
        say("no text tokenizer is known, none goes into the export: --text_tokenizer=FILE adds one")
    say(f"exporting {item} of step {stored.meta['step']} of {workdir} as {options.format} in {options.dtype}")

    with workdirs.full_disk(output, "nothing of the export was kept"), workdirs.appears_whole(out, say) as folder:
        files, leaves = export_weights.write(
            stored, model, item, folder, options.format, options.dtype, options.shard_bytes
        )
        statistics = exported.statistics_of(stored.meta)
        (folder / exported.STATISTICS).write_text(_json(statistics))
        (folder / "experiment_config.json").write_text(json.dumps(stored.meta["config"], indent=1))
        if options.format == "hf_paligemma":
            (folder / "config.json").write_text(json.dumps(export_weights.transformers_config(model), indent=2) + "\n")
        if words:
            (folder / exported.TEXT).write_bytes(epath.Path(words).read_bytes())
        if depth:
            # Of the rest nothing is the policy's business: averaging, texts and origin of its weights are its own.
            form = "orbax" if options.format == "orbax" else "safetensors"
            nested = Options(format=form, shard_bytes=options.shard_bytes)
            write_export(depth, str(folder / exported.DEPTH), nested, say)
        manifest = _manifest(stored, config, model, item, options, files, leaves, words, bool(depth))
        if identity:
            manifest["identity"] = identity
        (folder / "NOTICE.md").write_text(model_card.notice(manifest["origin"]))
        (folder / "README.md").write_text(model_card.card(manifest, statistics, figures(stored)))
        (folder / stored_model.MANIFEST).write_text(json.dumps(checkpoint_read.sealed(manifest), indent=1) + "\n")
        listed = sorted(p.name for p in folder.iterdir())
    return {
        "output": output,
        "format": options.format,
        "dtype": options.dtype,
        "step": stored.meta["step"],
        "averaged": manifest["weights"]["averaged"],
        "parameters": manifest["weights"]["parameters"],
        "bytes": sum(
            int(np.prod(leaf["shape"])) * np.dtype(getattr(ml_dtypes, leaf["dtype"], leaf["dtype"])).itemsize
            for item in leaves.values()
            for leaf in item.values()
        ),
        "files": listed,
        **({"identity": identity} if identity else {}),
    }


def _frozen_identity(workdir: str, kind: str, options: Options) -> str:
    """Identity of a depth tokenizer, "" of anything else; only what gives the same tokens is exported."""
    if kind != "tokenizer":
        return ""
    if options.dtype != "float32":
        raise errors.UserError(
            f"--dtype={options.dtype} would change which tokens a depth map gets: export a depth tokenizer in float32"
        )
    # Other parameters than these have another identity than the tokens that the run has made.
    if options.step is not None or not options.average:
        return ""
    found, variables, _ = earlier_stages.load_tokenizer(workdir)
    return tokenizer.identity(found, variables["params"], variables["state"])


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
    if len(model.views) > 1:
        wrong.append(f"views={model.views}")
    if not model.proprio_steps:
        wrong.append("proprio_steps=0 (its proprio_encoder would be missing)")
    for name in ("image_steps", "missing_views", "visibility"):
        if getattr(model, name) != getattr(plain, name):
            wrong.append(f"{name}={getattr(model, name)!r} (there {getattr(plain, name)!r})")
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
        "version": exported.VERSION,
        "model_kind": config.model_kind,
        "name": config.get("name", "unnamed"),
        "model": meta["config"]["model"],
        "conventions": json.loads(json.dumps(same_conventions.conventions(model))),
        "weights": {
            "format": options.format,
            "dtype": options.dtype,
            "rounded": options.dtype == "bfloat16" or bool(earlier and earlier["weights"].get("rounded")),
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
        "meta": json.loads(json.dumps(meta, sort_keys=True)),
    }


def origin_of(stored: stored_model.Stored, options: Options) -> list[str]:
    """Formats of the foreign weights from which this model descends, nearest first; "unknown" where a link is lost.

    What the user tells stands in for what is unknown, and beside what is recorded, never instead of it.
    """
    recorded = stored.manifest["origin"] if stored.manifest else earlier_stages.origin(stored.meta)
    if options.origin:
        recorded = [name for name in recorded if name != "unknown"]
    return list(dict.fromkeys([*recorded, *options.origin]))


def _check_whole(stored, item: str, kind: str, model: Any) -> None:
    """Every parameter of the model is there, in its shape; types may differ (an export in bfloat16)."""
    shapes = stored_model.shapes(kind, model)
    wanted, there = {item: shapes["params"]}, {item: dict(stored.leaves[item])}
    if jax.tree.leaves(shapes["state"]):
        wanted["state"], there["state"] = shapes["state"], stored.leaves.get("state", {})
    for path, leaf in checkpoint_read.by_path(shapes["params"]).items():
        if path in there[item]:
            there[item][path] = there[item][path] | {"dtype": str(leaf.dtype)}
    checkpoint_read.check_fits(stored.folder, {"leaves": there}, wanted)


def _text_tokenizer(stored, model, options: Options) -> str:
    """Path of the text tokenizer of a model that reads text, with the identity that the run recorded."""
    if isinstance(model, tokenizer.TokenizerConfig):
        if options.text_tokenizer:
            raise errors.UserError("--text_tokenizer is set, but a depth tokenizer reads no text: leave it out")
        return ""
    recorded = (stored.meta.get("data") or {}).get("text_tokenizer", "")
    kept = (
        str(workdirs.folder(stored.path) / exported.TEXT)
        if stored.manifest and stored.manifest["text_tokenizer"]
        else ""
    )
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
    kept = (
        str(workdirs.folder(stored.path) / exported.DEPTH)
        if stored.manifest and stored.manifest["depth_tokenizer"]
        else ""
    )
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


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
