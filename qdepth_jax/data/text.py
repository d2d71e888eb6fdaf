"""Instructions to token ids, by PaliGemma's rules: bos, the text as it is, a newline; padded on the right with 0.

The instruction is used raw (no lower-casing, no prompt template) and the newline is tokenised together with it. An
instruction that does not fit the budget is an error, not a cut: a cut loses the newline that the model was trained on.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import sentencepiece

from qdepth_jax import errors

PAD, EOS, BOS, UNK = 0, 1, 2, 3


class TextTokenizer:
    """A SentencePiece model with PaliGemma's special ids (pad 0, eos 1, bos 2, unk 3)."""

    def __init__(self, model_path: str):
        if not os.path.isfile(model_path):
            raise errors.UserError(
                f"no text tokenizer at {model_path!r}: give a SentencePiece model (data.text_tokenizer), for instance "
                "data/text_tokenizer/libero.model or PaliGemma's paligemma_tokenizer.model"
            )
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(model_path)
        except (RuntimeError, OSError) as error:
            raise errors.UserError(f"{model_path} is not a SentencePiece model ({error}); copy it again") from error
        self.path = model_path
        with open(model_path, "rb") as file:
            self.identity = hashlib.sha256(file.read()).hexdigest()[:16]
        ids = (self._model.pad_id(), self._model.eos_id(), self._model.bos_id(), self._model.unk_id())
        if ids != (PAD, EOS, BOS, UNK):
            raise errors.UserError(
                f"{model_path} has (pad, eos, bos, unk) = {ids}, PaliGemma's are {(PAD, EOS, BOS, UNK)}: train it with "
                "tools/train_text_tokenizer.py or take PaliGemma's own"
            )

    @property
    def vocabulary(self) -> int:
        """Number of ids; the text embedding must have at least as many rows."""
        return self._model.GetPieceSize()

    def encode(self, instruction: str) -> list[int]:
        """bos + ids of instruction and newline, not padded."""
        return [BOS, *self._model.EncodeAsIds(instruction + "\n")]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; padding and bos left out."""
        return self._model.DecodeIds([int(i) for i in ids if i not in (PAD, BOS)])

    def encode_table(self, instructions: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises a table of distinct instructions once.

        Returns:
          ids i32 [n, max_tokens], padded with 0, and the number of unknown tokens of each, i64 [n].

        Raises:
          UserError: an instruction needs more than `max_tokens` ids.
        """
        rows = [self.encode(text) for text in instructions]
        longest = max(range(len(rows)), key=lambda i: len(rows[i]), default=None)
        if longest is not None and len(rows[longest]) > max_tokens:
            over = sum(len(row) > max_tokens for row in rows)
            raise errors.UserError(
                f"{over} of {len(rows)} instructions exceed data.max_text_tokens={max_tokens}; the longest has "
                f"{len(rows[longest])} tokens: {instructions[longest]!r}. "
                f"Set data.max_text_tokens={len(rows[longest])} or more (of a policy: model.text_length)."
            )
        table = np.zeros((len(rows), max_tokens), np.int32)
        for number, row in enumerate(rows):
            table[number, : len(row)] = row
        return table, (table == UNK).sum(1)
