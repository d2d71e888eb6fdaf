"""Several processes as one run: the start, the end, agreement between hosts.

A host here is one JAX process. Every function is a no-op in a run of one process. Agreement goes through the
coordination service of JAX (a key-value store on host 0 that works before and without any device), so it costs no
device memory and says who is missing instead of hanging. All hosts call these functions in the same order, from their
main thread.
"""

import contextlib
import ctypes
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from qdepth_jax import cluster, errors

T = TypeVar("T")

START_SECONDS = 300  # until the coordinator must have answered
WAIT_SECONDS = 3600.0  # for a host that is still at something else; a host that died is noticed in 100 s
STOP_SECONDS = 600  # at the end, for hosts that still write
# After a failure: a host that hears of it and cannot go on leaves, then the one that failed, then host 0, whose end
# would take the others down.
_GRACE_SECONDS, FAILED_SECONDS, _MAIN_GRACE_SECONDS = 4.0, 8, 12.0
_POLL_SECONDS = 5.0  # a blocking call of the client holds back Ctrl-C
_KEY = "qdepth_jax"


class HostFailed(errors.UserError):
    """Another host failed; its own message is quoted, and this host ends with the same exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


# ---- the start ----


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = START_SECONDS,
) -> str:
    """Joins this process to the others; call it before anything touches a device. Returns a line that says what it did.

    Without arguments the environment decides: a TPU pod, SLURM or Open MPI with more than one task starts what JAX
    detects there; anything else, a SLURM allocation of one task too, is a run of one process and starts nothing. With
    arguments (all three) nothing is detected and a process uses every local device it sees; JAX_LOCAL_DEVICE_IDS
    narrows that.

    Args:
      coordinator: "HOST:PORT" of process 0.
      num_processes, process_id: how many, and which this is, from 0.
      timeout: seconds until the coordinator and all processes must be there.

    Raises:
      UserError: an incomplete or impossible set of arguments, devices already in use, or no answer in time.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        found = cluster.detect(os.environ)
        if found == cluster.NONE:
            found = cluster.detect_cloud_tpu()
        if found.processes > 1:
            _initialise({"local_device_ids": found.devices, "cluster_detection_method": found.kind}, timeout)
        return _started(found.kind)
    if missing:
        raise errors.UserError(
            f"--{', --'.join(missing)} not given: set all of --coordinator=HOST:PORT --num_processes=N "
            "--process_id=I, or none of them on a TPU pod, under SLURM or Open MPI"
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise errors.UserError(
            f"--process_id={process_id} --num_processes={num_processes}: processes are numbered from 0 to N - 1"
        )
    cluster.check_address(coordinator, listens=process_id == 0 and num_processes > 1)
    if num_processes > 1:
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        _initialise(arguments | {"cluster_detection_method": "deactivate"}, timeout)
        same_everywhere("--num_processes", num_processes)
    return _started("as given")


def _initialise(arguments: dict[str, Any], timeout: int) -> None:
    import jax
    from jax._src import xla_bridge

    if is_started():
        raise errors.UserError("this process has joined a run already: distributed.start is for the start alone")
    if xla_bridge.backends_are_initialized():
        raise errors.UserError(
            "devices were used before distributed.start: it must come before the first array, jax.devices() or jit"
        )
    # Takes effect where the CPU is the platform; simulated pods are the only ones.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX ends the process with a stack dump when its own time is up, so ours must come first. In a thread, because the
    # call cannot be interrupted; a thread that is still waiting when the process ends does no harm.
    failed: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(initialization_timeout=timeout + 3600, **arguments)
        except (RuntimeError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=connect, name="start", daemon=True)
    thread.start()
    thread.join(timeout)
    if not thread.is_alive() and not failed:
        return
    state = _state()
    state.client, where = None, f"coordinator {state.coordinator_address or '(not found)'}"
    if failed:
        # The runtime refuses while the coordinator of the last start is still there; arguments are a ValueError.
        kind = errors.UserError if isinstance(failed[0], ValueError) else errors.TryAgain
        raise kind(
            f"{where}: this process cannot join the run: {_first_line(failed[0])}. On process 0 the port must be free, "
            "and outside of a cluster that JAX knows, --coordinator, --num_processes and --process_id must be given"
        ) from failed[0]
    raise errors.TryAgain(
        f"{where}: not all processes of the run met within {timeout} s. Is process 0 running, is the address its own, "
        "is the port open between the hosts, and were all processes started? --start_timeout=SECONDS waits longer"
    )


def _started(kind: str) -> str:
    number, count = process()
    return f"host {number} of {count} ({kind})" if count > 1 else f"one process ({kind})"


def is_started() -> bool:
    """True in a run of several processes, after `start`."""
    return _client() is not None


def stop(timeout: float = STOP_SECONDS) -> None:
    """Leaves the run together with the others: a host that just exits takes those that still work down with it.

    Hosts that are not here within `timeout` seconds are left behind, which is said.
    """
    if not is_started():
        return
    import jax

    try:
        _client().wait_at_barrier(f"{_KEY}/end", int(1000 * timeout))
    except RuntimeError as error:
        print(f"left without the other hosts: {_first_line(error)}", file=sys.stderr, flush=True)
        # At the end of the process JAX would wait 300 s more for them, and its connections, by whose end the others
        # notice, would stay open for so long. So it must forget them, and nobody may destroy them.
        state = _state()
        for held in (state.client, state.preemption_sync_manager, state.service):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
        state.client = state.preemption_sync_manager = state.service = None
        return
    jax.distributed.shutdown()


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = START_SECONDS,
) -> Iterator[str]:
    """`start` (its arguments, its line) and `stop` around a whole program; a failure on one host ends all of them.

    The others hear of it where they wait for this host: in a function of this module as HostFailed, in a collective
    operation, which cannot be interrupted, by a message. All end with the exit code of the one that failed. A host that
    is killed can tell nobody: JAX aborts the others (134), at once if it was host 0, else after its heartbeat's 100 s.

    Raises:
      HostFailed: a collective operation failed here because another host has failed.
    """
    said, leaving = start(coordinator, num_processes, process_id, timeout), threading.Event()
    if is_started():
        threading.Thread(target=_watch, args=(leaving,), name="watch", daemon=True).start()
    try:
        yield said
    except BaseException as error:
        leaving.set()
        elsewhere = _leave_failed(error)
        stop(FAILED_SECONDS)
        if elsewhere:
            raise HostFailed(*elsewhere) from error
        raise
    leaving.set()
    stop()


def _watch(leaving: threading.Event) -> None:
    """Ends this process when another has failed and the main thread does not: it may wait in a collective for ever."""
    grace = _MAIN_GRACE_SECONDS if is_main() else _GRACE_SECONDS
    while not leaving.wait(2.0):
        try:
            found = _failed_elsewhere()
        except RuntimeError:
            return  # the coordinator is gone: JAX itself ends the process
        if found and not leaving.wait(grace):
            message, code = found
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(code)


def _failed_elsewhere() -> tuple[str, int] | None:
    """(message, exit code) of the first host that failed, None if none did."""
    for key, text in sorted(_client().key_value_dir_get(f"{_KEY}/failed/")):
        told = json.loads(text)
        return f"host {key.rpartition('/')[2]}: {told['failed']}", told["code"]
    return None


def _leave_failed(error: BaseException) -> tuple[str, int] | None:
    """Lets every other host know; returns what another host said if its failure is why this one failed."""
    if not is_started() or isinstance(error, HostFailed):
        return None
    import jax

    try:
        if isinstance(error, jax.errors.JaxRuntimeError) and (elsewhere := _failed_elsewhere()):
            return elsewhere
        _client().key_value_set(f"{_KEY}/failed/{process()[0]}", json.dumps(_told(error)), allow_overwrite=True)
        _post(_turn(), _told(error), process()[0])
    except RuntimeError as lost:
        # The coordinator itself is gone: what went wrong here must still be what the user reads.
        print(f"the other hosts could not be told: {_first_line(lost)}", file=sys.stderr, flush=True)
    return None


def _told(error: BaseException) -> dict[str, Any]:
    text = str(error) if isinstance(error, errors.UserError) else f"{type(error).__name__}: {error}"
    return {"failed": text, "code": errors.exit_code(error)}


# ---- agreement ----


def process() -> tuple[int, int]:
    """(number of this host, number of hosts); (0, 1) without `start`. Touches no device."""
    if not is_started():
        return 0, 1
    state = _state()
    return state.process_id, state.num_processes


def is_main() -> bool:
    """True on the host that writes logs, folders and reports."""
    return process()[0] == 0


def gather(value: Any, what: str, timeout: float = WAIT_SECONDS) -> list[Any]:
    """The value (JSON types) of every host, in order of their numbers, on every host.

    Raises:
      HostFailed: a host failed inside `together` meanwhile.
      UserError: a host did not come in time, or is at another place of the program.
    """
    if process()[1] == 1:
        return [value]
    return _exchange({"what": what, "value": value}, what, timeout)


def barrier(what: str, timeout: float = WAIT_SECONDS) -> None:
    """Returns when every host is here."""
    gather(None, what, timeout)


def all_agree(ok: bool, what: str = "all_agree") -> bool:
    """True if `ok` on every host."""
    return all(gather(bool(ok), what))


def from_main(value: Any, what: str = "from_main") -> Any:
    """Host 0's value (JSON types) on every host; what the others pass is not looked at."""
    return gather(value if is_main() else None, what)[0]


def same_everywhere(what: str, value: Any) -> None:
    """`value` (JSON types) must be equal on all hosts.

    Raises:
      UserError: on every host the same message, with the hosts that differ from host 0 and the keys in which they do.
    """
    from qdepth_jax import config as config_lib

    first, *others = gather(json.loads(json.dumps(value)), f"compare {what}")
    groups: dict[str, list[int]] = {}
    for number, other in enumerate(others, 1):
        if found := config_lib.differences(first, other):
            groups.setdefault("\n    ".join(found), []).append(number)
    if groups:
        lines = [f"host 0 (there) and {_hosts(numbers)} (here):\n    {text}" for text, numbers in groups.items()]
        raise errors.UserError(
            f"the {what} is not the same on all hosts; start every host with the same command and files:\n  "
            + "\n  ".join(lines)
        )


def together(fn: Callable[[], T], what: str = "start", timeout: float = WAIT_SECONDS) -> T:
    """fn() on every host; returns when all of them are through it. `fn` may call functions of this module itself.

    `timeout` may be math.inf: while all hosts live they wait, and one that dies ends the others.

    Raises:
      HostFailed: on every host whose own fn did not fail, with the message of the first that did.
      Exception: what fn raised here.
    """
    if process()[1] == 1:
        return fn()
    try:
        out = fn()
    except HostFailed:
        raise  # the one that failed has told everybody
    except BaseException as error:
        # Posted where the others wait next, here or inside fn; they need not have got as far as this host.
        _post(_turn(), _told(error), process()[0])
        raise
    gather(None, f"after {what}", timeout)
    return out


def new_id() -> str:
    """A fresh experiment id, "20260131-120000-1a2b3c"; `from_main` makes it the same on all hosts."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def _exchange(message: dict[str, Any], what: str, timeout: float) -> list[Any]:
    """Host 0 collects and publishes: a message per host and way, where all to all would be their square."""
    number, count = process()
    turn, client = _turn(), _client()
    _post(turn, message, number)
    deadline = time.monotonic() + timeout
    if number == 0:
        messages = []
        for host in range(count):
            messages.append(json.loads(_wait(f"{_KEY}/{turn}/{host}", deadline, timeout, what, host)))
            if "failed" in messages[-1]:
                break  # the others may never come
        client.key_value_set(f"{_KEY}/{turn}/all", json.dumps(messages))
    else:
        messages = json.loads(_wait(f"{_KEY}/{turn}/all", deadline, timeout, what, 0))
    # Every host is through the turn before: its messages have been read.
    client.key_value_delete(f"{_KEY}/{turn - 1}/{number}")
    if number == 0:
        client.key_value_delete(f"{_KEY}/{turn - 1}/all")
    for host, found in enumerate(messages):
        if "failed" in found:
            raise HostFailed(f"host {host}: {found['failed']}", found["code"])
    if places := {found["what"] for found in messages} - {what}:
        raise errors.UserError(f"hosts are at different places of the program: {what!r} here, {sorted(places)} there")
    return [found["value"] for found in messages]


def _turn() -> int:
    """How often this host has spoken; kept by the coordination service, which forgets with the run."""
    return _client().key_value_increment(f"{_KEY}/turn/{process()[0]}", 1)


def _post(turn: int, message: dict[str, Any], number: int) -> None:
    _client().key_value_set(f"{_KEY}/{turn}/{number}", json.dumps(message))
    if number == 0 and "failed" in message:
        _client().key_value_set(f"{_KEY}/{turn}/all", json.dumps([message]))


def _wait(key: str, deadline: float, timeout: float, what: str, host: int) -> str:
    while True:
        left = deadline - time.monotonic()
        try:
            return _client().blocking_key_value_get(key, max(1, int(1000 * min(left, _POLL_SECONDS))))
        except Exception as error:  # jaxlib's own class, of RuntimeError
            if "DEADLINE_EXCEEDED" not in str(error):
                raise errors.TryAgain(
                    f"lost the coordinator while waiting for host {host} at {what!r}: {_first_line(error)}"
                ) from error
            if left <= _POLL_SECONDS:
                raise errors.TryAgain(
                    f"host {host} did not come to {what!r} within {timeout:.0f} s: see its own messages"
                ) from None


def _hosts(numbers: list[int]) -> str:
    return f"host{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _state() -> Any:
    from jax._src import distributed  # jax.distributed has no public name for the client

    return distributed.global_state


def _client() -> Any:
    # Nothing was started in a process that has not even imported JAX: config tools stay light.
    return _state().client if "jax" in sys.modules else None
