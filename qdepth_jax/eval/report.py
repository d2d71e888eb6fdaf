"""report.html and summary.json of a tokenizer and the policies trained with it: every number beside its baseline."""

import html
import json
import pathlib
from typing import Any

import numpy as np

ACTION_NAMES = ["x", "y", "z", "rot x", "rot y", "rot z", "gripper"]

STYLE = """body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:right}
th:first-child,td:first-child{text-align:left}.ok{background:#e2f4e2}.bad{background:#f9dede}
pre{background:#f4f4f4;padding:.8em;overflow:auto;font-size:12px}img{max-width:100%}small{color:#666}"""


def table(header: list[str], rows: list[list[Any]], classes: list[str] | None = None) -> str:
    """An HTML table; floats with four digits, one CSS class per row."""

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else html.escape(str(value))

    out = ["<table><tr>", *(f"<th>{html.escape(h)}</th>" for h in header), "</tr>"]
    for i, row in enumerate(rows):
        name = f' class="{classes[i]}"' if classes and classes[i] else ""
        out += [f"<tr{name}>", *(f"<td>{cell(v)}</td>" for v in row), "</tr>"]
    return "".join([*out, "</table>"])


def page(title: str, sections: list[tuple[str, str]]) -> str:
    """A self-contained HTML page."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in sections)
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"</head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )


def checks(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What a working pipeline must show: rows of name, value, baseline, required, ok."""
    rows = []

    def row(name: str, value: float, baseline: float, required: str, ok: bool) -> None:
        rows.append({"name": name, "value": value, "baseline": baseline, "required": required, "ok": bool(ok)})

    for dataset, t in summary["tokenizer"]["held_out"].items():
        floor = t["constant_per_token"]["rmse"]
        row(
            f"{dataset}: codes used",
            t["codes_used"],
            t["codes"],
            ">= 50 % of the codes",
            t["codes_used"] >= t["codes"] / 2,
        )
        row(f"{dataset}: RMSE", t["rmse"], floor, "<= 1/2 of the best constant per token", t["rmse"] <= floor / 2)
    for name, p in summary["policies"].items():
        actions = p["figures"]["actions"]
        for other in ("mean_action", "repeat_last_action"):
            value, baseline = actions["policy"]["l1"], actions[other]["l1"]
            row(f"{name}: action L1", value, baseline, f"< {other.replace('_', ' ')}", value < baseline)
        tokens = p["figures"].get("depth_tokens")
        if tokens:
            value, baseline = tokens["accuracy"], tokens["most_frequent_per_position_accuracy"]
            row(f"{name}: depth-token accuracy", value, baseline, "> most frequent code per position", value > baseline)
    return rows


def write(output: str, summary: dict[str, Any], pictures: dict[str, str], texts: dict[str, str]) -> str:
    """Write summary.json and report.html; returns the path of the page.

    Args:
      output: folder, created.
      summary: JSON-able; "tokenizer", "policies", "commands" (see tools/report.py).
      pictures: section name -> HTML of its figures, in order.
      texts: heading -> preformatted text (configs).
    """
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    summary = summary | {"checks": checks(summary)}
    verdicts = summary["checks"]
    rows = [[c["name"], c["value"], c["baseline"], c["required"], "yes" if c["ok"] else "NO"] for c in verdicts]
    sections = [
        ("What came out", table(["figure", "value", "baseline", "required", "met"], rows,
                                ["ok" if c["ok"] else "bad" for c in verdicts]) + _note()),
        ("Commands", "<pre>" + html.escape("\n".join(summary["commands"])) + "</pre>"),
        *pictures.items(),
        *((name, f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()),
    ]  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True, default=float) + "\n")
    path = folder / "report.html"
    path.write_text(page("qdepth_jax report", sections))
    return str(path)


def _note() -> str:
    return (
        "<p><small>All figures are on episodes that no training step has seen. Action errors are mean absolute errors "
        "in normalised units (-1..1 between the 1st and 99th percentile; gripper 0/1) over the real steps of the "
        "chunks, one sample per frame. Depth errors are in the unit of the depth range, over valid pixels.</small></p>"
    )


def policy_table(policies: dict[str, Any]) -> str:
    """Action error by dimension for every policy and the baselines of the first."""
    rows, first = [], next(iter(policies.values()))["figures"]["actions"]
    for name, p in policies.items():
        a = p["figures"]["actions"]["policy"]
        rows.append([name, a["l1"], *a["l1_by_dimension"]])
    for name in ("mean_action", "repeat_last_action"):
        rows.append([name.replace("_", " "), first[name]["l1"], *first[name]["l1_by_dimension"]])
    dims = len(rows[0]) - 2
    names = ACTION_NAMES if dims == len(ACTION_NAMES) else [str(i) for i in range(dims)]
    return table(["action L1", "all", *names], rows)


def spread(frames: int, count: int) -> np.ndarray:
    """`count` row numbers spread over `frames` rows."""
    return np.unique(np.linspace(0, frames - 1, count).astype(int))
