"""Trains a small SentencePiece model on the instructions of data sets, with PaliGemma's special ids.

  python tools/train_text_tokenizer.py DATASET_DIR... --texts=FILE --output=PATH.model

For models trained from scratch on few instructions, where PaliGemma's 257,152 words would be nearly all dead weight.
Bytes are pieces too, so no text is ever unknown. The newline is one piece. The last line of stdout is JSON.
"""

import io
import json
import os

from absl import flags

from qdepth_jax import command

_OUTPUT = flags.DEFINE_string("output", None, "model file to write", required=True)
_TEXTS = flags.DEFINE_string("texts", "", "a text file with further instructions, one per line")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 600, "number of ids, the 256 bytes included")
_NAME = flags.DEFINE_string("name", "", "definition of the data sets; default: the name in dataset_info.json")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside the data set")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing model")


def main(argv: list[str]) -> int:
    print(json.dumps(train(argv[1:])))
    return 0


def train(directories: list[str]) -> dict:
    """Trains and writes the model; returns the summary."""
    # Heavy imports only now: --help answers at once.
    import sentencepiece

    from qdepth_jax import errors, files
    from qdepth_jax.data import text

    instructions = sorted(collect(directories))
    if not instructions:
        raise errors.UserError("no instruction to train on: name data sets or --texts=FILE")
    if os.path.exists(_OUTPUT.value) and not _OVERWRITE.value:
        raise errors.UserError(f"{_OUTPUT.value} exists: choose another --output or pass --overwrite")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(instructions),
            model_writer=model,
            model_type="bpe",
            vocab_size=_VOCABULARY.value,
            character_coverage=1.0,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            pad_id=text.PAD,
            eos_id=text.EOS,
            bos_id=text.BOS,
            unk_id=text.UNK,
            # The text as it is: no folding, no stripping, no space put before it.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            num_threads=1,  # same input, same model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise errors.UserError(f"SentencePiece refused ({error}): change --vocabulary={_VOCABULARY.value}") from error
    os.makedirs(os.path.dirname(os.path.abspath(_OUTPUT.value)), exist_ok=True)
    files.write_whole(_OUTPUT.value, model.getvalue())
    tokenizer = text.TextTokenizer(_OUTPUT.value)
    lengths = {instruction: len(tokenizer.encode(instruction)) for instruction in instructions}
    longest = max(lengths, key=lengths.get)
    return {
        "model": _OUTPUT.value,
        "bytes": len(model.getvalue()),
        "identity": tokenizer.identity,
        "vocabulary": tokenizer.vocabulary,
        "instructions": len(instructions),
        "longest_tokens": lengths[longest],
        "longest": longest,
        "unknown": sum(text.UNK in tokenizer.encode(instruction) for instruction in instructions),
    }


def collect(directories: list[str]) -> set[str]:
    """Distinct instructions of all splits of the data sets and of --texts."""
    from qdepth_jax import errors
    from qdepth_jax.data import definitions, index, source

    found: set[str] = set()
    for directory in directories:
        opened = index.open_index(directory, _INDEX_DIR.value)
        index.say_warnings(opened)
        definition = definitions.find(_NAME.value or opened.dataset.name)
        for split in opened.splits.values():
            for name in source.present_instructions(opened, definition):
                found |= set(split.texts(name)[1])
    if _TEXTS.value:
        if not os.path.isfile(_TEXTS.value):
            raise errors.UserError(f"no file {_TEXTS.value} (--texts)")
        with open(_TEXTS.value, encoding="utf-8") as file:
            found |= set(file.read().splitlines())
    return {instruction for instruction in found if instruction.strip()}


if __name__ == "__main__":
    command.run(main)
