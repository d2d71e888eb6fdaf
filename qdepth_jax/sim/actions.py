"""Actions as policies are trained on them (data/recipes.py) and as simulators take them."""

import numpy as np


def to_libero(actions: np.ndarray) -> np.ndarray:
    """Standardised actions f32 [Z, 7] (gripper 1 open, 0 closed) to LIBERO's (gripper -1 open, +1 close)."""
    gripper = np.where(actions[:, 6:] > 0.5, -1.0, 1.0)
    return np.concatenate([np.clip(actions[:, :6], -1.0, 1.0), gripper], axis=1).astype(np.float32)


def from_libero(actions: np.ndarray) -> np.ndarray:
    """LIBERO's actions f32 [Z, 7] back to standardised ones: inverse of `to_libero` for what it gives."""
    return np.concatenate([actions[:, :6], (1.0 - actions[:, 6:]) / 2.0], axis=1).astype(np.float32)


def to_metaworld(actions: np.ndarray) -> np.ndarray:
    """Actions f32 [Z, 4] as Meta-World's demonstrations store them: motion and gripper effort (+1 closes), clipped.

    The effort is no position, so it is not turned into 1 open, 0 closed.
    """
    return np.clip(actions, -1.0, 1.0).astype(np.float32)
