"""Turns every depth map of a tokenizer's data into codes, and measures the reconstruction.

  python tools/tokenize_depth.py --tokenizer=WORKDIR [--output=DIR] [--dataset=NAME=DIR ...]

WORKDIR is the training run of a depth tokenizer; its data sets are tokenised (all splits) unless --dataset names
others. Tokens are written to OUTPUT/NAME (default WORKDIR/tokens/NAME, where a policy with --config.tokenizer=WORKDIR
looks). A killed run continues. A token of which fewer than half of the pixels have valid depth is 65535, and so are all
tokens of a frame that the index has set aside (tools/index_rlds.py --quarantine). The last line of stdout is JSON: per
data set and split codes used, perplexity, RMSE, AbsRel, delta_1 and the same for the best constant per token, all over
the valid tokens alone, and the share of the others.
"""

import json
import os

from absl import flags

from qdepth_jax import command

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "workdir of a trained depth tokenizer", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "root of the token sidecars; default WORKDIR/tokens")
_DATASET = flags.DEFINE_multi_string("dataset", [], "NAME=DIR: tokenise this instead of the tokenizer's own data")
_DEPTH = flags.DEFINE_multi_string("depth", [], "NAME=DIR: depth annotation sidecar of that data set")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside each data set")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import earlier_stages, errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    config, variables, meta = earlier_stages.load_tokenizer(_TOKENIZER.value)
    saved = meta["config"]["datasets"]
    depth = dict(_pair(row) for row in _DEPTH.value)
    paths = dict(_pair(row) for row in _DATASET.value) or {name: row["path"] for name, row in saved.items()}
    output = _OUTPUT.value or os.path.join(_TOKENIZER.value, "tokens")
    index_dir = _INDEX_DIR.value or meta["config"]["data"]["index_dir"]
    summary = {
        name: tokenize(
            config, variables, name, path, depth.get(name, saved.get(name, {}).get("depth", "")), index_dir, output
        )
        for name, path in paths.items()
    }
    print(json.dumps(summary))


def _pair(text: str) -> tuple[str, str]:
    from qdepth_jax import errors

    name, equals, value = text.partition("=")
    if not equals:
        raise errors.UserError(f"{text!r} must be NAME=DIR")
    return name, value


def tokenize(config, variables, name: str, path: str, depth_dir: str, index_dir: str, output: str) -> dict:
    """Tokens of all splits of one data set; returns its summary by split."""
    import numpy as np

    from qdepth_jax import errors, progress
    from qdepth_jax.data import definitions, episode_reader, index, sidecar
    from qdepth_jax.models import tokenizer

    if config.num_codes > sidecar.INVALID_TOKEN:
        raise errors.UserError(
            f"the tokenizer has {config.num_codes} codes; tokens are stored in 16 bits, which leaves room for "
            f"{sidecar.INVALID_TOKEN}: train one with fewer"
        )
    opened = index.open_index(path, index_dir)
    definition = definitions.find(name)
    camera = f"steps/{definition.main_view}"
    identity = tokenizer.identity(config, variables["params"], variables["state"])
    out = {}
    for split_name, split in opened.splits.items():
        annotated = sidecar.open_sidecar(depth_dir, split_name) if depth_dir else None
        kind = annotated.metadata.details["depth_kind"] if annotated else "metric"
        _check_kind(config, kind, name)
        metadata = sidecar.Metadata(
            kind="depth_tokens",
            fingerprint=opened.fingerprint,
            split=split_name,
            camera=camera,
            identity=identity,
            row_shape=(config.grid * config.grid,),
            frames=split.frames,
            episodes=len(split.episodes),
            details={"grid": config.grid, "codes": config.num_codes, "invalid": sidecar.INVALID_TOKEN},
        )
        writer = sidecar.Writer(os.path.join(output, name), metadata)
        reader, measure = episode_reader.EpisodeReader(split), Measure(config, variables)
        pending = set(writer.pending())
        episodes = range(len(split.episodes))
        done = len(episodes) - len(pending)
        # Episodes done before are encoded again only for the figures; their bytes on disk stay.
        label = f"{name} {split_name} episodes" + (f" ({done} only measured, done before)" if done else "")
        for episode in progress.track(episodes, len(episodes), label, "episode"):
            steps = reader.good_steps(episode)
            tokens = np.full((reader.length(episode), *metadata.row_shape), sidecar.INVALID_TOKEN, np.uint16)
            if len(steps):
                depth_name = f"steps/{definition.main_depth}"
                depth = reader.depth_of(depth_name, definition.depth_metres, annotated, episode, steps)
                tokens[steps] = measure.encode(*depth)
            if episode in pending:
                writer.write(episode, int(split.episodes["start"][episode]), tokens)
        reader.close()
        out[split_name] = {
            "directory": writer.finish(),
            "identity": identity,
            "quarantined_frames": len(split.quarantined),
            **measure.result(),
        }
    return out


def _check_kind(config, kind: str, name: str) -> None:
    from qdepth_jax import errors

    if kind != config.range.kind:
        raise errors.UserError(
            f"the tokenizer's depth range is {config.range.kind!r}, but {name} has {kind!r} depth: train one on it"
        )


class Measure:
    """Encodes, decodes and measures in fixed-size batches (one compilation)."""

    BATCH = 32

    def __init__(self, config, variables):
        from qdepth_jax.eval import depth_metrics
        from qdepth_jax.models import tokenizer

        self._config, self._variables, self._metrics = config, variables, depth_metrics
        self._tokens, self._floor = depth_metrics.DepthSums(), depth_metrics.DepthSums()
        self._usage, self._frames, self._invalid = 0, 0, 0
        self._pixels, self._masked = 0, 0
        self._run = tokenizer.compiled_roundtrip(config)

    def encode(self, raw, scale: float, offset: float):
        """u16 [T, P] tokens of u16 [T, H, W] raw depth, INVALID_TOKEN where most is invalid; adds to the figures."""
        import jax
        import numpy as np

        from qdepth_jax import depth
        from qdepth_jax.data import sidecar

        codes = []
        for start in range(0, len(raw), self.BATCH):
            part = raw[start : start + self.BATCH]
            padded = np.concatenate([part, np.repeat(part[-1:], self.BATCH - len(part), axis=0)])  # cut off again below
            full = np.full((self.BATCH,), 1.0, np.float32)
            index, x_hat, x, valid = jax.device_get(
                self._run(self._variables, padded, full * np.float32(scale), full * np.float32(offset))
            )
            index, x_hat, x, valid = (a[: len(part)] for a in (index, x_hat, x, valid))
            value, truth = (np.asarray(depth.denormalise(a, self._config.range)) for a in (x_hat, x))
            self._pixels += valid.size
            self._masked += int((~valid).sum())
            kept = sidecar.token_validity(valid, self._config.grid)
            valid = valid & sidecar.token_pixels(kept, valid.shape[1])
            self._tokens.add(value, truth, valid)
            self._floor.add(self._metrics.constant_per_token(truth, valid, self._config.grid), truth, valid)
            self._usage += np.bincount(index[kept], minlength=self._config.num_codes)
            self._frames += len(part)
            self._invalid += int((~kept).sum())
            codes.append(np.where(kept, index, sidecar.INVALID_TOKEN).astype(np.uint16))
        return np.concatenate(codes)

    def result(self) -> dict:
        """Figures over everything encoded so far."""
        import numpy as np

        count = np.broadcast_to(self._usage, (self._config.num_codes,))
        return {
            "frames": self._frames,
            "masked_share": self._masked / max(self._pixels, 1),
            "invalid_tokens": self._invalid,
            "invalid_token_share": self._invalid / max(self._frames * self._config.grid**2, 1),
            **self._metrics.code_usage(np.repeat(np.arange(len(count)), count), len(count)),
            **self._tokens.result(),
            "constant_per_token": self._floor.result(),
        }


if __name__ == "__main__":
    command.run(main)
