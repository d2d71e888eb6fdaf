"""Instructions to token ids, by PaliGemma's rules: bos, the text, a newline; padded on the right with 0.

Two code bases write the text differently (RULES): open-pi-zero takes it raw and tokenises the newline together with it;
openpi (pi0) strips it, turns underscores and newlines inside into spaces, and adds the newline as a token of its own.
Neither lower-cases or uses a template; for a plain instruction both give the same ids. The third rule is pi0.5's: the
state stands in the text, see `prompt_with_state`. An instruction that does not fit the budget is an error, not a cut:
a cut loses the newline that the model was trained on.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import sentencepiece
from etils import epath

from qdepth_jax import errors

PAD, EOS, BOS, UNK = 0, 1, 2, 3
RULES = ("raw", "openpi", "openpi_state")

# A missing file is the first thing that a new user meets.
WHERE = (
    "PaliGemma's own is public: download gs://big_vision/paligemma_tokenizer.model (4 MB, also at "
    "storage.googleapis.com/big_vision/paligemma_tokenizer.model; the tokenizer.model of google/paligemma-3b-pt-224 on "
    "Hugging Face serves too) and set data.text_tokenizer to its path. The demo's small one is "
    "data/text_tokenizer/libero.model; tools/train_text_tokenizer.py makes another"
)


def file_identity(path: str) -> str:
    """16 hex digits of a tokenizer file's SHA-256: recorded with every checkpoint, compared on resume and export."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()[:16]


def prompt_with_state(instruction: str, state: np.ndarray) -> str:
    """pi0.5's prompt: the state, f32 [D] normalised to [-1, 1], as 256 bins in the text (openpi, tokenizer.py)."""
    bins = np.digitize(np.asarray(state), np.linspace(-1, 1, 257)[:-1]) - 1
    return f"Task: {_cleaned(instruction)}, State: {' '.join(map(str, bins.tolist()))};\nAction: "


def _cleaned(instruction: str) -> str:
    return instruction.strip().replace("_", " ").replace("\n", " ")


class TextTokenizer:
    """A SentencePiece model with PaliGemma's special ids (pad 0, eos 1, bos 2, unk 3)."""

    def __init__(self, model_path: str):
        try:
            content = epath.Path(model_path).read_bytes() if model_path else None
        except (FileNotFoundError, IsADirectoryError):
            content = None
        if content is None:
            raise errors.UserError(f"no text tokenizer at {model_path!r}, a SentencePiece model is needed. {WHERE}")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise errors.UserError(f"{model_path} is not a SentencePiece model ({error}); copy it again") from error
        self.path, self.identity = model_path, hashlib.sha256(content).hexdigest()[:16]
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

    def encode(self, instruction: str, rule: str = "raw", state: np.ndarray | None = None) -> list[int]:
        """bos + ids of instruction and newline, not padded; `rule` is one of RULES.

        `state`, f32 [D] normalised to [-1, 1], is read by the rule "openpi_state" alone.

        Raises:
          UserError: an unknown rule.
        """
        if rule == "raw":
            return [BOS, *self._model.EncodeAsIds(instruction + "\n")]
        if rule == "openpi":
            return [BOS, *self._model.EncodeAsIds(_cleaned(instruction)), *self._model.EncodeAsIds("\n")]
        if rule == "openpi_state":
            if state is None:
                raise ValueError("the rule 'openpi_state' needs the state")
            return self.encode_prompt(prompt_with_state(instruction, state))
        raise errors.UserError(f"text rule {rule!r} is unknown: use one of {RULES}")

    def encode_prompt(self, text: str) -> list[int]:
        """bos + ids of a whole prompt that says itself how it ends (`prompt_with_state`)."""
        return [BOS, *self._model.EncodeAsIds(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; padding and bos left out."""
        return self._model.DecodeIds([int(i) for i in ids if i not in (PAD, BOS)])

    def encode_table(
        self,
        instructions: Sequence[str],
        max_tokens: int,
        rule: str = "raw",
        states: np.ndarray | Sequence[None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises a table of instructions.

        Args:
          instructions: n texts.
          max_tokens: length of a row.
          rule: one of RULES.
          states: f32 [n, D] for the rule "openpi_state", one for each instruction.

        Returns:
          ids i32 [n, max_tokens], padded with 0, and the number of unknown tokens of each, i64 [n].

        Raises:
          UserError: an instruction needs more than `max_tokens` ids.
        """
        states = [None] * len(instructions) if states is None else states
        rows = [self.encode(text, rule, state) for text, state in zip(instructions, states, strict=True)]
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
