"""Evaluates a tokenizer and the policies trained with it on held-out episodes and writes report.html and summary.json.

  python tools/report.py --tokenizer=WORKDIR --policy=NAME=WORKDIR [--policy=NAME=WORKDIR ...] --output=DIR

The first policy that predicts depth tokens gives the depth pictures. The last line of stdout is the path of
report.html.
"""

import json
import shlex
import sys

from absl import flags

from qdepth_jax import command

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "workdir of the depth tokenizer", required=True)
_POLICY = flags.DEFINE_multi_string("policy", None, "NAME=WORKDIR of a trained policy; repeat it", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the report", required=True)
_BATCHES = flags.DEFINE_integer("batches", 16, "batches of 32 held-out frames per policy (at most one pass)")
_ROWS = flags.DEFINE_integer("rows", 4, "frames drawn")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import checkpoint, earlier_stages, errors, workdirs
    from qdepth_jax import metrics as metrics_lib
    from qdepth_jax.eval import figures, held_out, report
    from qdepth_jax.models import tokenizer

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    runs = {}
    for row in _POLICY.value:
        name, equals, workdir = row.partition("=")
        if not equals:
            raise errors.UserError(f"--policy={row!r} must be NAME=WORKDIR")
        if name in runs:
            raise errors.UserError(f"two policies are called {name!r}: give each a name of its own")
        runs[name] = workdir
    config, variables, meta = earlier_stages.load_tokenizer(_TOKENIZER.value)
    identity = tokenizer.identity(config, variables["params"], variables["state"])
    for name, workdir in runs.items():
        found = checkpoint.read_meta(workdir)["tokenizer"]
        if found not in ("", identity):
            raise errors.UserError(
                f"policy {name} in {workdir!r} was trained with depth tokenizer {found}, "
                f"--tokenizer={_TOKENIZER.value} is {identity}: name the one it was trained with"
            )
    measured, drawn = tokenizer_figures(config, variables, meta)
    summary = {"tokenizer": {"workdir": _TOKENIZER.value, "step": meta["step"], "held_out": measured}, "policies": {}}
    results = {}
    for name, workdir in runs.items():
        model, result, policy_meta, parameters = held_out.policy_result(workdir, _BATCHES.value)
        results[name] = (model, result)
        summary["policies"][name] = {
            "workdir": workdir,
            "step": policy_meta["step"],
            "parameters": parameters,
            "figures": result.figures,
        }
    summary["commands"] = commands(_TOKENIZER.value, runs)
    curves = {name: metrics_lib.read(workdirs.folder(workdir) / "metrics.jsonl") for name, workdir in runs.items()}
    token_rows = {"tokenizer": metrics_lib.read(workdirs.folder(_TOKENIZER.value) / "metrics.jsonl")}
    pictures = {
        "Depth tokenizer": figures.curves(token_rows, ["loss", "rmse", "codes_used", "perplexity"])
        + report.table(*tokenizer_table(measured)) + drawn,
        "Policies": figures.curves(curves, ["loss", "flow_loss", "depth_loss", "depth_accuracy"])
        + report.policy_table(summary["policies"]),
        "Predicted depth, decoded": depth_pictures(config, variables, results),
        "Action chunks of held-out frames": chunk_pictures(results),
    }  # fmt: skip
    texts = {
        f"Config of {name}": json.dumps(json.loads((workdirs.folder(w) / "config.json").read_text()), indent=1)
        for name, w in {"tokenizer": _TOKENIZER.value, **runs}.items()
    }
    path = report.write(_OUTPUT.value, summary, pictures, texts)
    for check in report.checks(summary):
        print(f"{'ok ' if check['ok'] else 'NOT MET'} {check['name']} {check['value']:.4f} ({check['required']}: "
              f"{check['baseline']:.4f})")  # fmt: skip
    print(path)


def tokenizer_figures(config, variables, meta):
    """Per data set: figures on its held-out split; and pictures of truth against reconstruction."""
    import numpy as np

    from qdepth_jax import depth
    from qdepth_jax.data import loader, sidecar
    from qdepth_jax.eval import depth_metrics, figures, held_out
    from qdepth_jax.models import tokenizer

    out, pictures = {}, ""
    data = held_out.data_of(meta)
    for source in data.datasets:
        one = type(data)(**{**vars(data), "datasets": (source,), "shuffle": True})
        features = ("depth", "depth_scale", "depth_offset", "image_main")
        reader = loader.Loader(one, features, 32, normalisers=held_out.normalisers(meta))
        run = tokenizer.compiled_roundtrip(config)
        sums, floor, indices, rows = depth_metrics.DepthSums(), depth_metrics.DepthSums(), [], []
        frames = 0
        for i in range(max(1, min(_BATCHES.value, reader.frames // 32))):
            batch = reader.batch(i)
            codes, x_hat, x, valid = run(variables, batch["depth"], batch["depth_scale"], batch["depth_offset"])
            value, truth = (np.asarray(depth.denormalise(a, config.range)) for a in (x_hat, x))
            # Tokens that stand for no depth are not used by anybody, so they do not count here.
            kept = sidecar.token_validity(np.asarray(valid), config.grid)
            valid = np.asarray(valid) & sidecar.token_pixels(kept, valid.shape[1])
            sums.add(value, truth, valid)
            floor.add(depth_metrics.constant_per_token(truth, valid, config.grid), truth, valid)
            indices.append(np.asarray(codes)[kept])
            frames += len(codes)
            rows.append((batch["image_main"], np.where(valid, truth, np.nan), value))
        reader.close()
        indices = np.concatenate(indices)
        out[source.name] = {
            "frames": frames,
            "invalid_token_share": 1 - indices.size / (frames * config.grid**2),
            **depth_metrics.code_usage(indices, config.num_codes),
            **sums.result(),
            "constant_per_token": floor.result(),
        }
        images, truth, value = (np.concatenate(part)[: _ROWS.value] for part in zip(*rows))
        near, far = np.nanpercentile(truth, [1, 99])
        columns = {"truth": truth, "reconstruction": value}
        unit = "m" if config.range.kind == "metric" else "relative"
        pictures += f"<h3>{source.name}</h3>" + figures.depth_rows(images, columns, near, far, unit)
        pictures += figures.code_histogram(indices, config.num_codes)
    return out, pictures


def tokenizer_table(measured):
    """(header, rows) of the tokenizer's figures."""
    header = [
        "held-out depth",
        "frames",
        "codes used",
        "perplexity",
        "RMSE",
        "AbsRel",
        "delta 1",
        "RMSE, constant/token",
    ]
    rows = [
        [name, t["frames"], f"{t['codes_used']} of {t['codes']}", t["perplexity"], t["rmse"], t["abs_rel"],
         t["delta_1"], t["constant_per_token"]["rmse"]]
        for name, t in measured.items()
    ]  # fmt: skip
    return header, rows


def depth_pictures(config, variables, results):
    """Camera | truth | own tokens decoded | predicted tokens decoded."""
    import jax
    import numpy as np

    from qdepth_jax import depth
    from qdepth_jax.data import sidecar
    from qdepth_jax.eval import figures, report
    from qdepth_jax.models import tokenizer

    for name, (_, result) in results.items():
        if result.codes is None or result.raw_depth is None:
            continue
        pick = report.spread(len(result.frames), _ROWS.value)
        decode = jax.jit(lambda v, codes: tokenizer.decode(config, v["params"], v["state"], codes))
        x, valid = depth.normalise(result.raw_depth[pick], result.scale[pick], result.offset[pick], config.range)
        truth = np.where(valid, np.asarray(depth.denormalise(x, config.range)), np.nan)
        columns = {"truth": truth}
        for title, codes in (("true tokens", result.tokens), (f"predicted by {name}", result.codes)):
            kept = codes[pick] != sidecar.INVALID_TOKEN
            value = np.asarray(depth.denormalise(decode(variables, np.where(kept, codes[pick], 0)), config.range))
            columns[title] = np.where(sidecar.token_pixels(kept, value.shape[1]), value, np.nan)
        near, far = np.nanpercentile(truth, [1, 99])
        unit = "m" if config.range.kind == "metric" else "relative"
        return figures.depth_rows(result.images[pick], columns, near, far, unit)
    return "<p>No policy here predicts depth tokens.</p>"


def chunk_pictures(results):
    """True against predicted chunks, every policy in one panel."""
    from qdepth_jax.eval import figures, report

    first = next(iter(results.values()))[1]
    pick = report.spread(len(first.frames), _ROWS.value)
    names = report.ACTION_NAMES if first.true.shape[-1] == 7 else [str(i) for i in range(first.true.shape[-1])]
    predictions = {name: result.predicted[pick] for name, (_, result) in results.items()}
    return figures.action_chunks(first.true[pick], first.mask[pick], predictions, names)


def commands(tokenizer_dir, runs):
    """The commands that lead to this report, as they were typed (the last start of each run)."""
    lines = [last_command(tokenizer_dir), f"python tools/tokenize_depth.py --tokenizer={tokenizer_dir}"]
    lines += [last_command(workdir) for workdir in runs.values()]
    return [*lines, shlex.join(["python", *sys.argv])]


def last_command(workdir):
    """Last line of WORKDIR/command.txt, or what is known without it."""
    from qdepth_jax import workdirs

    path = workdirs.folder(workdir) / "command.txt"
    if not path.exists():
        return f"# {workdir} was not started by `python -m qdepth_jax.train`; its config is below"
    return path.read_text().splitlines()[-1]


if __name__ == "__main__":
    command.run(main)
