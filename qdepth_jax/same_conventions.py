"""Whether parameters of an earlier model mean the same in this one: conventions that no shape of a leaf shows.

A wrong size is found by the shapes; a soft-cap, a time direction or a rotary base that differs is found by nobody: the
model trains, and starts from noise. So every field of the model's config is compared, except those known to be sizes
or choices of training: a convention that is added later is compared without anybody thinking of it.
"""

import dataclasses
import re
from typing import Any

import ml_collections

from qdepth_jax import errors, model_kinds

# Sizes (the shapes of leaves tell, or they change nothing in the parameters), and what only training or sampling uses.
_NO_CONVENTION = re.compile(
    r"siglip\.(image_size|patch|width|depth|heads|mlp)|(vlm|action)\.(width|mlp)|layers|vocabulary|views|image_steps"
    r"|missing_views|text_length|proprio_dim|proprio_steps|action_dim|action_used|horizon|depth"
    r"|depth\.(?!expert\.(rope_theta|adaptive|post_norms)).*|depth\.expert\.(width|mlp)"
    r"|flow\.(time|beta_a|time_max|steps|clip)|dtype|scan|remat|freeze_embedding|faithful|visibility(\..*)?"
    r"|positions\.depth"
)

# A policy starts from PaliGemma and caps, scales and counts in its own way, as open-pi-zero does: said, not refused.
_OWN_WAY = re.compile(r"softcap|positions\..*|vlm_final_norm")


def conventions(model: Any) -> dict[str, Any]:
    """Dotted field -> value of what a model config fixes beside sizes, for a model card and for comparing."""
    return {
        name: value for name, value in flat(dataclasses.asdict(model)).items() if not _NO_CONVENTION.fullmatch(name)
    }


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and value
        out |= flat(value, f"{above}{name}.") if inner else {above + name: value}
    return out


def check(where: str, there: dict[str, Any], here: Any) -> list[str]:
    """Compares a checkpoint's model with the one that is to start from it.

    Args:
      where: the checkpoint, for the message.
      there: its experiment config, JSON types.
      here: this experiment's model config.

    Returns:
      Differences that are no error, to be said: those between PaliGemma and a policy that starts from it.

    Raises:
      UserError: another kind of model that shares nothing, or conventions that differ, all of them.
    """
    saved = ml_collections.ConfigDict(there)
    other = model_kinds.model_config(saved)
    before, now = conventions(other), conventions(here)
    alike = type(other) is type(here)
    # Parts that only one of them has (a depth expert, the action expert that PaliGemma lacks) share no parameter.
    both = before.keys() & now.keys()
    names = {name for name in before.keys() | now.keys() if alike and not name.startswith("depth.")} | both
    found = [
        (name, f"{name}: {before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} here")
        for name in sorted(names)
        if before.get(name) != now.get(name)
    ]
    said = [] if alike else [line for name, line in found if _OWN_WAY.fullmatch(name)]
    wrong = [line for _, line in found if line not in said]
    rows = getattr(other, "vocabulary", None), getattr(here, "vocabulary", None)
    if None not in rows and rows[0] != rows[1]:
        wrong.append(
            f"vocabulary: {rows[0]:,} rows of the text embedding there, {rows[1]:,} here "
            f"({_missing_rows(*rows)}): set model.vocabulary={rows[0]}"
        )
    if wrong:
        raise errors.UserError(
            f"init_from={where!r} holds a {saved.model_kind} of other conventions: its parameters would mean something "
            "else in this model. Set the fields of config.model to what they are there, or start from another "
            "checkpoint:\n  " + "\n  ".join(wrong)
        )
    return said


def _missing_rows(there: int, here: int) -> str:
    """Which rows one has and the other lacks."""
    low, high = sorted((there, here))
    return f"ids {low:,} to {high - 1:,} only {'there' if there > here else 'here'}"
