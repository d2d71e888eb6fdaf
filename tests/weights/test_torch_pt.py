"""Torch checkpoints: weights-only, mapped, with a trainer's other things beside; pickles that run code are refused."""

import os
import pickle

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.weights import torch_pt


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(errors.UserError, match=r"install torch to read it \(pip install -e '.\[interop\]'\)"):
        torch_pt.open_source(str(tmp_path / "x.pt"))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("nested", [False, True])
def test_every_tensor(torch, tmp_path, nested):
    state = {
        "a.weight": torch.randn(5, 6),
        "b": torch.randn(3, 4, 2).to(torch.bfloat16),
        "c": torch.randn(7).to(torch.float16),
        "view": torch.randn(4, 6).T,
    }
    trainer = {"cnt_update": 3, "model": state, "action_optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    torch.save(trainer if nested else state, tmp_path / "step.pt")
    weights = torch_pt.open_source(str(tmp_path / "step.pt"))
    assert set(weights.specs) == set(state) and weights.files == {"step.pt": os.path.getsize(tmp_path / "step.pt")}
    for key, tensor in state.items():
        wanted = tensor.float().numpy()
        assert weights.specs[key].dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(weights.read(key).astype(np.float32), wanted)
        joined = np.zeros(wanted.shape, np.float32)
        for start, block in weights.pieces(key, 5):
            assert block.size <= 6
            joined[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
        np.testing.assert_array_equal(joined, wanted)


class Bad:
    def __reduce__(self):
        return (os.system, ("touch /nowhere/owned",))


def test_a_pickle_that_runs_code_is_refused(torch, tmp_path):
    torch.save({"model": {"a": torch.zeros(2)}, "config": Bad()}, tmp_path / "x.pt")
    with pytest.raises(errors.UserError, match=r"holds more than weights.*would run code from it: refused"):
        torch_pt.open_source(str(tmp_path / "x.pt"))


def test_files_of_another_kind(torch, tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(errors.UserError, match=r"no whole torch checkpoint|more than weights"):
        torch_pt.open_source(str(tmp_path / "x.pt"))
    torch.save({"a": torch.randn(300)}, tmp_path / "y.pt")
    data = (tmp_path / "y.pt").read_bytes()
    (tmp_path / "y.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.UserError, match="no whole torch checkpoint"):
        torch_pt.open_source(str(tmp_path / "y.pt"))
    torch.save({"step": 3, "name": "x"}, tmp_path / "z.pt")
    with pytest.raises(errors.UserError, match="is no state dict and has none under 'model': 2 entries are no tensors"):
        torch_pt.open_source(str(tmp_path / "z.pt"))
    torch.save([torch.zeros(1)], tmp_path / "l.pt")
    with pytest.raises(errors.UserError, match="holds a list"):
        torch_pt.open_source(str(tmp_path / "l.pt"))
    with pytest.raises(errors.UserError, match="is no file"):
        torch_pt.open_source(str(tmp_path / "none.pt"))
    with pytest.raises(errors.UserError, match="maps local files only"):
        torch_pt.open_source("gs://bucket/x.pt")


def test_a_released_checkpoint_through_its_table(torch, tmp_path):
    """Trainer's file of a compiled model in bfloat16, the shared expert twice."""
    import jax

    from qdepth_jax.models import policy
    from qdepth_jax.weights import importing, open_pi_zero, table

    config = policy.sized("tiny", depth=None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), importing.shapes_of(config))
    state = {
        f"_orig_mod.{key}": torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
        for key, array in open_pi_zero.save(params).items()
    }
    torch.save({"cnt_update": 1, "model": state}, tmp_path / "step.pt")
    changes = ["head_dim=8", "siglip.heads=2", "text_length=5", "action.rope_theta=100.0"]
    opened = importing.open_weights("open_pi_zero", str(tmp_path / "step.pt"), changes=changes)
    assert opened.config == config
    found = table.load(opened.weights, open_pi_zero.TABLE, opened.shapes, open_pi_zero.TITLE, open_pi_zero.clean).params
    rounded = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, jax.numpy.bfloat16), np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)
