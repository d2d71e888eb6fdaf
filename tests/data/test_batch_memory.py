"""Memory is used again only when no view, slice or foreign holder of it is left."""

import gc
import threading

import numpy as np

from qdepth_jax.data import batch_memory


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_returns_with_the_last_view():
    memory = batch_memory.BatchMemory()
    first = memory.empty((4, 8, 8, 3), np.uint8)
    first[:] = 7
    place = address(first)
    keepers = [first[1:3], first.reshape(-1)[5:], first.view(np.int8)[..., 0].T, memoryview(first[2])]
    del first
    while keepers:
        other = memory.empty((4, 8, 8, 3), np.uint8)
        assert address(other) != place
        other[:] = 9
        assert (np.asarray(keepers[-1]).view(np.uint8) == 7).all()
        del other
        keepers.pop()
    gc.collect()
    # Now two blocks are free, and one of them is the first.
    held = [memory.empty((4, 8, 8, 3), np.uint8) for _ in range(2)]
    assert place in [address(array) for array in held]


def test_another_size_is_other_memory():
    memory = batch_memory.BatchMemory()
    small = memory.empty((2, 3), np.float32)
    assert small.shape == (2, 3) and small.dtype == np.float32 and small.flags.writeable and small.flags.c_contiguous
    place = address(small)
    del small
    assert memory.empty((3, 3), np.float32).nbytes == 36
    assert address(memory.empty((24,), np.uint8)) == place


def test_a_jax_array_of_it_keeps_its_values():
    import jax

    memory = batch_memory.BatchMemory()
    kept = []
    for n in range(20):
        array = memory.empty((64, 64), np.float32)
        array[:] = n
        kept.append(jax.device_put(array))
    del array
    assert [float(value[63, 63]) for value in kept] == list(range(20))


def test_threads_never_share_memory():
    memory, wrong = batch_memory.BatchMemory(), []

    def work(number: int) -> None:
        for _ in range(2000):
            array = memory.empty((257,), np.int64)
            array[:] = number
            if (array != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
