"""Exports a trained model as a folder that a robot can load: weights, configs, statistics, tokenizers, model card.

  python tools/export_checkpoint.py --workdir=runs/libero_object --output=exports/libero_object
                                    [--noaverage] [--dtype=bfloat16] [--format=safetensors --shard_gb=5] [--step=N]

--workdir is one of a run, of imported weights (tools/import_weights.py) or an earlier export, local or in a bucket;
exported in float32 and again from there, the weight files are the same to the byte. Formats: `orbax` (sharded,
read onto any mesh; --config.init_from takes it too), `safetensors` (our names), `hf_paligemma` (the names of
transformers, for a PaliGemma), `open_pi_zero` and `open_pi_zero_pt` (that code base's names, as safetensors and as
model.pt with torch; only models that it can express).
Nothing is overwritten, nothing half-written stays. The last line of stdout is JSON.
"""

import json
import sys

from absl import flags

from qdepth_jax import command

_WORKDIR = flags.DEFINE_string("workdir", None, "the model: of a run, imported, or exported before", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write; must not exist", required=True)
_AVERAGE = flags.DEFINE_bool("average", True, "averaged parameters (EMA) where the run kept them")
_STEP = flags.DEFINE_integer("step", None, "checkpoint of this step; default: the newest")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of the parameters: float32 or bfloat16 (codebooks stay float32)")
_FORMAT = flags.DEFINE_string("format", "orbax", "orbax, safetensors, hf_paligemma, open_pi_zero, open_pi_zero_pt")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "largest weight file in 10^9 bytes (safetensors)", lower_bound=0)
_TEXT = flags.DEFINE_string("text_tokenizer", "", "SentencePiece model; default: where the run had it")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "workdir of the depth tokenizer; default: where the run had it")
_WITH_DEPTH = flags.DEFINE_bool("depth_tokenizer", True, "include the depth tokenizer, which decodes predicted depth")
_ORIGIN = flags.DEFINE_list(
    "derived_from", [], "formats of foreign weights behind the model (big_vision, openpi, ...) that its own records do "
    "not name; NOTICE.md names their terms beside the recorded ones",
)  # fmt: skip


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors, export_model

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: flags are --workdir, --output, --format, ...")
    options = export_model.Options(
        average=_AVERAGE.value,
        step=_STEP.value,
        dtype=_DTYPE.value,
        format=_FORMAT.value,
        shard_bytes=int(_SHARD_GB.value * 10**9),
        text_tokenizer=_TEXT.value,
        tokenizer=_TOKENIZER.value,
        without_depth_tokenizer=not _WITH_DEPTH.value,
        origin=tuple(_ORIGIN.value),
    )
    summary = export_model.write_export(
        _WORKDIR.value, _OUTPUT.value, options, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    command.run(main)
