"""Processes that write their shares of one sidecar, one of which may be killed; forked from one that has imported all.

One round per line of stdin, JSON: {"root", "processes", "pause": seconds per episode, "kill": [process, seconds] or
null}; answered by a line with the exit codes. Commands would take half a second each to start.
"""

import json
import os
import signal
import sys
import time

import numpy as np

from qdepth_jax.data import sidecar

LENGTHS = np.random.default_rng(7).integers(1, 9, 40)
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
SHAPE = (17, 13)  # rows that end in the middle of pages
METADATA = sidecar.Metadata(
    "depth", "abc", "train", "cam", "maker-1", SHAPE, int(LENGTHS.sum()), len(LENGTHS), {"depth_kind": "relative"}
)


def values(episode: int) -> np.ndarray:
    return np.random.default_rng(episode).integers(0, 65536, (LENGTHS[episode], *SHAPE)).astype(np.uint16)


def write(root: str, process: int, processes: int, pause: float = 0.0) -> str | None:
    writer = sidecar.Writer(root, METADATA, 3, process, processes)
    for episode in writer.pending():
        time.sleep(pause)
        figures = np.array([episode, LENGTHS[episode], 0.1 * episode])
        writer.write(episode, int(STARTS[episode]), values(episode), scale=1 + episode, offset=-1, figures=figures)
    return writer.finish()


def run_round(root: str, processes: int, pause: float, kill: list | None) -> list[int]:
    children = []
    for process in range(processes):
        children.append(os.fork())
        if not children[-1]:
            os._exit(_code(root, process, processes, pause))
    if kill:
        time.sleep(kill[1])
        os.kill(children[kill[0]], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _code(*arguments) -> int:
    try:
        write(*arguments)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run_round(**json.loads(line))), flush=True)
