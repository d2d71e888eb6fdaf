"""Turns every depth map of a tokenizer's data into codes, and measures the reconstruction.

  python tools/tokenize_depth.py --tokenizer=WORKDIR [--output=DIR] [--dataset=NAME=DIR ...]

WORKDIR is the training run of a depth tokenizer; its data sets are tokenised (all splits) unless --dataset names
others. Tokens are written to OUTPUT/NAME (default WORKDIR/tokens/NAME, where a policy with --config.tokenizer=WORKDIR
looks). With --views=main,wrist they go to OUTPUT/VIEW/NAME, labels are read from --depth=NAME=DIR as DIR/VIEW, which is
where tools/annotate_depth.py --views puts them, and one report has all cameras. A token of which fewer than half of the
pixels have valid depth is 65535, and so are all tokens of a frame that the index has set aside (tools/index_rlds.py
--quarantine). A tokenizer of another kind of depth, or whose range the data miss altogether, is refused; depth out of
its range is masked and counted. Labels of another estimator than the tokenizer was trained on, and tokens worse than
the best constant, are warned of, here and in the summary. Every episode of a depth sidecar is checked against its sum
as it is read.

Several processes, on one host or many, share the episodes: start each with --num_processes=N --process_id=I (or under
SLURM or Open MPI). Interrupt, kill and run again, with any N: what is encoded stays, bytes and figures are the same.
The last line of stdout is JSON: per data set and split codes used, perplexity, RMSE, AbsRel, delta_1 to delta_3 with
95 % intervals over episodes and the same for the best constant per token, all over the valid tokens alone, and the
share of the others. While other processes have episodes left, "directory" is null and their number stands there.
Who finds all of it finished writes OUTPUT/report/report.html: figures, reconstructions, error maps, code usage, videos.
"""

import json
import os
import sys

from absl import flags

from qdepth_jax import command

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "workdir of a trained depth tokenizer", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "root of the token sidecars; default WORKDIR/tokens")
_DATASET = flags.DEFINE_multi_string("dataset", [], "NAME=DIR: tokenise this instead of the tokenizer's own data")
_DEPTH = flags.DEFINE_multi_string("depth", [], "NAME=DIR: depth annotation sidecar of that data set")
_VIEW = flags.DEFINE_string("view", "", "view to tokenise (default: main; others need --output)")
_VIEWS = flags.DEFINE_list("views", [], "several views, each to OUTPUT/VIEW/NAME; needs --output")
_REPORT = flags.DEFINE_string("report", "", "folder of the report; default OUTPUT/report; none: no report")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside each data set")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes that share the work", lower_bound=1)


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import earlier_stages, errors, process_share

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    if _VIEW.value and _VIEWS.value:
        raise errors.UserError(f"--view={_VIEW.value} --views={','.join(_VIEWS.value)}: give one of the two")
    for flag, given in (("view", _VIEW.value), ("views", ",".join(_VIEWS.value))):
        if given not in ("", "main") and not _OUTPUT.value:
            raise errors.UserError(f"--{flag}={given} needs --output: WORKDIR/tokens is for the main view of a policy")
    share = process_share.find(_PROCESS_ID.value, _NUM_PROCESSES.value)
    config, variables, meta = earlier_stages.load_tokenizer(_TOKENIZER.value)
    saved = meta["config"]["datasets"]
    depth = dict(_pair(row) for row in _DEPTH.value)
    paths = dict(_pair(row) for row in _DATASET.value) or {name: row["path"] for name, row in saved.items()}
    if strange := [name for name in (*depth, *paths) if name not in {**saved, **paths}]:
        raise errors.UserError(f"--depth={strange[0]}=...: no such data set; there is {', '.join({**saved, **paths})}")
    if others := [name for name in paths if name not in saved]:
        print(f"the tokenizer was trained on {', '.join(saved)}, not on {', '.join(others)}", file=sys.stderr)
    output = _OUTPUT.value or os.path.join(_TOKENIZER.value, "tokens")
    index_dir = _INDEX_DIR.value or meta["config"]["data"]["index_dir"]
    trained = (meta.get("data") or {}).get("datasets", [])

    def labels(name: str, view: str) -> str:
        if name in depth:
            return os.path.join(depth[name], view) if _VIEWS.value else depth[name]
        return saved.get(name, {}).get("depth", "")

    sources, done = [], []  # of all splits of all data sets and views; (view, name, root, summary by split)
    for view in _VIEWS.value or [_VIEW.value]:
        out = os.path.join(output, view) if _VIEWS.value else output
        for name, path in paths.items():
            rows = tokenize(
                config, variables, name, path, labels(name, view), index_dir, out, view, share, sources, trained
            )
            done.append((view, name, os.path.join(out, name), rows))
    for _, name, root, rows in done:
        catch_up(name, rows, root)
    summary = {
        view: {name: rows for v, name, _, rows in done if v == view} for view in dict.fromkeys(v for v, *_ in done)
    }
    summary = {"views": summary} if _VIEWS.value else summary[_VIEW.value]
    if _REPORT.value != "none":
        rows, folder = [rows for *_, rows in done], _REPORT.value or os.path.join(output, "report")
        summary["report"] = report(config, variables, rows, sources, folder)
    print(json.dumps(summary))


def catch_up(name: str, rows: dict, root: str) -> None:
    """Completes the rows of splits that another process has finished in the meantime, and says what is odd."""
    from qdepth_jax import tokenisation
    from qdepth_jax.data import sidecar

    for split, row in rows.items():
        directory = os.path.join(root, split)
        if row["directory"] is None and os.path.isdir(directory):
            row |= {"directory": directory, "unfinished_episodes": 0}
            row |= tokenisation.figures(sidecar.open_sidecar(root, split))
        if row.get("masked_share", 0) > 0.5:
            masked = f"{100 * row['masked_share']:.0f} %"
            row["warnings"].append(f"{masked} of the depth is invalid or out of range")
        if row.get("pixels") and (over := row["floor_over_tokens"]["rmse"]) < 1:
            row["warnings"].append(
                f"the tokens say less than the best constant per token would (floor / RMSE {over:.2f}): the tokenizer "
                "is one of other depth, or was trained too little"
            )
        for warning in row["warnings"]:
            print(f"warning: {name} {split}: {warning}", file=sys.stderr)


def report(config, variables, summary: list[dict], sources: list, folder: str) -> str | None:
    """Path of the report over all data sets and views; None while a split is not finished."""
    from qdepth_jax.data import sidecar, sidecar_lock
    from qdepth_jax.eval import token_report

    made = [row["directory"] for rows in summary for row in rows.values()]
    if None in made:
        return None
    opened = [sidecar.open_sidecar(*os.path.split(directory)) for directory in made]
    parts = [token_report.Part(source, tokens) for source, tokens in zip(sources, opened, strict=True)]
    os.makedirs(folder, exist_ok=True)
    with sidecar_lock.exclusive(os.path.join(folder, ".lock")):  # two processes may both see the end
        return token_report.write(folder, config, variables, parts)


def _pair(text: str) -> tuple[str, str]:
    from qdepth_jax import errors

    name, equals, value = text.partition("=")
    if not equals:
        raise errors.UserError(f"{text!r} must be NAME=DIR")
    return name, value


def tokenize(
    config,
    variables,
    name: str,
    path: str,
    depth_dir: str,
    index_dir: str,
    output: str,
    view: str = "",
    share: tuple[int, int] = (0, 1),
    sources: list | None = None,
    trained: list | None = None,
) -> dict:
    """Tokens of all splits of one data set; returns its summary by split, and adds their depth to `sources`.

    `trained`: what is known of the tokenizer's own data sets.
    """
    from qdepth_jax import errors, process_share, tokenisation
    from qdepth_jax.data import definitions, index

    opened, definition = index.open_index(path, index_dir), definitions.find(name)
    index.say_warnings(opened)
    views = {feature: found for found, feature in reversed(definition.views.items())}
    view = view or views[definition.main_view]
    if view not in definition.views:
        raise errors.UserError(f"view {view!r}: {name} has {', '.join(definition.views)}")
    devices, out, root = process_share.local_devices(), {}, os.path.join(output, name)
    for split_name, split in opened.splits.items():
        source = tokenisation.open_source(opened, definition, split, view, depth_dir)
        other = tokenisation.other_labels(source, trained or [])
        made = tokenisation.tokenise_split(config, variables, source, root, devices, *share)
        out[split_name] = made | {"warnings": [other] if other else []}
        if sources is not None:
            sources.append(source)
    return out


if __name__ == "__main__":
    command.run(main)
