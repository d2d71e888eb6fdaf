"""The model card and the notice of an export, from what the checkpoint itself records: nothing is claimed beside it."""

from typing import Any

# Foreign weights -> (what they are, whose terms bind). Where weights descend from Gemma, its terms travel with every
# derivative, fine-tuned or converted.
GEMMA = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They bind every "
    "model derived from these weights, fine-tuned ones too: whoever passes them on hands over a copy of those terms "
    "with them, states that the files were changed, and passes on the use restrictions of "
    "ai.google.dev/gemma/prohibited_use_policy."
)
ORIGINS = {
    "big_vision": ("PaliGemma or PaliGemma 2 weights in big_vision's format (Google)", GEMMA),
    "hf_paligemma": ("PaliGemma or PaliGemma 2 weights from Hugging Face (Google)", GEMMA),
    "open_pi_zero": (
        "open-pi-zero weights (github.com/allenzren/open-pi-zero, MIT), which start from PaliGemma",
        GEMMA,
    ),
    "openpi": (
        "openpi weights (github.com/Physical-Intelligence/openpi, code Apache-2.0), which start from PaliGemma",
        GEMMA,
    ),
    "lerobot_pi0": (
        "pi0 weights in LeRobot's format (github.com/huggingface/lerobot, code Apache-2.0; from openpi), which start "
        "from PaliGemma",
        GEMMA,
    ),
    "unknown": (
        "an earlier stage whose checkpoint could not be read when this was exported",
        "Find out what it was started from before you pass this model on: if it descends from PaliGemma, pi0 or "
        "open-pi-zero, the Gemma Terms of Use (ai.google.dev/gemma/terms) bind it.",
    ),
}
_SHOWN = ("loss", "flow_loss", "depth_loss", "depth_accuracy", "rmse", "perplexity")


def notice(origin: list[str]) -> str:
    """NOTICE.md: the terms of the weights that this model descends from."""
    lines = ["# Notice", ""]
    if not origin:
        lines.append("The training run records no foreign weights: the parameters were trained from random ones.")
    for name in dict.fromkeys(origin):
        what, terms = ORIGINS.get(name, (f"weights of the format {name}", ORIGINS["unknown"][1]))
        lines += [f"## Derived from {what}", "", terms, ""]
        if terms is GEMMA:
            lines += [
                "The parameters in this folder are modified files: converted to another format or trained on.",
                "",
            ]
    lines += ["", "Terms of the training data are not recorded here: see the data sets named in README.md."]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def card(manifest: dict[str, Any], statistics: dict[str, Any], figures: dict[str, float]) -> str:
    """README.md of an export, Markdown.

    Args:
      manifest: model.json.
      statistics: data set -> {"action", "proprio"}, as in statistics.json.
      figures: metrics at the exported step.
    """
    weights, meta = manifest["weights"], manifest["meta"]
    sections = [
        f"# {manifest['name']}",
        _what(manifest),
        "## Use\n\n" + _use(manifest, statistics),
        "## Model\n\n" + _table([("field", "value"), *_facts(manifest)]),
        "## Training\n\n" + _training(meta, statistics),
        "## Figures\n\n" + _figures(figures, meta["step"]),
        "## Weights\n\n" + _weights(weights),
        "## Limits\n\n" + "\n".join(f"* {line}" for line in _limits(manifest, statistics)),
        "## Terms\n\n" + _terms(manifest["origin"]),
    ]
    return "\n\n".join(sections) + "\n"


def _what(manifest: dict[str, Any]) -> str:
    if manifest["model_kind"] == "tokenizer":
        return "A depth tokenizer (VQ-VAE): depth map to a grid of codebook indices and back. " + _made(manifest)
    if manifest["model_kind"] != "policy":
        return f"A model of the kind {manifest['model_kind']}, exported by qdepth_jax."
    model, depth = manifest["model"], manifest["model"]["depth"]
    views = ", ".join(model["views"])
    form = "without a depth expert" if depth is None else f"with a depth expert (predicts {depth['head']})"
    state = (
        "and the state of the robot in" if model["proprio_steps"] else "in (the state as part of the text, if at all)"
    )
    return (
        f"A vision-language-action policy, {form}: pictures ({views}), an instruction {state}, "
        f"{model['horizon']} actions of {model['action_used'] or model['action_dim']} numbers out, by flow matching. "
        + _made(manifest)
    )


def _made(manifest: dict[str, Any]) -> str:
    return "Trained with qdepth_jax." if manifest["meta"].get("data") else "Converted by qdepth_jax, not trained by it."


def _use(manifest: dict[str, Any], statistics: dict[str, Any]) -> str:
    lines = [
        "    from qdepth_jax import exported",
        '    loaded = exported.load_export("THIS_FOLDER")  # .kind .model .variables .statistics .text_tokenizer',
    ]
    if manifest["model_kind"] == "policy":
        lines += [
            "    from qdepth_jax.models import sampling",
            '    actions = sampling.sample_actions(loaded.model, loaded.variables["params"], loaded.variables["state"],'
            " batch, noise)",
        ]
        if statistics:
            lines += [
                "",
                "`actions` are normalised: `data.normalise.unnormalise` with the statistics of the robot's data set "
                "gives its own units. The state goes in normalised by the same file.",
            ]
    if manifest["weights"]["format"].startswith("open_pi_zero"):
        lines += [
            "",
            "Key names are those of open-pi-zero's state dict (`model` in its checkpoints), for its own code.",
        ]
    return "\n".join(lines)


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("parameters", f"{manifest['weights']['parameters']:,}")]
    facts += [(name, _value(value)) for name, value in sorted(manifest["conventions"].items())]
    if words := manifest["text_tokenizer"]:
        facts.append(
            ("text tokenizer", f"{words['identity']}, {words['max_text_tokens']} ids, padded on the right with 0")
        )
    if identity := manifest.get("identity"):
        facts.append(("identity", f"{identity} (of encoder and codebook; stands in every token sidecar it makes)"))
    if depth := manifest["depth_tokenizer"]:
        facts.append(("depth tokenizer", depth["identity"]))
    return facts


def _training(meta: dict[str, Any], statistics: dict[str, Any]) -> str:
    config = meta["config"]
    train = config.get("train", {})
    lines = []
    if meta.get("data"):
        seen = meta["data"].get("position", meta["step"] * train.get("batch_size", 0))
        lines.append(
            f"{meta['step']:,} steps of {train.get('batch_size', '?')} examples ({seen:,} in all), seed "
            f"{config.get('seed')}."
        )
    else:
        lines.append("Imported: no training run of qdepth_jax stands behind these parameters.")
    sources = {item["name"]: item for item in (meta.get("data") or {}).get("datasets", [])}
    if sources:
        shares = meta["data"].get("shares", [0] * len(sources))
        rows = [
            (name, f"{item['frames']:,}", f"{share:.1%}", item["split"], item["fingerprint"][:16])
            for (name, item), share in zip(sources.items(), shares)
        ]
        lines += ["", _table([("data set", "frames", "share", "split", "fingerprint"), *rows])]
    if statistics:
        rows = []
        for name, pair in statistics.items():
            for key, item in pair.items():
                low, high = item["statistics"]["q01"], item["statistics"]["q99"]
                rows.append((name, key, item["kind"], _numbers(low), _numbers(high)))
        lines += ["", _table([("data set", "vector", "normalised by", "1 %", "99 %"), *rows])]
    return "\n".join(lines)


def _figures(figures: dict[str, float], step: int) -> str:
    shown = [(n, v) for n, v in sorted(figures.items()) if n.removeprefix("val/") in _SHOWN]
    if not shown:
        return "None recorded."
    rows = [(name, f"{value:.4g}") for name, value in shown]
    return (
        _table([("metric", "value"), *rows])
        + f"\n\nFrom the run's metrics.jsonl, last rows up to step {step}; `val/` is on held-out episodes. These are "
        "training metrics: no success rate of a robot follows from them."
    )


def _weights(weights: dict[str, Any]) -> str:
    kind = "averaged (EMA)" if weights["averaged"] else "raw"
    text = f"{weights['format']}, {weights['dtype']}, {kind} parameters."
    if weights["dtype"] == "bfloat16":
        text += " Each parameter was rounded to the nearest bfloat16: a relative change of at most 2^-8 (0.4 %)."
    elif weights.get("rounded"):
        text += " They come from an export in bfloat16, to which they were rounded: the digits lost there are lost."
    return text + " model.json holds a sum of every array; loading checks it."


def _limits(manifest: dict[str, Any], statistics: dict[str, Any]) -> list[str]:
    out = []
    if manifest["meta"].get("data") and not manifest["origin"]:
        out.append("No foreign weights are recorded: everything it knows comes from the training data named above.")
    out += ["Not tested for safety: whoever lets it move a robot limits speed, force and workspace by other means."]
    if manifest["model_kind"] == "policy":
        names = ", ".join(sorted(statistics)) or "no data set"
        out.append(f"Statistics are those of {names}: another robot or camera needs training of its own.")
        if not statistics:
            out.append("Without statistics its actions have no units: fine-tune it first.")
        depth = manifest["model"]["depth"]
        if depth is not None and depth["head"] == "codes" and manifest["depth_tokenizer"] is None:
            out.append("No depth tokenizer is included: predicted depth tokens cannot be turned into depth here.")
        if manifest["text_tokenizer"] is None:
            out.append("No text tokenizer is included: ids of another tokenizer mean other words.")
    return out


def _terms(origin: list[str]) -> str:
    if not origin:
        return "No foreign weights are recorded; see NOTICE.md."
    names = "; ".join(ORIGINS.get(name, (name, ""))[0] for name in dict.fromkeys(origin))
    return f"Derived from {names}. Their terms bind this model too: see NOTICE.md."


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    rule = " | ".join("---" for _ in rows[0])
    return "\n".join(f"| {line} |" for line in (head, rule, *body))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
