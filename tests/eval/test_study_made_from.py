"""What a training run of a study says of its data and its start."""

import tiny_runs

from qdepth_jax import experiment, train_loop
from qdepth_jax.eval import study_jobs


def test_a_training_run_says_what_it_was_made_from(tmp_path):
    start = tmp_path / "start"
    train_loop.run_training(experiment.assemble(tiny_runs.config(train__total_steps=2)), str(start))
    config = tiny_runs.config(train__total_steps=2, init_from=str(start))
    train_loop.run_training(experiment.assemble(config), str(tmp_path / "run"))

    def made_from(line, run="run"):
        return study_jobs.made_from(study_jobs.Job("p/r_0", line, tmp_path / run, ""))

    found = made_from([f"--config.init_from={start}"])
    assert list(found["data"]) == ["libero_object", "libero_spatial"] and len(set(found["data"].values())) == 2
    assert found["tokens"] == "" and len(found["start"]) == 16
    assert made_from([])["start"] == "" and made_from([])["data"] == found["data"]
    assert made_from([f"--config.init_from={tmp_path / 'run'}"], "start")["start"] != found["start"]
