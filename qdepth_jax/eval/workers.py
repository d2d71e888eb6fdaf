"""Worker processes of closed-loop evaluation: each runs episodes in one environment and asks for actions.

Messages to the parent: ("ready",), ("seen", Seen), ("done", Outcome, Seen | None), ("crash", text),
("impossible", text), ("broken", text). From the parent: ("run", task, start, Ask), ("actions", [k, A]), and the end of
the pipe.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import rollout, simulator


@dataclasses.dataclass(frozen=True)
class Ask:
    """How an episode is run.

    Attributes:
      execute, cap, views, to_the_end: see rollout.run_episode.
      expert: the scripted expert acts; the parent is told nothing until the end, or only what a video needs.
      last: the end is shown too.
    """

    execute: int
    cap: int
    views: tuple[str, ...]
    expert: bool
    to_the_end: bool
    last: bool


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of every environment of a worker; see closed_loop.Options."""

    image_size: int
    supersample: int


def work(connection: multiprocessing.connection.Connection, setting: Setting) -> None:
    """A worker's life: until the parent closes the pipe or dies."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
        os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe: one rasteriser thread a process
    env, present = None, None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(("ready",))
        while True:
            _, task, start, ask = connection.recv()
            try:
                if present != task:
                    env, present = _closed(env), None
                    env = simulator.adapter(task.adapter).make_env(task, setting.image_size, setting.supersample)
                    present = task
                message = _episode(connection, env, start, ask)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                break
            except errors.UserError as error:
                message = ("impossible", str(error))
            except (ImportError, AttributeError, NameError, TypeError):
                message = ("broken", traceback.format_exc())  # a mistake in code is no crash of a simulator
            except Exception as error:
                if not isinstance(error, simulator.SimulatorFailure):
                    traceback.print_exc()
                # Whatever state it is in: the next episode gets a new environment.
                message, env, present = ("crash", f"{type(error).__name__}: {error}"), _closed(env), None
            connection.send(message)
    _closed(env)


def _episode(connection: multiprocessing.connection.Connection, env: simulator.Env, start, ask: Ask) -> tuple:
    ends: list[rollout.Seen] = []
    expert, parent = rollout.expert_act(env) if ask.expert else None, os.getppid()

    def act(seen: rollout.Seen):
        if os.getppid() != parent:  # an expert asks nobody, so it would not notice
            raise EOFError("the evaluation is gone")
        if expert is None or ask.views:
            connection.send(("seen", seen))
        if expert is not None:
            return expert(seen)
        _, chunk = connection.recv()
        return env.convert(chunk)

    outcome = rollout.run_episode(
        env,
        start,
        act,
        execute=ask.execute,
        cap=ask.cap,
        views=ask.views,
        to_the_end=ask.to_the_end,
        last=ends.append if ask.last else None,
    )
    return ("done", outcome, ends[0] if ends else None)


def _closed(env: simulator.Env | None) -> None:
    """Closes an environment that may be broken."""
    if env is not None:
        try:
            env.close()
        except Exception as error:
            print(f"closing an environment failed: {type(error).__name__}: {error}", file=sys.stderr)


class Worker:
    """A worker as its parent sees it.

    Attributes:
      ready: it has begun. heard: when it last said something (time.monotonic).
      silence: seconds that the parent has waited for it since.
    """

    def __init__(self, setting: Setting, process: bool = True):
        context = multiprocessing.get_context("spawn")  # a forked GL context or simulator is not usable
        self.connection, theirs = context.Pipe()
        make = context.Process if process else threading.Thread
        self._life = make(target=work, args=(theirs, setting), daemon=True)
        self._life.start()
        if process:
            theirs.close()  # so that the end of the process is the end of the pipe
        self.heard, self.silence, self.ready = time.monotonic(), 0.0, False

    def send(self, message: tuple) -> None:
        """What a dead worker does not take is noticed when it is listened to."""
        self.silence = 0.0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self) -> tuple[Any, ...] | None:
        """The next message; None: the process is dead."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None
        self.heard, self.silence = time.monotonic(), 0.0
        return message

    def stop(self, patience: float = 5.0) -> str:
        """Ends it, by force if it does not hear. Returns how it ended."""
        self.connection.close()
        self._life.join(patience)
        if isinstance(self._life, threading.Thread):
            return "stopped"
        if self._life.is_alive():
            self._life.kill()
            self._life.join()
        code = self._life.exitcode
        return f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"


def listen(workers: list[Worker], seconds: float) -> list[Worker]:
    """Those that have something to say (or are dead), after at most so many seconds."""
    began = time.monotonic()
    ready = multiprocessing.connection.wait([worker.connection for worker in workers], seconds)
    # Not more than was asked for: while a machine sleeps or a job is suspended, nobody is silent.
    passed = min(time.monotonic() - began, seconds)
    for worker in workers:
        worker.silence += passed
    return [worker for worker in workers if worker.connection in ready]


def checked_chunk(chunk: np.ndarray, action_dim: int) -> np.ndarray:
    """A policy's answer as f32 [k, action_dim]; a wrong one is the policy's error, not a failed episode.

    Raises:
      ValueError: another shape, or numbers that are not finite.
    """
    chunk = np.asarray(chunk, np.float32)
    if chunk.ndim != 2 or chunk.shape[1] != action_dim:
        raise ValueError(f"policy returned actions {chunk.shape}, needed [k, {action_dim}]")
    if not np.isfinite(chunk).all():
        raise ValueError("policy returned actions that are not finite")
    return chunk
