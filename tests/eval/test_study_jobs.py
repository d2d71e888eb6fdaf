"""Jobs of a study: done once, never mixed, stopped together. The jobs are one-line programs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from qdepth_jax import errors
from qdepth_jax.eval import study_jobs

TREE = pathlib.Path(__file__).resolve().parents[2]
NEVER = float("inf")


def job(root, name, program, config="", before=()):
    made = root / name / "made"
    line = ["-c", f"import os, pathlib; made = pathlib.Path({str(made)!r}); {program}"]
    return study_jobs.Job(name, line, made, study_jobs.identity(root, TREE, line, config, before))


WRITE = "made.parent.mkdir(parents=True, exist_ok=True); made.open('a').write('x')"


def test_a_finished_job_is_not_repeated_and_its_figures_are_kept(tmp_path):
    jobs = [job(tmp_path, name, WRITE) for name in ("a", "b")]
    for _ in range(2):
        study_jobs.run_all(tmp_path, TREE, [jobs], 1, NEVER)
    assert [j.made.read_text() for j in jobs] == ["x", "x"]
    assert study_jobs.keep(tmp_path, tmp_path / "kept", jobs, "r") == 2
    kept = json.loads((tmp_path / "kept" / "a.json").read_text())
    assert kept["cost"]["cpu_seconds"] > 0 and set(kept) == {"recipe", "cost", "revision"}


def test_a_made_file_alone_is_not_a_finished_job(tmp_path):
    one = job(tmp_path, "a", WRITE)
    one.made.parent.mkdir()
    one.made.write_text("half")
    study_jobs.run_all(tmp_path, TREE, [[one]], 1, NEVER)
    assert one.made.read_text() == "halfx" and study_jobs.done(tmp_path, one)


def test_another_recipe_is_refused_not_skipped(tmp_path):
    first = job(tmp_path, "a", WRITE, config="steps: 1000")
    study_jobs.run_all(tmp_path, TREE, [[first]], 1, NEVER)
    other = job(tmp_path, "a", WRITE, config="steps: 2000")
    with pytest.raises(errors.UserError, match=r"a in .* was made by another recipe .* delete .*a.done.json"):
        study_jobs.done(tmp_path, other)
    # What is built on it, too; --processes and the place of the folder are no part of a recipe.
    assert job(tmp_path, "b", WRITE, before=[first]).identity != job(tmp_path, "b", WRITE, before=[other]).identity
    elsewhere = tmp_path / "moved"
    assert job(elsewhere, "a", WRITE).identity == job(tmp_path, "a", WRITE).identity
    alike = [study_jobs.identity(tmp_path, TREE, ["x", f"--processes={n}"], "", ()) for n in (1, 2)]
    assert alike[0] == alike[1]


def test_figures_of_another_recipe_are_not_taken_for_these(tmp_path):
    one, output = job(tmp_path, "a", WRITE), tmp_path / "kept"
    recipe = study_jobs.recipe([one])
    assert not study_jobs.kept(output, one, recipe)
    study_jobs.run_all(tmp_path, TREE, [[one]], 1, NEVER)
    study_jobs.keep(tmp_path, output, [one], recipe)
    assert study_jobs.kept(output, one, recipe)
    assert not study_jobs.kept(output, one, study_jobs.recipe([job(tmp_path, "a", WRITE, config="steps: 2000")]))


def test_figures_of_another_recipe_are_refused_before_anything_is_computed(tmp_path):
    one, output = job(tmp_path, "part/a", WRITE), tmp_path / "kept"
    study_jobs.refuse_others(output, "part", "r")
    study_jobs.run_all(tmp_path, TREE, [[one]], 1, NEVER)
    study_jobs.keep(tmp_path, output, [one], "r")
    study_jobs.refuse_others(output, "part", "r")
    with pytest.raises(errors.UserError, match=r"part/a.json is of another recipe \(r, revision .*this tree's \(s\)"):
        study_jobs.refuse_others(output, "part", "s")
    study_jobs.refuse_others(output, "other", "s")


@pytest.mark.parametrize("root", ["/data", "/m", "/work", "/home/j\u00fcrgen/st", "/opt/tree/runs/study"])
def test_the_same_command_has_the_same_digest_wherever_it_lies(root):
    def digest(root, tree):
        line = ["tools/collect.py", f"--data={root}/data/metaworld", f"--root={root}", "--metaworld", "--more=/mount/x"]
        config = json.dumps({"text": f"{tree}/data/text.model", "data": "datasets/study"}, ensure_ascii=False)
        return study_jobs.identity(pathlib.Path(root), pathlib.Path(tree), line, config, ())

    assert digest(root, "/opt/tree") == digest(root, root + "/sub/tree") == digest("/a/b", "/c/d")


def test_a_failure_is_told_and_stops_what_has_not_begun(tmp_path):
    chain = [job(tmp_path, "a", "print('no room'); raise SystemExit(3)"), job(tmp_path, "b", WRITE)]
    with pytest.raises(errors.UserError, match=r"a ended with code 3, log .*\n(.*\n)*no room"):
        study_jobs.run_all(tmp_path, TREE, [chain], 1, NEVER)
    assert not chain[1].made.exists()
    assert study_jobs.read(tmp_path / "logs" / "a.cost.json")["interrupted"] == 1
    with pytest.raises(errors.UserError, match="did not make"):
        study_jobs.run_all(tmp_path, TREE, [[job(tmp_path, "c", "pass")]], 1, NEVER)


def test_no_job_begins_after_the_time_is_up(tmp_path):
    one = job(tmp_path, "a", WRITE)
    study_jobs.run_all(tmp_path, TREE, [[one]], 1, until=time.monotonic() - 1)
    assert not one.made.exists() and not study_jobs.done(tmp_path, one)


def test_together_each_has_its_share_of_the_cores(tmp_path):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    say = f"{WRITE}; made.write_text(str(sorted(os.sched_getaffinity(0)))); import time; time.sleep(0.3)"
    chains = [[job(tmp_path, name, say)] for name in ("a", "b")]
    study_jobs.run_all(tmp_path, TREE, chains, 2, NEVER)
    shares = [set(json.loads(chain[0].made.read_text())) for chain in chains]
    assert shares[0] | shares[1] == cores and not shares[0] & shares[1]
    assert os.sched_getaffinity(0) == cores


def test_sigterm_reaches_the_jobs(tmp_path):
    program = f"""
        import pathlib, sys, time
        sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
        import test_study_jobs as t
        from qdepth_jax.eval import study_jobs
        root = pathlib.Path({str(tmp_path)!r})
        sleep = t.WRITE + "; import time; time.sleep(60)"
        chains = [[t.job(root, name, sleep), t.job(root, name + "2", t.WRITE)] for name in "ab"]
        study_jobs.run_all(root, t.TREE, chains, 2, t.NEVER)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE)
    while not all((tmp_path / name / "made").exists() for name in "ab"):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert not (tmp_path / "a2").exists() and not list(tmp_path.glob("logs/*.done.json"))


def test_figures_worth_keeping(tmp_path):
    rows = [
        {"suite": "s", "task_id": 1, "start": 1, "success": False, "crash": ""},
        {"suite": "s", "task_id": 1, "start": 0, "success": True, "crash": ""},
        {"suite": "s", "task_id": 0, "start": 0, "success": False, "crash": "diverged"},
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"checkpoint": "/somewhere", "starts": [0, 1], "results": rows}))
    assert study_jobs.figures(path) == {"starts": [0, 1], "outcomes": {"s/0": "c", "s/1": "10"}}
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.123456789, "grad_norm": 3.0}\n{"step": 1, "val/flow_loss": 2.0}\n')
    assert study_jobs.figures(path) == {"metrics": [{"step": 1, "loss": 0.12346}, {"step": 1, "val/flow_loss": 2.0}]}
