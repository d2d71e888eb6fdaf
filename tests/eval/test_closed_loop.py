"""Closed-loop evaluation with a simulator that costs nothing: order, faults, interruptions, what is refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import fake_simulator
import jax
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.eval import closed_loop, episodes, policies, rollout_video
from qdepth_jax.sim import simulator

TESTS = pathlib.Path(__file__).resolve().parents[1]


def options(**fields):
    return closed_loop.Options(**{"execute": 3, "processes": 0, "image_size": 8} | fields)


def noisy(batch=3, seed=0, log=None):
    """A policy whose actions depend on everything they may depend on. log: gets the size of each batch."""

    def one(query):
        rng = np.random.default_rng([policies.noise_seed(seed, query), query.plan, int(1e6 * (1 + query.state[0]))])
        bright = query.pictures["main"].mean() / 255
        return np.concatenate([rng.uniform(-0.02, 0.07 + 0.05 * bright, (4, 1)), rng.uniform(-1, 1, (4, 2))], 1)

    def plan(queries):
        if log is not None:
            log.append(len(queries))
        return [one(query) for query in queries]

    return policies.Policy({"policy": "noisy", "seed": seed}, plan, "fake", ("main",), batch, horizon=4)


def test_results_do_not_depend_on_the_number_of_processes(monkeypatch):
    tasks = [fake_simulator.task(0), fake_simulator.task(1)]
    sizes = []
    alone = closed_loop.evaluate(noisy(batch=1), tasks, range(6), options())
    monkeypatch.setenv("FAKE_SECONDS", "0.01")  # long enough for the others to start
    together = closed_loop.evaluate(noisy(log=sizes), tasks, range(6), options(processes=3))
    assert alone == together
    assert max(sizes) > 1  # there were batches
    assert [e.key[1:] for e in alone] == [(t, k) for t in (0, 1) for k in range(6)]
    assert {e.success for e in alone} == {True, False} and len({e.steps for e in alone}) > 3
    assert all(e.plans == -(-e.steps // 3) for e in alone)
    assert closed_loop.evaluate(noisy(seed=1), tasks, range(6), options()) != alone


def test_crashes_and_dead_workers_stand_apart_and_the_rest_goes_on(capfd):
    tasks = [fake_simulator.task(0, "crash=1 die=2")]
    found = closed_loop.evaluate(policies.expert(), tasks, range(4), options(processes=2))
    assert [e.success for e in found] == [True, False, False, True]
    assert found[1].crash == "SimulatorFailure: diverged"
    assert found[2].crash == "the simulator process died (signal SIGKILL)"
    assert found[0].crash == found[3].crash == "" and found[0].steps == 10
    assert "another takes its place" in capfd.readouterr().err
    assert episodes.summary(found)["suites"]["fake"] == {
        "successes": 2, "episodes": 2, "success_rate": 1.0, "interval_95": [0.3424, 1.0], "mean_steps": 10.0,
        "mean_steps_of_successes": 10.0, "crashes": 2,
    }  # fmt: skip


def test_a_worker_that_hangs_is_a_crash_too():
    found = closed_loop.evaluate(
        policies.expert(), [fake_simulator.task(0, "stuck=0")], range(2), options(processes=1, patience_s=1.5)
    )
    assert found[0].crash.startswith("the simulator process said nothing for") and found[1].success


def test_a_simulator_that_always_crashes_ends_the_evaluation(tmp_path):
    tasks = [fake_simulator.task(k, "crash=0") for k in range(12)]
    with pytest.raises(errors.UserError, match=r"the last 10 episodes all crashed.*diverged"):
        closed_loop.evaluate(policies.expert(), tasks, [0], options(), tmp_path)
    well = [dataclasses.replace(task, name="") for task in tasks]
    kept = closed_loop.evaluate(policies.expert(), well[:2], [0], options(), tmp_path)
    assert all(e.crash for e in kept)
    again = closed_loop.evaluate(policies.expert(), well[:2], [0], options(retry_crashes=True), tmp_path)
    assert all(e.success for e in again)
    assert closed_loop.evaluate(policies.expert(), well[:2], [0], options(), tmp_path) == again


def test_a_mistake_in_code_is_no_crash():
    tasks = [fake_simulator.task(0, "bug=1")]
    with pytest.raises(RuntimeError, match=r"fake bug=1, start 1:[\s\S]*no attribute 'no_such_thing'"):
        closed_loop.evaluate(policies.expert(), tasks, range(2), options())


def test_an_expert_that_gives_up_has_failed():
    found = closed_loop.evaluate(policies.expert(), [fake_simulator.task()], [41], options())
    assert not found[0].success and not found[0].crash and found[0].steps == 0


CHILD = """
import sys
sys.path[:0] = {paths!r}
import fake_simulator
from qdepth_jax.eval import closed_loop, policies
if __name__ == "__main__":
    folder, name = sys.argv[1:]
    tasks = [fake_simulator.task(k, name) for k in range(2)]
    options = closed_loop.Options(execute=3, processes=2, image_size=8)
    closed_loop.evaluate(policies.expert(), tasks, range(5), options, folder)
"""


def test_killed_in_the_middle_it_continues_to_the_same_file(tmp_path):
    """Killed with two workers, continued and run as a whole with none: the workers die with it, the files are equal."""
    script, pids = tmp_path / "child.py", tmp_path / "pids"
    script.write_text(CHILD.format(paths=[str(TESTS.parent), str(TESTS)]))
    pids.mkdir()
    name, killed, whole = f"crash=2 pids={pids}", tmp_path / "killed", tmp_path / "whole"
    environ = os.environ | {"FAKE_SECONDS": "0.05"}
    process = subprocess.Popen([sys.executable, str(script), str(killed), name], env=environ)
    log = killed / episodes.LOG
    while not (log.exists() and log.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = log.read_bytes()
    assert 3 < finished.count(b"\n") < 11
    log.write_bytes(finished + b'{"suite": "fa')  # as if it had been killed while it wrote
    deadline = time.monotonic() + 60
    while any(alive(int(pid.name)) for pid in pids.iterdir()):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    for folder in (killed, whole):
        tasks = [fake_simulator.task(k, name) for k in range(2)]
        found = closed_loop.evaluate(policies.expert(), tasks, range(5), options(), folder)
        episodes.write_results(folder, {"suite": "fake"}, found)
    assert log.read_bytes().startswith(finished)  # what was finished was not run again
    assert log.read_bytes().count(b"\n") == 11
    for name in (episodes.RESULT, episodes.TABLE):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def alive(pid):
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_log_belongs_to_one_policy_and_its_options(tmp_path):
    task = fake_simulator.task()
    closed_loop.evaluate(noisy(seed=3), [task], [0], options(), tmp_path)
    with pytest.raises(errors.UserError, match=r"policy\.seed: 3 there, 4 here\. Choose another --output"):
        closed_loop.evaluate(noisy(seed=4), [task], [0], options(), tmp_path)
    with pytest.raises(errors.UserError, match="execute: 3 there, 2 here; image_size: 8 there, 16 here"):
        closed_loop.evaluate(noisy(seed=3), [task], [0], options(execute=2, image_size=16), tmp_path)
    more = closed_loop.evaluate(noisy(seed=3), [task], range(2), options(), tmp_path)  # more starts are no difference
    assert more == closed_loop.evaluate(noisy(seed=3), [task], range(2), options())


def test_a_log_is_not_shared_and_damage_is_said(tmp_path):
    log = episodes.EpisodeLog(tmp_path, {"a": 1})
    with pytest.raises(errors.UserError, match="another evaluation writes"):
        episodes.EpisodeLog(tmp_path, {"a": 1})
    log.close()
    with open(tmp_path / episodes.LOG, "a") as file:
        file.write('{"suite": 3}\n')
    with pytest.raises(errors.UserError, match=r"line 2 of .* is damaged .*: delete that line, and its episode"):
        episodes.EpisodeLog(tmp_path, {"a": 1})


def test_videos_are_kept_by_start_whatever_finished_first(tmp_path, monkeypatch):
    """The first start and the first two failures, of which there are more; a second run changes nothing."""
    written = []

    def write(path, frames, label, rate_hz):
        path.parent.mkdir(exist_ok=True)
        path.write_text("video")
        written.append((path.name, len(frames), label, rate_hz))
        assert sum(len(frame.commands) for frame in frames) == 39 or "success" in path.name
        assert frames[0].picture.shape == (8, 8, 3) and frames[0].depth.shape == (8, 8)

    monkeypatch.setattr(rollout_video, "write", write)
    monkeypatch.setattr(rollout_video, "check_install", lambda: None)
    weak = policies.Policy({"policy": "weak"}, lambda qs: [strength(q) for q in qs], batch=4)
    asked = options(videos=1, failure_videos=2)
    order = [4, 0, 3, 1, 2]
    late = [(fake_simulator.task(cap=39), simulator.Start(k)) for k in order]
    closed_loop.run(weak, [late[0], late[2], late[4]], asked, tmp_path)
    jobs = [(fake_simulator.task(cap=39), simulator.Start(k)) for k in range(5)]
    found = closed_loop.run(weak, jobs, asked, tmp_path)
    kept = {
        "fake_task000_start000_success.mp4",
        "fake_task000_start001_failure.mp4",
        "fake_task000_start002_failure.mp4",
    }
    assert {p.name for p in (tmp_path / "videos").iterdir()} == {e.video for e in found if e.video} == kept
    assert {name: count for name, count, *_ in written}["fake_task000_start001_failure.mp4"] == 13 + 1
    assert {label for _, _, label, _ in written} == {"simulator's depth, m"}
    assert closed_loop.run(weak, jobs, asked, tmp_path) == found
    closed_loop.run(weak, [(fake_simulator.task(cap=39), simulator.Start(5))], asked, tmp_path)
    assert kept < {p.name for p in (tmp_path / "videos").iterdir()}  # other starts do not cost these their videos


def strength(query):
    """Reaches the goal from start 0 only."""
    return np.repeat(np.float32([[0.1 if query.start == 0 else 0.001, 0, 1]]), query.wanted, 0)


def test_predicted_depth_is_asked_for_in_batches_of_the_policy(tmp_path, monkeypatch):
    seen = []

    def depth(queries):
        seen.append(len(queries))
        return np.stack([np.full((4, 4), query.step, np.float32) for query in queries])

    def write(path, frames, label, rate_hz):
        assert [frame.depth[0, 0] for frame in frames] == [0, 3, 6, 9, 10]
        assert label == "predicted, m" and rate_hz == pytest.approx(10 / 3)

    monkeypatch.setattr(rollout_video, "write", write)
    monkeypatch.setattr(rollout_video, "check_install", lambda: None)
    policy = dataclasses.replace(noisy(), plan=lambda qs: [strength(q) for q in qs], horizon=0, depth=depth)
    policy = dataclasses.replace(policy, depth_label="predicted, m", batch=2)
    closed_loop.evaluate(policy, [fake_simulator.task()], [0], options(videos=1), tmp_path)
    assert seen == [2, 2, 1]


def test_frames_show_three_panels_and_the_range():
    ramp = np.linspace(0.5, 2.0, 64, dtype=np.float32).reshape(8, 8)
    frames = [rollout_video.Frame(np.full((8, 8, 3), 200, np.uint8), ramp, [-1.0] * k, [0.04] * k) for k in (0, 5, 5)]
    drawn = rollout_video.draw(frames, "simulator's depth, m")
    assert [x.shape for x in drawn] == [(rollout_video.PANEL, 3 * rollout_video.PANEL, 3)] * 3
    side = rollout_video.PANEL
    assert (drawn[0][:, :side] == 200).all()
    depth = drawn[0][20:, side : 2 * side, 0].astype(int)
    assert depth[0, 0] > depth[-1, -1]  # near is bright
    assert (drawn[2][:, 2 * side :] > 0).sum() > (drawn[1][:, 2 * side :] > 0).sum()
    far = [dataclasses.replace(frame, depth=np.where(ramp > 1.9, 80.0, ramp)) for frame in frames]
    again = rollout_video.draw(far, "simulator's depth, m")[0][20:, side : 2 * side, 0].astype(int)
    assert again[0, 0] - again[-1, 0] > 80  # a far background does not take the contrast
    inverse = rollout_video.draw(frames, "predicted, relative inverse depth")[0][20:, side : 2 * side, 0].astype(int)
    assert inverse[0, 0] < inverse[-1, -1]


def test_a_video_is_written_without_a_fork_of_this_process(tmp_path, monkeypatch):
    """JAX, once it has a device, warns of every fork in which hooks run."""
    pytest.importorskip("imageio_ffmpeg", reason="extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")
    monkeypatch.delenv("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", raising=False)
    jax.devices()
    frames = [rollout_video.Frame(np.zeros((8, 8, 3), np.uint8), None, [0.0], [0.0])] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollout_video.write(tmp_path / "video.mp4", frames, "none", 10.0)
    assert [str(warning.message) for warning in caught if "fork" in str(warning.message)] == []
    assert (tmp_path / "video.mp4").stat().st_size > 500 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("policy", "tasks", "starts", "fields", "message"),
    [
        (noisy(), [0], [0], {"execute": 5}, "this policy plans 4: use at most --execute=4"),
        (noisy(), [0], [50], {}, "has 50 starts, the last is 49, asked for is 50: ask for at most 50"),
        (noisy(), [0], [1, 1], {}, "asked for twice"),
        (noisy(), [], [0], {}, "no episodes"),
        (noisy(), [0], [0], {"videos": 1}, "videos need a folder"),
        (noisy(), [0], [0], {"processes": -1}, "processes at least 0"),
        (dataclasses.replace(noisy(), robot="libero"), [0], [0], {}, "a policy for libero cannot drive fake"),
    ],
)
def test_what_cannot_work_is_said_before_it_starts(policy, tasks, starts, fields, message):
    with pytest.raises(errors.UserError, match=message):
        closed_loop.evaluate(policy, [fake_simulator.task(k) for k in tasks], starts, options(**fields))


@pytest.mark.parametrize("chunk", [np.zeros((4, 2)), np.zeros(3), np.full((4, 3), np.nan)])
def test_a_wrong_chunk_is_the_policys_error(chunk):
    policy = dataclasses.replace(noisy(), plan=lambda queries: [chunk])
    with pytest.raises(ValueError, match="policy returned actions"):
        closed_loop.evaluate(policy, [fake_simulator.task()], [0], options())


def test_unknown_suites_and_tasks(monkeypatch):
    with pytest.raises(errors.UserError, match=r"unknown suite 'librero_object': libero_spatial, libero_object"):
        simulator.list_tasks("librero_object")
    monkeypatch.setattr(simulator, "ADAPTERS", (("fake", "fake_simulator"),))
    assert [t.task_id for t in simulator.list_tasks("fake", ["second"])] == [1]
    with pytest.raises(errors.UserError, match="suite 'fake' has no task '7'; it has: 0 first, 1 second"):
        simulator.list_tasks("fake", ["0", "7"])


def test_results_are_json_and_a_table(tmp_path):
    found = closed_loop.evaluate(policies.expert(), [fake_simulator.task(0, "crash=1")], range(3), options())
    whole = episodes.write_results(tmp_path, {"suite": "fake"}, found)
    read = json.loads((tmp_path / episodes.RESULT).read_text())
    assert {key: read[key] for key in whole} == whole
    assert [e["start"] for e in read["results"]] == [0, 1, 2] and "seconds" not in read["results"][0]
    lines = (tmp_path / episodes.TABLE).read_text().splitlines()
    assert lines[3] == "| **fake** | 2 | 2 | 100.0 % | 34.2 to 100.0 | 10.0 | 1 |"
    assert os.listdir(tmp_path) == [episodes.RESULT, episodes.TABLE] or len(os.listdir(tmp_path)) == 2


def test_wilson_interval_against_tabulated_values():
    assert episodes.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert episodes.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert episodes.wilson(0, 0) == (0.0, 1.0)
