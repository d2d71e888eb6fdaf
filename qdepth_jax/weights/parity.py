"""What the comparisons with golden vectors share: the rows of the result, and reading a file's description.

A golden vector is a `.npz` with the weights of a small model of another code base, inputs, and the outputs that code
gave. One module for each layout: parity_open_pi_zero, parity_openpi, parity_paligemma.
"""

import json
from typing import NamedTuple

import numpy as np

from qdepth_jax import errors


class Row(NamedTuple):
    """One compared output: equal if error <= tolerance (a NaN never is). kind says what the error is."""

    name: str
    error: float
    tolerance: float
    kind: str

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def absolute(name: str, ours, theirs: np.ndarray, tolerance: float, where: np.ndarray | None = None) -> Row:
    """Largest absolute error, of the entries where `where` is True (leading axes; None = all).

    Raises:
      UserError: shapes differ, or nothing is left to compare.
    """
    ours = np.asarray(ours)
    if ours.shape != theirs.shape:
        raise errors.UserError(f"{name}: the file's shape {theirs.shape} is not the model's {ours.shape}")
    difference = np.abs(ours - theirs)
    if where is not None:
        difference = difference[where]
    if not difference.size:
        raise errors.UserError(f"{name}: the file has nothing valid to compare")
    return Row(name, float(np.max(difference)), tolerance, "absolute")


def relative(name: str, ours: float, theirs: float, tolerance: float) -> Row:
    """Error of a scalar as a share of theirs."""
    return Row(name, abs(ours - theirs) / abs(theirs), tolerance, "relative")


def description(arrays: dict[str, np.ndarray], key: str) -> dict:
    """The JSON text under `key`.

    Raises:
      UserError: it is no JSON object.
    """
    try:
        found = json.loads(str(arrays[key]))
    except json.JSONDecodeError as error:
        raise errors.UserError(f"the file's {key} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.UserError(f"the file's {key} must be a JSON object, not {type(found).__name__}")
    return found
