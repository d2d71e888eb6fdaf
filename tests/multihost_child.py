"""One process of the runs in test_distributed.py: multihost_child.py MODE PORT COUNT NUMBER [--timeout=SECONDS]."""

import errno
import functools
import math
import os
import signal
import sys
import time

from absl import flags

from qdepth_jax import command, distributed, errors, stop_signal

_TIMEOUT = flags.DEFINE_integer("timeout", 120, "seconds for the start")


def main(argv: list[str]) -> None:
    mode, port, count, number = argv[1], argv[2], int(argv[3]), int(argv[4])
    with distributed.joined(f"127.0.0.1:{port}", count, number, _TIMEOUT.value) as said:
        print(said, flush=True)
        MODES[mode](number, count)


def agree(number: int, count: int) -> None:
    """Everything that has an answer by itself."""
    check_values(number, count)
    check_failures(number, count)
    check_devices(number, count)
    print("all checks passed", flush=True)


def check_values(number: int, count: int) -> None:
    assert distributed.process() == (number, count) and distributed.is_main() == (number == 0)
    value = {"host": number, "text": "\u00e9\n" * number, "list": [1.5, None, True]}
    expected = [{"host": i, "text": "\u00e9\n" * i, "list": [1.5, None, True]} for i in range(count)]
    assert distributed.gather(value, "values") == expected
    long = str(number) * 3_000_000  # longer than a message of gRPC may be by default, 4 MiB, when joined
    assert [len(x) for x in distributed.gather(long, "long")] == [3_000_000] * count
    assert distributed.from_main({"id": number}) == {"id": 0}
    assert len(set(distributed.gather(distributed.from_main(distributed.new_id()), "ids"))) == 1
    assert distributed.all_agree(True) and not distributed.all_agree(number != count - 1)
    slow = lambda: time.sleep(0.5) or "built" if number == 0 else None  # noqa: E731
    assert distributed.together(slow, "index", timeout=math.inf) == ("built" if number == 0 else None)
    time.sleep(0.05 * number)
    begin = time.monotonic()
    for i in range(20):
        distributed.barrier(f"b{i}")
    print(f"gather takes {(time.monotonic() - begin) / 20 * 1e3:.1f} ms")
    distributed.same_everywhere("config", {"a": [1, 2.5, "x"], "b": {"c": None}})


def check_failures(number: int, count: int) -> None:
    last = count - 1

    def outside():
        if number == last:
            raise errors.UserError("no index at /data")

    def inside():
        """The last one fails before a step that the others wait for."""
        distributed.barrier("first")
        if number == last:
            raise KeyError("lost")
        distributed.barrier("second")

    for fn, message, own in ((outside, "no index at /data", errors.UserError), (inside, "KeyError: 'lost'", KeyError)):
        try:
            distributed.together(fn)
        except distributed.HostFailed as error:
            assert number != last and str(error) == f"host {last}: {message}", error
        except own:
            assert number == last
        else:
            raise AssertionError("no host may go on")
    # A caller that catches it goes on with the others in step.
    assert distributed.together(lambda: number) == number
    try:
        distributed.barrier("here" if number else "there")
    except errors.UserError as error:
        assert "different places of the program" in str(error)
    else:
        raise AssertionError("hosts at different places were not noticed")
    try:
        if number != last:
            distributed.barrier("with one missing", timeout=0.5)
    except errors.UserError as error:
        assert ("host" in str(error)) and "did not come to 'with one missing' within 0 s" in str(error), error
    else:
        assert number == last


def check_devices(number: int, count: int) -> None:
    """Rows, global arrays and a compiled step, with devices in an order that is not the processes'."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from qdepth_jax import config, same_program, sharding

    distributed_turns_back_in_step(number, count)
    devices = jax.devices()
    assert len(devices) == 2 * count and jax.process_count() == count
    for sizes, order in (
        ((1, -1, 1), devices),
        ((2, -1, 1), devices[::2] + devices[1::2]),  # every process has rows of both halves
        ((1, -1, 2), devices[::2] + devices[1::2]),  # tensor spans processes
    ):
        mesh = sharding.make_mesh(config.MeshConfig(*sizes), order)
        rows = sharding.batch_rows(mesh, 16)
        held = NamedSharding(mesh, sharding.BATCH).addressable_devices_indices_map((16,))
        assert set(rows.tolist()) == {r for (span,) in held.values() for r in range(16)[span]}
        placed = NamedSharding(mesh, sharding.BATCH)
        array = jax.make_array_from_process_local_data(placed, rows.astype(np.float32)[:, None] * [1, 10], (16, 2))
        with jax.set_mesh(mesh):
            step = jax.jit(lambda x: jnp.einsum("bd,b->d", x, 2.0 ** -jnp.arange(16)))
            expected = (np.arange(16.0)[:, None] * [1, 10] * 2.0 ** -np.arange(16)[:, None]).sum(0)
            np.testing.assert_allclose(step(array).addressable_data(0), expected, rtol=1e-6)
            lowered = step.lower(array)
        same_program.check(lowered, {"seed": 1}, rows, mesh, 16)
        for what, arguments in (
            ("compiled program", (jax.jit(lambda x: x * (number + 1)).lower(array), {"seed": 1}, rows)),
            ("batch plan", (lowered, {"seed": number}, rows)),
            (f"host {count - 1} reads rows", (lowered, {"seed": 1}, rows[:-1] if number == count - 1 else rows)),
        ):
            try:
                same_program.check(*arguments, mesh, 16)
            except errors.UserError as error:
                assert what in str(error), error
            else:
                raise AssertionError(f"a different {what} was not noticed")


def distributed_turns_back_in_step(number: int, count: int) -> None:
    """The last host skipped a barrier above: one more of its own brings it to the others' turn."""
    if number == count - 1:
        distributed._turn()


def other_config(number: int, count: int) -> None:
    value = {"optim": {"learning_rate": 0.001 + 0.001 * (number == 1)}, "name": "b" if number == 2 else "a"}
    distributed.same_everywhere("config", value)


def fail(number: int, count: int) -> None:
    distributed.together(lambda: os.stat("/no/data") if number == 1 else None)


def fail_storage(number: int, count: int) -> None:
    """The disk of one host is away."""

    def read():
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError as error:
            raise errors.UserError(f"/data/shard cannot be read ({error})") from error

    distributed.together(read if number == 1 else lambda: None)


def fail_export(number: int, count: int) -> None:
    """One host cannot read its part of an export (given as EXPORT) that goes to the devices of all of them."""
    import jax
    import jax.numpy as jnp

    from qdepth_jax import config, sharding, stored_model

    mesh, own = sharding.make_mesh(config.MeshConfig()), stored_model._file_reader
    placed = jax.NamedSharding(mesh, jax.P())

    def stale(stored, item):
        def read(group):
            raise OSError(errno.ESTALE, "Stale file handle")

        return read if number == 1 else own(stored, item)

    stored_model._file_reader = stale
    stored_model.restore_leaves(
        os.environ["EXPORT"],
        lambda there: {
            path: jax.ShapeDtypeStruct(leaf["shape"], jnp.dtype(leaf["dtype"]), sharding=placed)
            for path, leaf in there.items()
        },
        agree=distributed.all_agree,
    )


def fail_alone(number: int, count: int, failing: int, kind: type = errors.UserError) -> None:
    """One host fails between two steps, while the others wait for it inside one."""
    import jax
    import numpy as np

    from qdepth_jax import config, sharding

    mesh = sharding.make_mesh(config.MeshConfig())
    placed = jax.NamedSharding(mesh, sharding.BATCH)
    x = jax.make_array_from_process_local_data(placed, np.ones(2, np.float32), (2 * count,))
    step = jax.jit(lambda x: x * 0.5 + x.mean(), out_shardings=placed)
    for i in range(100):
        if i == 20 and number == failing:
            raise kind("shard 7 is damaged" if kind is errors.UserError else "shard 7: no answer")
        x = jax.block_until_ready(step(x))


def stop(number: int, count: int) -> None:
    """Steps of another length on each host; the stop comes at the same one."""
    with stop_signal.StopSignal() as stop:
        begin = time.perf_counter()
        for _ in range(1000):
            stop.reached(0)
        print(f"asking takes {(time.perf_counter() - begin) * 1e3:.1f} us")
        for step in range(1, 100_000):
            time.sleep(0.002 + 0.003 * number)
            print(f"step {step}", flush=True)
            if stop.reached(step):
                print(f"stopped at {step}")
                return


def stop_resumed(number: int, count: int, early: bool) -> None:
    """One host is asked to stop while a run that goes on after step 5000 starts: before or after it told that step."""

    def ask():
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(4)  # the service looks for a signal once a second

    with stop_signal.StopSignal() as stop:
        if early:
            ask()
        if stop.asked_before(5000):
            print("stopped before 5001")
            return
        if not early:
            ask()
        for step in range(5001, 5100):
            time.sleep(0.01)
            if stop.reached(step):
                print(f"stopped at {step}")
                return


MODES = {"agree": agree, "config": other_config, "fail": fail, "storage": fail_storage, "stop": stop}
MODES["export"] = fail_export
MODES |= {f"alone{i}": functools.partial(fail_alone, failing=i) for i in (0, 1)}
MODES["alone_storage"] = functools.partial(fail_alone, failing=1, kind=errors.TryAgain)
MODES |= {f"stop_{when}": functools.partial(stop_resumed, early=when == "early") for when in ("early", "late")}
if __name__ == "__main__":
    sys.path.insert(0, "")
    command.run(main)
