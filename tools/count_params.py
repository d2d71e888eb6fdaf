"""Counts the parameters of the full-size policy by shape alone (nothing is allocated) and checks the published totals.

  python tools/count_params.py

Baseline: open-pi-zero on BridgeData, 257,216 text embedding rows. QDepth-VLA: the paper reports 2.606 B -> 2.924 B
trained parameters.
Exit code 1 if a total is not the published one. The last line of stdout is JSON.
"""

import json
import sys

from absl import app

# reference -> number. The first two were counted on open-pi-zero's own modules; the paper gives four digits.
BASELINE_TOTAL = 3_238_100_727
BASELINE_TRAINED = 2_605_938_423
# Counted on openpi's own modules, and in the official PaliGemma files (3B, 224 pixels).
PI0_TOTAL = 3_238_048_528
PI05_TOTAL = 3_353_433_872
PALIGEMMA_TOTAL = 2_923_335_408
PAPER_BASELINE_BILLIONS = 2.606
PAPER_QDEPTH_BILLIONS = 2.924

# Parts of the table: name -> path regex. First match wins; every parameter must match one.
PARTS = (
    ("text embedding", "llm/embedder/.*"),
    ("SigLIP", "img/(?!head/).*"),
    ("projector", "img/head/.*"),
    ("vlm layers", "llm/layers/vlm/.*"),
    ("vlm final norm", "llm/final_norm_vlm/.*"),
    ("action expert", "llm/(layers/action/.*|final_norm_action/.*)"),
    ("action and proprio encoders, decoder", "(action_encoder|action_decoder|proprio_encoder|time_encoder)/.*"),
    ("depth expert", "llm/(layers/depth/.*|final_norm_depth/.*)"),
    ("depth encoder MLP", "depth_encoder/.*"),
    ("depth decoder CNN", "depth_decoder/.*"),
)


def main(argv: list[str]) -> int:
    """Prints the table; the exit code."""
    import jax

    from qdepth_jax.models import paligemma, policy

    if len(argv) > 1:
        print(f"count_params.py takes no arguments, got {argv[1:]}", file=sys.stderr)
        return 2
    faithful = count(policy.sized("full", depth=None, faithful=True))
    corrected = count(policy.sized("full", depth=None))
    qdepth = count(policy.sized("full", faithful=True))

    print(f"{'part':<40} {'parameters':>15} {'trained':>15}")
    for name, (total, trained) in qdepth["parts"].items():
        added = "" if name in faithful["parts"] else "  added by QDepth-VLA"
        print(f"{name:<40} {total:>15,} {trained:>15,}{added}")
    added = qdepth["trained"] - faithful["trained"]
    others = {name: count(policy.sized(name))["total"] for name in ("pi0", "pi05")}
    shapes = jax.eval_shape(lambda: paligemma.init(paligemma.sized("paligemma_3b"), jax.random.key(0)))["params"]
    others["paligemma"] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    published = {"pi0": PI0_TOTAL, "pi05": PI05_TOTAL, "paligemma": PALIGEMMA_TOTAL}
    lines = (
        ("baseline, all", faithful["total"], f"open-pi-zero {BASELINE_TOTAL:,}"),
        ("baseline, trained (faithful)", faithful["trained"], f"open-pi-zero {BASELINE_TRAINED:,}"),
        ("baseline, trained (corrected freezing)", corrected["trained"], ""),
        ("QDepth-VLA, added", added, "paper 0.318 B"),
        ("QDepth-VLA, all", qdepth["total"], ""),
        ("QDepth-VLA, trained (faithful)", qdepth["trained"], f"paper {PAPER_QDEPTH_BILLIONS} B"),
        ("pi0, all", others["pi0"], f"openpi {PI0_TOTAL:,}"),
        ("pi0.5, all", others["pi05"], f"openpi {PI05_TOTAL:,}"),
        ("PaliGemma 3B, all", others["paligemma"], f"official files {PALIGEMMA_TOTAL:,}"),
    )
    for name, number, reference in lines:
        print(f"{name:<40} {number:>15,}   {reference}")
    ok = (
        faithful["total"] == BASELINE_TOTAL
        and faithful["trained"] == BASELINE_TRAINED
        and round(faithful["trained"] / 1e9, 3) == PAPER_BASELINE_BILLIONS
        and round(qdepth["trained"] / 1e9, 3) == PAPER_QDEPTH_BILLIONS
        and others == published
    )
    result = {
        "ok": ok,
        "baseline_total": faithful["total"],
        "baseline_trained": faithful["trained"],
        "baseline_trained_corrected": corrected["trained"],
        "qdepth_total": qdepth["total"],
        "qdepth_trained": qdepth["trained"],
        "qdepth_added": added,
        "other_totals": others,
        "qdepth_added_parts": {
            name: total for name, (total, _) in qdepth["parts"].items() if name not in faithful["parts"]
        },
    }
    print(json.dumps(result))
    return 0 if ok else 1


def count(config) -> dict:
    """Totals of a PolicyConfig: total, trained, parts name -> (total, trained)."""
    import math
    import re

    import jax

    from qdepth_jax.models import policy

    shapes = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    frozen = policy.frozen_table(config)
    # How many entries of a leaf each kind freezes.
    shares = {"all": lambda s: math.prod(s), "last_layer": lambda s: math.prod(s[1:])}
    shares["last_layer_value"] = lambda s: math.prod(s[2:])
    parts: dict[str, list[int]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        name = next(name for name, pattern in PARTS if re.fullmatch(pattern, path))
        kind = next((kind for pattern, kind in frozen if re.fullmatch(pattern, path)), None)
        size = math.prod(leaf.shape)
        row = parts.setdefault(name, [0, 0])
        row[0] += size
        row[1] += size - (shares[kind](leaf.shape) if kind else 0)
    ordered = {name: tuple(parts[name]) for name, _ in PARTS if name in parts}
    return {
        "total": sum(total for total, _ in ordered.values()),
        "trained": sum(trained for _, trained in ordered.values()),
        "parts": ordered,
    }


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
