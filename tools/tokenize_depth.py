"""Turns every depth map of a tokenizer's data into codes, and measures the reconstruction.

  python tools/tokenize_depth.py --tokenizer=WORKDIR [--output=DIR] [--dataset=NAME=DIR ...]

WORKDIR is the training run of a depth tokenizer; its data sets are tokenised (all splits) unless --dataset names
others. Tokens are written to OUTPUT/NAME (default WORKDIR/tokens/NAME, where a policy with --config.tokenizer=WORKDIR
looks). A token of which fewer than half of the pixels have valid depth is 65535, and so are all tokens of a frame that
the index has set aside (tools/index_rlds.py --quarantine). A tokenizer of another kind of depth, or whose range the
data miss altogether, is refused; depth out of its range is masked and counted.

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
_REPORT = flags.DEFINE_string("report", "", "folder of the report; default OUTPUT/report; none: no report")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside each data set")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes that share the work", lower_bound=1)


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import earlier_stages, errors, process_share

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    if _VIEW.value not in ("", "main") and not _OUTPUT.value:
        raise errors.UserError(f"--view={_VIEW.value} needs --output: WORKDIR/tokens is for the main view of a policy")
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
    sources = []
    summary = {
        name: tokenize(
            config,
            variables,
            name,
            path,
            depth.get(name, saved.get(name, {}).get("depth", "")),
            index_dir,
            output,
            view=_VIEW.value,
            share=share,
            sources=sources,
        )
        for name, path in paths.items()
    }
    for name, rows in summary.items():
        catch_up(name, rows, os.path.join(output, name))
    if _REPORT.value != "none":
        summary["report"] = report(config, variables, summary, sources, _REPORT.value or os.path.join(output, "report"))
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
            print(f"{name} {split}: {masked} of the depth is invalid or out of range", file=sys.stderr)


def report(config, variables, summary: dict, sources: list, folder: str) -> str | None:
    """Path of the report over all data sets; None while a split is not finished."""
    from qdepth_jax.data import sidecar, sidecar_lock
    from qdepth_jax.eval import token_report

    made = [row["directory"] for rows in summary.values() for row in rows.values()]
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
) -> dict:
    """Tokens of all splits of one data set; returns its summary by split, and adds their depth to `sources`."""
    from qdepth_jax import errors, process_share, tokenisation
    from qdepth_jax.data import definitions, index

    opened, definition = index.open_index(path, index_dir), definitions.find(name)
    views = {feature: found for found, feature in reversed(definition.views.items())}
    view = view or views[definition.main_view]
    if view not in definition.views:
        raise errors.UserError(f"--view={view}: {name} has {', '.join(definition.views)}")
    devices, out, root = process_share.local_devices(), {}, os.path.join(output, name)
    for split_name, split in opened.splits.items():
        source = tokenisation.open_source(opened, definition, split, view, depth_dir)
        out[split_name] = tokenisation.tokenise_split(config, variables, source, root, devices, *share)
        if sources is not None:
            sources.append(source)
    return out


if __name__ == "__main__":
    command.run(main)
