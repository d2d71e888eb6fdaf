""".npz: stored and deflated, every float type, in pieces; bombs and damage refused before memory is taken."""

import io
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.weights import npz, source

BF16 = np.dtype(ml_dtypes.bfloat16)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "params/a": rng.normal(size=(5, 6, 7)).astype(np.float32),
        "params/b/c": rng.normal(size=(33,)).astype(np.float16),
        "params/d": rng.normal(size=(3, 8)).astype(BF16),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float32),
    }


def write(path, compressed=False, **extra):
    # NumPy has no bfloat16: it writes two bytes without a type, as in the official files.
    (np.savez_compressed if compressed else np.savez)(path, **(arrays() | extra))
    return str(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_array_whole_and_in_pieces(tmp_path, compressed):
    path = write(tmp_path / "w.npz", compressed)
    weights = npz.open_source(path)
    assert set(weights.specs) == set(arrays())
    assert weights.files == {"w.npz": (tmp_path / "w.npz").stat().st_size}
    for key, wanted in arrays().items():
        wanted = np.asarray(wanted)
        assert (weights.specs[key].shape, weights.specs[key].dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(weights.read(key), wanted)
        joined = np.empty(wanted.shape, wanted.dtype)
        for start, block in weights.pieces(key, 10):
            assert block.size <= 10
            joined[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
        np.testing.assert_array_equal(joined, wanted)
    weights.close()


def test_fortran_order_and_big_endian(tmp_path):
    a = np.asfortranarray(np.arange(12.0, dtype=np.float32).reshape(3, 4))
    b = np.arange(5, dtype=">f4")
    weights = npz.open_source(write(tmp_path / "w.npz", a=a, b=b))
    np.testing.assert_array_equal(weights.read("a"), a)
    np.testing.assert_array_equal(weights.read("b"), b)
    assert weights.specs["b"].dtype == np.float32


def test_no_more_is_read_than_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "w.npz", big=np.zeros((64, 1024), np.float32))
    read = []
    original = npz.ranges.File.read
    monkeypatch.setattr(
        npz.ranges.File, "read", lambda self, at, size: (read.append(size), original(self, at, size))[1]
    )
    weights = npz.open_source(path)
    assert sum(read) < 30_000, "headers and the directory alone"
    read.clear()
    next(weights.pieces("big", 2048))
    assert sum(read) < 20_000


def test_objects_are_never_unpickled(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(errors.UserError, match=r"a.npy holds pickled Python objects"):
        npz.open_source(str(path))


def header(shape, descr="<f4"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def test_a_header_that_declares_more_than_there_is(tmp_path):
    """8 TB of float32 in a file of a few bytes: refused before an allocation."""
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as file:
        file.writestr("a.npy", header((2**21, 2**20)) + bytes(64))
    with pytest.raises(errors.UserError, match=r"declares shape .* 8796093022208 bytes, but holds 64"):
        npz.open_source(str(tmp_path / "w.npz"))


def test_a_directory_that_declares_more_than_deflate_packs(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", header((1024,)) + bytes(4096))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 2**31)  # uncompressed size in the central directory
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=r"declares 2147483648 bytes in .*no array packs so small"):
        npz.open_source(str(path))


def test_a_bomb_that_is_honest_about_its_size(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    np.savez_compressed(path, a=np.zeros(2**20, np.float32))
    monkeypatch.setattr(npz, "memory_bytes", lambda: 2**20)
    with pytest.raises(errors.UserError, match="unpacks to 4194432, more than the 1048576 bytes of memory"):
        npz.open_source(str(path))


def test_overlapping_members(tmp_path):
    """The directory names the same bytes many times."""
    path = tmp_path / "w.npz"
    body = header((1000,)) + bytes(4000)
    with zipfile.ZipFile(path, "w") as file:
        for n in range(9):
            file.writestr(f"a{n}.npy", body if n == 0 else header((0,)))
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\x01\x02")
    at = first
    sizes = struct.unpack_from("<III", data, first + 16)
    while (at := data.find(b"PK\x01\x02", at + 1)) > 0:
        struct.pack_into("<III", data, at + 16, *sizes)
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=r"declares 37152|overlap|no whole .npz"):
        npz.open_source(str(path))


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_is_found_while_reading(tmp_path, compressed):
    path = tmp_path / "w.npz"
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    (np.savez_compressed if compressed else np.savez)(path, a=values)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    weights = npz.open_source(str(path))
    with pytest.raises(errors.UserError, match=r"a.npy is damaged"):
        list(weights.pieces("a", 100))


def test_truncated_and_absent_files(tmp_path):
    path = tmp_path / "w.npz"
    write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.UserError, match=r"no whole .npz file"):
        npz.open_source(str(path))
    with pytest.raises(errors.UserError, match="cannot be opened"):
        npz.open_source(str(tmp_path / "none.npz"))
    with pytest.raises(errors.UserError, match="is a folder"):
        npz.open_source(str(tmp_path))


def test_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as file:
        file.writestr("readme.txt", "x" * 200)
    with pytest.raises(errors.UserError, match=r"readme.txt is no array"):
        npz.open_source(str(tmp_path / "w.npz"))


def test_pieces_are_views_of_one_read(tmp_path):
    weights = npz.open_source(write(tmp_path / "w.npz"))
    assert source.blocks(weights.specs["params/a"], 10)
    assert [block.shape for _, block in weights.pieces("params/a", 14)] == [(1, 2, 7)] * 15
