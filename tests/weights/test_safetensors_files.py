"""safetensors: against the format's own rules, whole and sharded, and every way in which a file can be broken."""

import json

import ml_dtypes
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.weights import safetensors_files

NAMES = {np.dtype("f4"): "F32", np.dtype("f2"): "F16", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype("i8"): "I64"}


def encode(arrays, metadata=None, change=lambda header: None):
    """The bytes of a file, by the format's description; `change` damages the header."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for key, array in arrays.items():
        header[key] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values())


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(5, 6)).astype(np.float32),
        "b": rng.normal(size=(3, 4, 2)).astype(ml_dtypes.bfloat16),
        "c": rng.normal(size=(7,)).astype(np.float16),
        "n": np.arange(3),
    }


def test_one_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(encode(arrays(), {"format": "pt"}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        weights = safetensors_files.open_source(str(path))
        assert set(weights.specs) == set(arrays())
        for key, wanted in arrays().items():
            assert weights.specs[key].dtype == wanted.dtype
            np.testing.assert_array_equal(weights.read(key), wanted)
            parts = [block.ravel() for _, block in weights.pieces(key, 5)]
            np.testing.assert_array_equal(np.concatenate(parts), wanted.ravel())
            assert max(len(p) for p in parts) <= 5
        weights.close()


def sharded(folder, where=None):
    parts = {"model-00001-of-00002.safetensors": ["a.weight", "c"], "model-00002-of-00002.safetensors": ["b", "n"]}
    for name, keys in parts.items():
        (folder / name).write_bytes(encode({key: arrays()[key] for key in keys}))
    where = where or {key: name for name, keys in parts.items() for key in keys}
    (folder / safetensors_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_by_folder_and_by_index(tmp_path):
    sharded(tmp_path)
    for path in (tmp_path, tmp_path / safetensors_files.INDEX):
        weights = safetensors_files.open_source(str(path))
        assert len(weights.files) == 2 and set(weights.specs) == set(arrays())
        for key, wanted in arrays().items():
            np.testing.assert_array_equal(weights.read(key), wanted)


def test_the_library_reads_the_same(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    floats = {key: a for key, a in arrays().items() if a.dtype != ml_dtypes.bfloat16}
    library.save_file(floats, tmp_path / "model.safetensors", metadata={"by": "library"})
    weights = safetensors_files.open_source(str(tmp_path))
    for key, wanted in floats.items():
        np.testing.assert_array_equal(weights.read(key), wanted)
    (tmp_path / "ours.safetensors").write_bytes(encode(floats))
    for key, found in library.load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(found, floats[key])


def test_missing_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(errors.UserError, match=r"2 shards; 1 are missing: model-00002-of-00002.safetensors"):
        safetensors_files.open_source(str(tmp_path))


def test_index_that_contradicts_its_shards(tmp_path):
    where = {key: "model-00001-of-00002.safetensors" for key in ("a.weight", "b", "x")}
    sharded(tmp_path, where | {"n": "model-00002-of-00002.safetensors"})
    with pytest.raises(errors.UserError) as caught:
        safetensors_files.open_source(str(tmp_path))
    for line in ("b: named by the index, not in", "x: named by the index, not in", "c: in model-00001", "not named by"):
        assert line in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}'])
def test_bad_index(tmp_path, text):
    (tmp_path / safetensors_files.INDEX).write_text(text)
    with pytest.raises(errors.UserError, match=r"is no index|outside its folder"):
        safetensors_files.open_source(str(tmp_path))


def test_one_key_in_two_shards(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(encode(arrays()))
    with pytest.raises(errors.UserError, match=r"a.weight is in model-00001.* and in model-00002"):
        safetensors_files.open_source(str(tmp_path))


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_truncated(tmp_path, cut):
    data = encode(arrays())
    (tmp_path / "model.safetensors").write_bytes(data[:-cut])
    with pytest.raises(errors.UserError, match=r"no whole safetensors file.*(truncated|bad header)"):
        safetensors_files.open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(data_offsets=[100, 148]), "b starts at byte 100 of the data, the array before ends"),
        (lambda h: h["c"].update(data_offsets=[170, 184]), "starts at byte 170"),
        (lambda h: h["a.weight"].update(shape=[5, 7]), r"a.weight is float32\[5, 7\] and has 120 bytes"),
        (lambda h: h["a.weight"].update(shape=[-5, -6]), "has shape"),
        (lambda h: h["b"].update(dtype="Q4"), "unknown dtype 'Q4'"),
        (lambda h: h["b"].pop("shape"), "bad header"),
        (lambda h: h.pop("n"), "truncated, or written over"),
    ],
)
def test_impossible_headers(tmp_path, change, message):
    (tmp_path / "model.safetensors").write_bytes(encode(arrays(), change=change))
    with pytest.raises(errors.UserError, match=message):
        safetensors_files.open_source(str(tmp_path))


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"{{}}"]
)
def test_files_of_another_kind(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(errors.UserError, match="no whole safetensors file"):
        safetensors_files.open_source(str(tmp_path))


def test_a_name_twice(tmp_path):
    text = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(errors.UserError, match="a name stands twice"):
        safetensors_files.open_source(str(tmp_path))


def test_folder_without_weights(tmp_path):
    with pytest.raises(errors.UserError, match=r"holds 0 .safetensors files"):
        safetensors_files.open_source(str(tmp_path))
    (tmp_path / "x.safetensors").write_bytes(encode(arrays()))
    (tmp_path / "y.safetensors").write_bytes(encode(arrays()))
    with pytest.raises(errors.UserError, match=r"holds 2 .safetensors files"):
        safetensors_files.open_source(str(tmp_path))
