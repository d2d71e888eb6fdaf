"""config.json of a workdir: what may change between starts, what may not."""

import json

import pytest

from qdepth_jax import errors, same_experiment

CONFIG = {"train": {"total_steps": 10, "batch_size": 8}, "seed": 0, "mesh": {"fsdp": 1}, "model_kind": "policy"}


def test_lengths_may_change_between_starts_but_nothing_else(tmp_path):
    same_experiment.check_same_experiment(str(tmp_path), CONFIG)
    assert not list(tmp_path.iterdir()), "the check writes nothing"
    same_experiment.write_config(str(tmp_path), CONFIG)
    longer = CONFIG | {"train": {"total_steps": 20, "batch_size": 8}, "mesh": {"fsdp": 4}}
    same_experiment.check_same_experiment(str(tmp_path), longer)
    said = []
    same_experiment.say_changed_length(str(tmp_path), 20, said.append)
    assert "from 10 to 20" in said[0]
    same_experiment.write_config(str(tmp_path), longer)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["total_steps"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(errors.UserError, match="seed: 0 there, 1 here"):
        same_experiment.check_same_experiment(str(tmp_path), longer | {"seed": 1})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.UserError, match="damaged"):
        same_experiment.check_same_experiment(str(tmp_path), longer)


def test_what_changes_no_training_value_may_change(tmp_path):
    """The fixes of two refusals are among them: they must be open to a run that began before."""
    before = CONFIG | {"eval_split": "train[:5]", "model": {"flow": {"clip": 1.0, "steps": 10}}}
    same_experiment.write_config(str(tmp_path), before)
    after = before | {"eval_split": "val", "model": {"flow": {"clip": 0.0, "steps": 10}}}
    same_experiment.check_same_experiment(str(tmp_path), after)


def test_micro_batches_are_part_of_a_tokenizers_experiment(tmp_path):
    for kind, refused in (("policy", False), ("tokenizer", True)):
        workdir = tmp_path / kind
        workdir.mkdir()
        before = CONFIG | {"model_kind": kind, "train": {"micro_batches": 1}}
        same_experiment.write_config(str(workdir), before)
        after = before | {"train": {"micro_batches": 2}}
        if refused:
            with pytest.raises(errors.UserError, match=r"train.micro_batches: 1 there, 2 here"):
                same_experiment.check_same_experiment(str(workdir), after)
        else:
            same_experiment.check_same_experiment(str(workdir), after)


def test_the_checkpoints_own_config_counts_where_config_json_is_gone():
    data = {"datasets": [], "weights": []}
    saved = {"config": CONFIG, "data": data | {"position": 16}, "step": 2}
    same_experiment.check_checkpoint(saved, CONFIG, {"data": data}, "runs/a", batch_size=8)
    with pytest.raises(errors.UserError, match=r"another experiment(.|\n)*seed: 0 there, 1 here"):
        same_experiment.check_checkpoint(saved, CONFIG | {"seed": 1}, {"data": {}}, "runs/a", batch_size=8)
