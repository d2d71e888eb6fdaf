"""What the server serves: a planner behind `prepare` and `run`, its metadata, and the programs compiled beforehand.

Nothing here knows of sockets: `prepare` turns a frame into a request, `run` a batch of requests into answers.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import qdepth_jax
from qdepth_jax import errors, planner
from qdepth_jax.models import inference, real_time
from qdepth_jax.serve import observation, protocol


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes:
    dataset: whose robot is driven, "" where the policy knows only one. keys: NAME=KEY, see observation.keys_of.
    units: of observation.UNITS, "" = the data set's.
    batch_sizes: programs that are compiled. max_side: of a picture.
    depth: answer with depth where asked. seed: of requests that bring none.
    rtc: of real_time.VARIANTS, or "off": half as many programs to compile.
    how: steps and solver of the flow, and how weights are held.
    ignore: keys that clients may send and nobody looks at.
    """

    dataset: str = ""
    units: str = ""
    keys: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    max_side: int = 1024
    depth: bool = False
    rtc: str = "inpaint"
    seed: int = 0
    how: inference.Inference = inference.Inference()
    ignore: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.batch_sizes or sorted(set(self.batch_sizes)) != list(self.batch_sizes) or self.batch_sizes[0] < 1:
            raise errors.UserError(f"--batch_sizes={self.batch_sizes}: rising numbers from 1 on, for example 1,2,4,8")
        if self.units and self.units not in observation.UNITS:
            raise errors.UserError(f"--units={self.units} is unknown: use one of {', '.join(observation.UNITS)}")
        if self.rtc not in (*real_time.VARIANTS, "off"):
            raise errors.UserError(f"--rtc={self.rtc} is unknown: use one of {', '.join(real_time.VARIANTS)}, off")
        if self.rtc != "off":
            real_time.check_solver(self.rtc, self.how.solver)
        if not 0 <= self.seed < 1 << 32:
            raise errors.UserError(f"--seed={self.seed}: a whole number from 0 to 4294967295")
        if self.max_side < 8:
            raise errors.UserError(f"--max_side={self.max_side} is smaller than the smallest picture, 8")


class Service:
    """One policy, ready to answer."""

    def __init__(self, path: str, options: Options):
        loaded = planner.load(path, options.dataset, options.depth, options.how)
        units = options.units or observation.units_of(loaded.dataset)
        if units == "libero" and loaded.config.robot_action_dim != 7:
            raise errors.UserError(f"LIBERO's actions have 7 numbers, this policy's {loaded.config.robot_action_dim}")
        keys = observation.keys_of(loaded.config.views, list(options.keys))
        self.options, self.planner = options, loaded
        self.reader = observation.Reader(
            loaded, keys, observation.UNITS[units], options.max_side, options.depth, self.rtc, options.ignore
        )
        # A whole observation of the largest pictures, ignored ones too, and as much again for numbers and text as they
        # can need.
        self.max_frame = (len(keys.views) + len(options.ignore)) * 3 * options.max_side**2 + (1 << 18)
        self._calls = 0

    @property
    def rtc(self) -> bool:
        """Whether chunks can be continued."""
        return self.options.rtc != "off"

    def prepare(self, frame: bytes) -> observation.Request:
        """A request from a frame. Called in one thread at a time.

        Raises:
          UserError: what is wrong with it.
        """
        message = protocol.unpack(frame)
        request = self.reader.read(message, self.options.seed, self._calls)
        # Only a sound request without a seed takes a number: the n-th such plan of a server is always the same one.
        self._calls += observation.SEED not in message
        return request

    def run(self, requests: Sequence[observation.Request], size: int) -> list[dict[str, Any]]:
        """Answers `actions` f32 [Z, A] and, where asked, `depth` f32 [R, R]; the device is done when it returns.

        Raises:
          FloatingPointError: actions that are not finite never reach a robot.
        """
        rows = [request.row for request in requests]
        depths, asked = None, any(request.depth for request in requests)
        given = (self.planner, rows, size, self.options.rtc if self.rtc else "inpaint")
        if asked:
            chunks, depths = planner.plan_with_depth(*given)
        else:
            chunks = planner.plan(*given)
        if not np.isfinite(chunks).all():
            raise FloatingPointError("the policy planned actions that are not finite")
        answers = [{"actions": self.reader.actions(*pair)} for pair in zip(requests, chunks)]
        for number, request in enumerate(requests):
            if request.depth:
                answers[number]["depth"] = depths[number]
        return answers

    def warm_up(self, say: Callable[[str], None]) -> float:
        """Compiles everything a request can need, by running it. Returns seconds."""
        began, config = time.monotonic(), self.planner.config
        side = config.siglip.image_size
        plain = {self.reader.keys.state: np.zeros(self.reader.dims), self.reader.keys.prompt: "warm up"}
        plain |= dict.fromkeys(self.reader.keys.views.values(), np.zeros((side, side, 3), np.uint8))
        variants: dict[str, dict[str, Any]] = {"": {}}
        if self.rtc:
            old = np.zeros((1, config.robot_action_dim), np.float32)
            variants[", real-time chunking"] = {observation.PREFIX: old}
        if self.options.depth:
            variants |= {f"{name}, depth": more | {observation.DEPTH: True} for name, more in variants.items()}
        requests = {name: self.reader.read(plain | more, 0, 0) for name, more in variants.items()}
        programs = [(size, name) for size in self.options.batch_sizes for name in requests]
        for number, (size, name) in enumerate(programs, 1):
            say(f"compiling program {number} of {len(programs)}: {size} at a time{name}")
            self.run([requests[name]], size)
        return time.monotonic() - began

    def metadata(self) -> dict[str, Any]:
        """What the server says first to every client; plain values."""
        config, keys, manifest = self.planner.config, self.reader.keys, self.planner.found.manifest
        side, names = config.siglip.image_size, self.reader.units
        pictures = {
            key: {"view": view, "dtype": "uint8", "shape": ["height", "width", 3], "max_side": self.options.max_side,
                  "resized_to": side, "required": not config.missing_views}
            for view, key in keys.views.items()
        }  # fmt: skip
        wanted = pictures | {
            keys.state: {"dtype": "float32", "shape": [self.reader.dims], "required": True},
            keys.prompt: {"type": "text", "max_tokens": self.planner.found.max_text_tokens, "required": True},
        }
        options = {
            observation.SEED: "whole number or [seed, call]: the noise; default: every request draws anew",
        }
        if self.rtc:
            options |= {
                observation.PREFIX: "float32 [k, action_dim]: actions left of the chunk being executed",
                observation.FROZEN: "whole number <= k: how many of them will be executed before the answer; default k",
            }
        if self.options.depth:
            options[observation.DEPTH] = "true: the answer has the depth of the main view"
        return {
            "server": "qdepth_jax",
            "version": qdepth_jax.__version__,
            "model": {
                "kind": "policy",
                "identity": planner.identity(self.planner),
                "step": manifest.get("meta", {}).get("step", -1),
            },
            "dataset": self.planner.dataset,
            "observation": wanted,
            "options": options,
            "ignored": list(self.options.ignore),
            "horizon": config.horizon,
            "action_dim": config.robot_action_dim,
            "actions": {
                "dtype": "float32",
                "shape": [config.horizon, config.robot_action_dim],
                "meaning": names.meaning,
            },
            "rtc": self.options.rtc,
            "flow": {"steps": config.flow.steps, "solver": self.planner.solver},
            "weights": self.options.how.weights,
            "batch_sizes": list(self.options.batch_sizes),
            "max_frame_bytes": self.max_frame,
            "depth": self._depth_metadata(),
        }

    def _depth_metadata(self) -> dict[str, Any]:
        if not self.options.depth:
            return {}
        decoder = self.planner.decoder
        depth = decoder[0].range if decoder else self.planner.config.depth.range
        return {
            "dtype": "float32",
            "kind": depth.kind,
            "near": depth.near,
            "far": depth.far,
            "view": "main",
            "frames_ahead": self.planner.found.depth_ahead,
        }
