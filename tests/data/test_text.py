"""Text tokens by PaliGemma's rules, on the small tokenizer that ships."""

import pathlib

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.data import index, text

ROOT = pathlib.Path(__file__).parents[2] / "data" / "text_tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return text.TextTokenizer(str(ROOT / "libero.model"))


def test_rows_are_bos_text_newline_padding(tokenizer):
    instructions = (ROOT / "libero_instructions.txt").read_text().splitlines()
    rows, unknown = tokenizer.encode_table(instructions, 24)
    newline = tokenizer.encode("")[1]
    assert rows.shape == (len(instructions), 24) and rows.dtype == np.int32 and not unknown.any()
    for row, instruction in zip(rows, instructions):
        length = int((row != text.PAD).sum())
        assert row[0] == text.BOS and row[length - 1] == newline and not row[length:].any()
        assert (row == newline).sum() == 1 and row.max() < tokenizer.vocabulary
        assert tokenizer.decode(row) == instruction + "\n"


def test_text_is_taken_as_it_is(tokenizer):
    for instruction in ("Pick UP  the cup ", "", "Öl in den Topf", "a\tb"):
        assert tokenizer.decode(tokenizer.encode(instruction)) == instruction + "\n"
        assert text.UNK not in tokenizer.encode(instruction)


def test_too_long_names_instruction_count_and_fix(tokenizer):
    long = "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate"
    with pytest.raises(errors.UserError, match=f"21 tokens: '{long}'. Set data.max_text_tokens=21"):
        tokenizer.encode_table(["open the door", long], 20)
    assert tokenizer.encode_table([long], 21)[0].all()


def test_rules_of_both_code_bases(tokenizer):
    for plain in ("pick up the black bowl", "open the top drawer"):
        assert tokenizer.encode(plain, "openpi") == tokenizer.encode(plain, "raw")
    odd = " put_the cup\nhere "
    # openpi's PaligemmaTokenizer: strip, "_" and newline to spaces, then "\n" as a token of its own.
    assert tokenizer.decode(tokenizer.encode(odd, "openpi")) == "put the cup here\n"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd + "\n"
    ids, _ = tokenizer.encode_table([odd], 24, "openpi")
    assert ids[0, 0] == text.BOS and ids[0, len(tokenizer.encode(odd, "openpi")) - 1] == tokenizer.encode("")[1]
    with pytest.raises(errors.UserError, match="'lower' is unknown: use one of"):
        tokenizer.encode("x", "lower")


def test_state_in_the_prompt_is_pi05_s():
    # Bins of np.digitize over 256 edges from -1: -1 is bin 0, 0 is 128, 1 is 255; outside they end.
    prompt = text.prompt_with_state("pick_up the cup\n", np.asarray([-1.0, 0.0, 1.0, -1.5, 0.5], np.float32))
    assert prompt == "Task: pick up the cup, State: 0 128 255 -1 192;\nAction: "


def test_a_prompt_ends_as_it_says(tokenizer):
    prompt = text.prompt_with_state("open the drawer", np.zeros(2))
    assert tokenizer.encode_prompt(prompt)[0] == text.BOS
    assert tokenizer.decode(tokenizer.encode_prompt(prompt)) == prompt


def test_identity_is_of_the_file_s_content(tokenizer, tmp_path):
    copy = tmp_path / "other_name.model"
    copy.write_bytes((ROOT / "libero.model").read_bytes())
    assert tokenizer.identity == text.file_identity(str(copy)) == text.TextTokenizer(str(copy)).identity
    assert len(tokenizer.identity) == 16


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(errors.UserError, match="not a SentencePiece model"):
        text.TextTokenizer(str(tmp_path / "x.model"))
    for missing in (str(tmp_path / "y.model"), str(tmp_path), ""):
        with pytest.raises(errors.UserError, match=r"no text tokenizer at .*gs://big_vision/paligemma_tokenizer.model"):
            text.TextTokenizer(missing)


@pytest.mark.parametrize("name", ["libero_object", "libero_spatial"])
def test_instructions_of_the_shipped_sample_are_known(tokenizer, name, tmp_path):
    opened = index.open_index(ROOT.parent / name, str(tmp_path))
    trained_on = set((ROOT / "libero_instructions.txt").read_text().splitlines())
    for split in opened.splits.values():
        _, instructions = split.texts("steps/language_instruction")
        assert instructions and set(instructions) <= trained_on
        assert not tokenizer.encode_table(instructions, 24)[1].any()
