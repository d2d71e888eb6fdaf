"""A trained policy against held-out frames, without a simulator: action error, depth tokens, depth in metres.

  python tools/evaluate_offline.py --policy=WORKDIR [--tokenizer=WORKDIR] [--batches=16] [--output=FILE.json]

Each figure stands beside its baseline: the mean action and the action before, the most frequent code of each position,
the mean depth map of the training data. --tokenizer turns predicted codes into depth and says which pixels count; it
must be the one of the policy. The last line of stdout is JSON.
"""

import json

from absl import flags

from qdepth_jax import command

_POLICY = flags.DEFINE_string("policy", None, "workdir of a trained policy", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "workdir of its depth tokenizer")
_BATCHES = flags.DEFINE_integer("batches", 16, "batches of 32 held-out frames (at most one pass)", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "file for the figures, too")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors, files
    from qdepth_jax.eval import held_out

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    found = held_out.figures(_POLICY.value, _BATCHES.value, _TOKENIZER.value)
    text = json.dumps(found)
    if _OUTPUT.value:
        files.write_whole(_OUTPUT.value, text + "\n")
    print(text)


if __name__ == "__main__":
    command.run(main)
