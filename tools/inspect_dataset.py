"""Writes a page that shows an RLDS data set: contents, statistics, frames, depth, instructions, and what looks odd.

  python tools/inspect_dataset.py DATASET_DIR [--output=DIR] [--split=train] [--episodes=6] [--depth=SIDECAR]
      [--tokenizer=WORKDIR [--depth_tokens=SIDECAR]]

DATASET_DIR holds features.json and dataset_info.json (or is the parent of the one version that does). The page is one
HTML file without anything from the network. A data set without a definition gets one too, of its raw columns. The last
line of stdout is JSON: the page, the warnings, counts.
"""

import json
import os

from absl import flags

from qdepth_jax import command

_OUTPUT = flags.DEFINE_string("output", "", "folder of the page; default: runs/inspect")
_SPLIT = flags.DEFINE_string("split", "", "split to show; default: train, or the first one")
_EPISODES = flags.DEFINE_integer("episodes", 6, "episodes drawn, spread over the split", lower_bound=0)
_HORIZON = flags.DEFINE_integer("horizon", 4, "action chunk; shorter episodes are named", lower_bound=1)
_NAME = flags.DEFINE_string("name", "", "definition to use; default: the name in dataset_info.json")
_DEPTH = flags.DEFINE_string("depth", "", "depth annotation sidecar; default: the data set's own depth images")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "workdir of a trained depth tokenizer: shows reconstructions")
_TOKENS = flags.DEFINE_string("depth_tokens", "", "token sidecar; default: the one beside the tokenizer, if any")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: DATASET_DIR/qdepth_index")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors, progress
    from qdepth_jax.data import index, spec
    from qdepth_jax.eval import data_facts, inspect

    if len(argv) != 2:
        raise errors.UserError(f"usage: inspect_dataset.py DATASET_DIR [--output=DIR] (got {argv[1:]})")
    dataset = spec.read_spec(argv[1])
    bar = progress.Progress(index.total_bytes(dataset), f"indexing {dataset.name}", unit="B")
    subject = data_facts.open_subject(
        argv[1],
        split=_SPLIT.value,
        name=_NAME.value,
        index_dir=_INDEX_DIR.value,
        on_shard=lambda shard, size: bar.update(size, shard),
    )
    bar.close()
    options = inspect.Options(
        episodes=_EPISODES.value,
        horizon=_HORIZON.value,
        depth=_DEPTH.value,
        tokenizer=_TOKENIZER.value,
        depth_tokens=_TOKENS.value,
    )
    print(json.dumps(inspect.write(subject, _OUTPUT.value or os.path.join("runs", "inspect"), options)))


if __name__ == "__main__":
    command.run(main)
