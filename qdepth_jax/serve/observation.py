"""What a request may hold, and how it becomes a row for the planner. The table of keys is openpi's, and can be renamed.

A request is one map: pictures, state and prompt under the names in `Keys`, and these options:

  seed         whole number, or [seed, call]: the noise of this plan; without it every request draws anew
  rtc/prefix   f32 [k, A]: actions left of the chunk being executed, the next one first: the new chunk continues them
  rtc/frozen   whole number <= k: how many of them will be executed before the answer is used; these come back exactly
  depth        true: also answer with the depth that the policy believes in (a server with --depth)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from qdepth_jax import errors, planner
from qdepth_jax.data import normalise
from qdepth_jax.models import images
from qdepth_jax.serve import protocol
from qdepth_jax.sim import actions

SEED, PREFIX, FROZEN, DEPTH = "seed", "rtc/prefix", "rtc/frozen", "depth"
OPTIONS = (SEED, PREFIX, FROZEN, DEPTH)

# view -> key. openpi's LIBERO robots send the first two; its data sets call a robot's only wrist camera the left one.
VIEW_KEYS = {"main": "observation/image", "wrist": "observation/wrist_image", "left_wrist": "observation/wrist_image"}
MAX_PROMPT = 4096  # characters
# An old action or a state may be so many times as large as the largest of the training data, or as 1, which grippers
# are sent: what a policy says and a robot is stays far below, whatever the normalisation; what does not would make the
# plans of everybody in its batch infinite.
LARGEST = 10.0


@dataclasses.dataclass(frozen=True)
class Keys:
    """Names of the entries. views: view -> key; state, prompt: keys."""

    views: dict[str, str]
    state: str = "observation/state"
    prompt: str = "prompt"


@dataclasses.dataclass(frozen=True)
class Units:
    """What numbers mean on the robot's side: from and to standardised actions f32 [Z, A]."""

    meaning: str
    outgoing: Callable[[np.ndarray], np.ndarray]
    incoming: Callable[[np.ndarray], np.ndarray]


UNITS = {
    "libero": Units(
        "LIBERO's: end-effector motion dx dy dz droll dpitch dyaw in [-1, 1], gripper -1 open, +1 close",
        actions.to_libero,
        actions.from_libero,
    ),
    "standard": Units(
        "as the data set was standardised for training, in its own units (gripper 1 open, 0 closed)",
        lambda chunk: chunk.astype(np.float32),
        lambda chunk: chunk,
    ),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """row: for the planner. prefix: frozen actions f32 [frozen, A], as the robot sent them. depth: wanted too."""

    row: planner.Row
    prefix: np.ndarray
    depth: bool


def units_of(dataset: str) -> str:
    """Name of the row of UNITS for a data set's robot."""
    return "libero" if dataset.startswith("libero") else "standard"


def keys_of(views: tuple[str, ...], renamed: list[str]) -> Keys:
    """The table of keys for a policy's views, with `NAME=KEY` replaced; NAME is a view, `state` or `prompt`.

    Raises:
      UserError: an unknown name, or one key for two things.
    """
    table = {view: VIEW_KEYS.get(view, f"observation/{view}_image") for view in views}
    table |= {"state": "observation/state", "prompt": "prompt"}
    for item in renamed:
        name, equals, key = item.partition("=")
        if not equals or not key or name not in table:
            raise errors.UserError(f"--keys has {item!r}: write NAME=KEY with NAME one of {', '.join(table)}")
        table[name] = key
    names = [*table.values(), *OPTIONS]
    if twice := sorted({key for key in names if names.count(key) > 1}):
        raise errors.UserError(f"--keys gives {', '.join(twice)} to two things: rename one of {', '.join(table)}")
    return Keys({view: table[view] for view in views}, table["state"], table["prompt"])


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns messages into requests. max_side: of a picture, pixels. depth, rtc: the server has programs for them.
    ignored: keys that may come and are not looked at."""

    planner: planner.Planner
    keys: Keys
    units: Units
    max_side: int
    depth: bool
    rtc: bool
    ignored: tuple[str, ...] = ()

    def __post_init__(self):
        if useless := sorted(set(self.ignored) & set(self.known)):
            raise errors.UserError(f"--ignore={','.join(useless)}: this server reads {_list(useless)}; leave it out")

    @property
    def known(self) -> list[str]:
        """Keys that are read."""
        return [*self.keys.views.values(), self.keys.state, self.keys.prompt, *OPTIONS]

    @property
    def dims(self) -> int:
        """Numbers of a state."""
        return self.planner.proprio.statistics.dims

    def read(self, message: dict[str, Any], seed: int, call: int) -> Request:
        """One request; seed and call are those of its noise where it names none.

        Raises:
          UserError: says what is expected and what came.
        """
        config, keys = self.planner.config, self.keys
        if unknown := sorted(set(message) - set(self.known) - set(self.ignored)):
            raise errors.UserError(
                f"unknown keys {_list(unknown)}: this server reads {_list(self.known)}; a server started with "
                "--ignore=KEY,KEY lets such keys pass unread"
            )
        there = {view: key for view, key in keys.views.items() if key in message}
        needed = [keys.state, keys.prompt, *([] if config.missing_views else keys.views.values())]
        missing = [key for key in needed if key not in message]
        if missing or not there:
            need = missing or list(keys.views.values())
            raise errors.UserError(f"the observation lacks {_list(need)}; it has {_list(sorted(message))}")
        # On the host: a program for each size that a robot may come with would be compiled while the others wait.
        side = config.siglip.image_size
        pictures = {view: images.resize_on_host(self._picture(key, message[key]), side) for view, key in there.items()}
        prefix, frozen = self._prefix(message)
        seed, call = _seed(message[SEED]) if SEED in message else (seed, call)
        depth = _option(message, DEPTH, False)
        if not isinstance(depth, bool | np.bool_):
            raise errors.UserError(f"{DEPTH!r} must be true or false, got {protocol.described(depth)}")
        if depth and not self.depth:
            raise errors.UserError("this server does not say depth: start it with --depth")
        row = planner.make_row(
            self.planner, pictures, self._state(message[keys.state]), self._prompt(message[keys.prompt]), seed, call,
            None if prefix is None else self.units.incoming(prefix), frozen,
        )  # fmt: skip
        return Request(row, np.zeros((0, 0), np.float32) if prefix is None else prefix[:frozen], bool(depth))

    def actions(self, request: Request, standard: np.ndarray) -> np.ndarray:
        """Standardised actions f32 [Z, A] as the robot gets them; what is frozen goes back as it came."""
        out = self.units.outgoing(standard)
        out[: len(request.prefix)] = request.prefix if len(request.prefix) else out[:0]
        return out

    def _picture(self, key: str, value: Any) -> np.ndarray:
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
            hint = ""
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                hint = " (openpi_client.image_tools.convert_to_uint8 converts pictures in [0, 1])"
            raise errors.UserError(
                f"{key!r} must be uint8 [height, width, 3] with values 0 to 255, got {protocol.described(value)}{hint}"
            )
        if value.ndim != 3 or value.shape[2] != 3:
            hint = " (channels come last)" if value.ndim == 3 and value.shape[0] == 3 else ""
            raise errors.UserError(f"{key!r} must be uint8 [height, width, 3], got {protocol.described(value)}{hint}")
        if not 8 <= min(value.shape[:2]) <= max(value.shape[:2]) <= self.max_side:
            raise errors.UserError(
                f"{key!r} must have sides of 8 to {self.max_side} pixels (--max_side), got {list(value.shape)}"
            )
        return value

    def _state(self, value: Any) -> np.ndarray:
        key = self.keys.state
        state = _numbers(key, value, f"[{self.dims}]")
        if state.shape != (self.dims,):
            raise errors.UserError(
                f"{key!r} must be [{self.dims}], the state of {self.planner.dataset}, got {protocol.described(value)}"
            )
        self._check_size(key, state, self.planner.proprio, "states")
        return state

    def _check_size(self, key: str, array: np.ndarray, known: normalise.Normaliser, what: str) -> None:
        limit = LARGEST * max(np.abs([known.statistics.low, known.statistics.high]).max(), 1.0)
        largest = array.flat[np.abs(array).argmax()]
        if abs(largest) > limit:
            raise errors.UserError(
                f"{key!r} holds {largest:g}; {what} of {self.planner.dataset} are let in from {-limit:g} to {limit:g}: "
                "are the units those of the data set?"
            )

    def _prompt(self, value: Any) -> str:
        if not isinstance(value, str):
            raise errors.UserError(f"{self.keys.prompt!r} must be text, got {protocol.described(value)}")
        if not value.strip() or len(value) > MAX_PROMPT:
            raise errors.UserError(
                f"{self.keys.prompt!r} must be an instruction of 1 to {MAX_PROMPT} characters, got {len(value)}"
            )
        return value

    def _prefix(self, message: dict[str, Any]) -> tuple[np.ndarray | None, int]:
        config = self.planner.config
        if PREFIX not in message:
            if FROZEN in message:
                raise errors.UserError(f"{FROZEN!r} needs {PREFIX!r}: the actions that are frozen")
            return None, 0
        if not self.rtc:
            raise errors.UserError("this server does no real-time chunking: start it with --rtc=inpaint or guided")
        prefix = _numbers(PREFIX, message[PREFIX], f"[k, {config.robot_action_dim}]")
        if prefix.ndim != 2 or not 1 <= len(prefix) <= config.horizon or prefix.shape[1] != config.robot_action_dim:
            raise errors.UserError(
                f"{PREFIX!r} must be [k, {config.robot_action_dim}] with 1 <= k <= {config.horizon}, the actions left, "
                f"got {list(prefix.shape)}"
            )
        self._check_size(PREFIX, prefix, self.planner.action, "actions")
        frozen = _whole(FROZEN, _option(message, FROZEN, len(prefix)))
        if frozen > len(prefix):
            raise errors.UserError(f"{FROZEN!r} is {frozen}, but {PREFIX!r} has {len(prefix)} actions only")
        return prefix, frozen


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _option(message: dict[str, Any], key: str, default: Any) -> Any:
    value = message.get(key, default)
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
        raise errors.UserError(f"{key!r} must be a whole number from 0 to 4294967295, got {protocol.described(value)}")
    return int(value)


def _seed(value: Any) -> tuple[int, int]:
    # Only then: a few bytes of a frame can declare more empty lists than there is memory.
    value = value.tolist() if isinstance(value, np.ndarray) and value.shape in ((), (2,)) else value
    if not isinstance(value, list | np.ndarray):
        return _whole(SEED, value), 0
    if len(value) != 2:
        raise errors.UserError(f"{SEED!r} must be a whole number or [seed, call], got {protocol.described(value)}")
    return _whole(SEED, value[0]), _whole(SEED, value[1])


def _numbers(key: str, value: Any, shape: str) -> np.ndarray:
    """f32 array of an array or of lists of numbers; finite."""
    try:
        # NumPy would give every item of a list the room of its longest text.
        array = np.asarray(value) if _are_numbers(value, 2) else value
    except ValueError as error:  # lists of different lengths
        raise errors.UserError(f"{key!r} must be numbers {shape}, got {protocol.described(value)}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise errors.UserError(f"{key!r} must be numbers {shape}, got {protocol.described(value)}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise errors.UserError(f"{key!r} holds numbers that are not finite")
    return array


def _are_numbers(value: Any, dims: int) -> bool:
    """Whether it is a list of numbers, or of such lists, with at most `dims` dimensions."""
    if not isinstance(value, list):
        return False
    return all(
        isinstance(item, int | float | np.integer | np.floating) or (dims > 1 and _are_numbers(item, dims - 1))
        for item in value
    )
