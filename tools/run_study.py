"""Runs the study of experiments/cpu_study.py: demonstrations, tokens, every variant and seed, closed loop, tables.

  python tools/run_study.py --root=runs/study [--parts=metaworld,libero] [--seeds=0,1,2] [--hours=3] [--together=2]
  python tools/run_study.py --root=runs/study --do=list

Jobs are ordinary commands, each in a process of its own that continues where it was killed; a finished job leaves a
file and is not repeated, so start the command again as often as it takes. --hours stops before the next job.
Demonstrations and depth tokens come first, one job at a time; then --together policies at once, each on its share of
the cores. Figures of finished jobs are copied to --output (default docs/study), small enough to commit, and the tables
and plots there are written anew. Needs the `sim` extra. The last line of stdout is JSON.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's experiments, wherever the command is started

from experiments import cpu_study  # noqa: E402
from qdepth_jax import command, errors, files  # noqa: E402
from qdepth_jax.eval import study  # noqa: E402

_ROOT = flags.DEFINE_string("root", None, "folder of demonstrations, runs and logs", required=True)
_OUTPUT = flags.DEFINE_string("output", str(ROOT / "docs" / "study"), "folder of the figures to keep")
_PARTS = flags.DEFINE_list("parts", list(cpu_study.PARTS), "simulators")
_VARIANTS = flags.DEFINE_list("variants", list(cpu_study.VARIANTS), "variants")
_SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in cpu_study.SEEDS], "seeds of the training runs")
_HOURS = flags.DEFINE_float("hours", 0.0, "start no job after so many hours; 0 = no limit", lower_bound=0.0)
_PROCESSES = flags.DEFINE_integer("processes", 2, "parallel simulators, of all policies at once", lower_bound=1)
_TOGETHER = flags.DEFINE_integer("together", 1, "policies at once, each on its share of the cores", lower_bound=1)
_DO = flags.DEFINE_enum("do", "run", ["run", "list", "report"], "run what is missing, list it, or write the tables")

IMAGE_SIZE, SUPERSAMPLE = 128, 1  # of the demonstrations and of the evaluation alike


@dataclasses.dataclass(frozen=True)
class Job:
    """One command. `done` exists when it is finished; `keep`: its file that goes to --output/NAME.json, or None."""

    name: str
    line: list[str]
    done: pathlib.Path
    keep: pathlib.Path | None = None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    for name, given, known in (
        ("parts", _PARTS.value, cpu_study.PARTS),
        ("variants", _VARIANTS.value, cpu_study.VARIANTS),
        ("seeds", _SEEDS.value, [str(seed) for seed in cpu_study.SEEDS]),
    ):
        if unknown := [item for item in given if item not in known]:
            raise errors.UserError(f"--{name}: {', '.join(unknown)} is unknown, use some of {', '.join(known)}")
    root, output = pathlib.Path(_ROOT.value).absolute(), pathlib.Path(_OUTPUT.value).absolute()
    first = [job for part in _PARTS.value for job in prepare(root, part)]
    # Seeds outside of parts: a study cut short has every variant of both.
    chains = [
        policy(root, part, variant, seed)
        for seed in _SEEDS.value
        for part in _PARTS.value
        for variant in _VARIANTS.value
    ]
    last = [[job] for part in _PARTS.value for job in controls(root, part)]
    jobs = [*first, *(job for chain in [*chains, *last] for job in chain)]
    if _DO.value == "list":
        for job in jobs:
            print(f"{'done  ' if job.done.exists() else '      '}{job.name}: python {' '.join(job.line)}")
    if _DO.value == "run":
        until = time.monotonic() + 3600 * _HOURS.value if _HOURS.value else float("inf")
        for stage, together in (([first], 1), (chains, _TOGETHER.value), (last, _TOGETHER.value)):
            run_all(root, stage, together, until)
    left = sum(not job.done.exists() for job in jobs)
    if _DO.value != "list":
        kept = report(root, output, jobs)
    print(json.dumps({"jobs": len(jobs), "left": left} | ({} if _DO.value == "list" else {"kept": kept})))


def prepare(root: pathlib.Path, part_name: str) -> list[Job]:
    """Demonstrations, the depth tokenizer and its tokens."""
    part, jobs = cpu_study.PARTS[part_name], []
    for dataset, suite in part.suites.items():
        jobs.append(
            Job(
                f"demonstrations/{dataset}",
                [
                    "tools/collect_demos.py", f"--suite={dataset}", f"--tasks={','.join(tasks_of(suite))}",
                    f"--episodes={part.demonstrations}", f"--val_episodes={part.held_out}", "--jpeg_quality=90",
                    f"--image_size={IMAGE_SIZE}", f"--supersample={SUPERSAMPLE}", f"--output_dir={root / 'data'}",
                    f"--processes={_PROCESSES.value}",
                ],
                root / "data" / dataset / "1.0.0" / "dataset_info.json",
            )
        )  # fmt: skip
        index = ["tools/index_rlds.py", str(root / "data" / dataset)]
        jobs.append(Job(f"index/{dataset}", index, root / "logs" / f"index_{dataset}.done"))
    workdir = root / part_name / "tokenizer"
    line = train_line(f"experiments/cpu_study.py:{part_name},tokenizer", workdir, root, part_name)
    jobs.append(Job(f"{part_name}/tokenizer", line, workdir / "study.done"))
    jobs.append(
        Job(f"{part_name}/tokens", ["tools/tokenize_depth.py", f"--tokenizer={workdir}"], workdir / "tokens.done")
    )
    return jobs


def tasks_of(suite: str) -> list[str]:
    """Names or numbers for collect_demos, which knows Meta-World's 50 tasks as one suite."""
    if suite != "metaworld_mt10":
        return ["all"]
    from qdepth_jax.sim import metaworld_tasks

    return list(metaworld_tasks.MT10)


def train_line(config: str, workdir: pathlib.Path, root: pathlib.Path, part_name: str) -> list[str]:
    paths = [
        f"--config.datasets.{name}.path={root / 'data' / name / '1.0.0'}" for name in cpu_study.PARTS[part_name].suites
    ]
    return ["-m", "qdepth_jax.train", f"--config={config}", f"--workdir={workdir}", *paths]


def policy(root: pathlib.Path, part_name: str, variant: str, seed: str) -> list[Job]:
    """Training, held-out figures and closed loop of one variant with one seed."""
    part = cpu_study.PARTS[part_name]
    file, needs_tokens = cpu_study.VARIANTS[variant]
    config = f"experiments/{file}.py:cpu_study,{part_name}" if file else f"experiments/cpu_study.py:{part_name}"
    name, workdir = f"{part_name}/{variant}_{seed}", root / part_name / f"{variant}_{seed}"
    line = [*train_line(config, workdir, root, part_name), f"--config.seed={seed}"]
    if needs_tokens:
        line.append(f"--config.tokenizer={root / part_name / 'tokenizer'}")
    jobs = [Job(name, line, workdir / "study.done")]
    held_out = workdir / "held_out.json"
    line = [
        "tools/evaluate_offline.py", f"--policy={workdir}", f"--tokenizer={root / part_name / 'tokenizer'}",
        f"--output={held_out}",
    ]  # fmt: skip
    jobs.append(Job(f"{name}/held_out", line, held_out, held_out))
    for suite in part.suites.values():
        jobs.append(closed_loop(f"{name}/{suite}", part, suite, workdir, workdir / suite, "trained"))
    return jobs


def controls(root: pathlib.Path, part_name: str) -> list[Job]:
    """What needs no training, on the same episodes."""
    part, workdir = cpu_study.PARTS[part_name], root / part_name / f"{next(iter(cpu_study.VARIANTS))}_0"
    return [
        closed_loop(f"{part_name}/{kind}/{suite}", part, suite, workdir, root / part_name / kind / suite, kind)
        for suite in part.suites.values()
        for kind in study.CONTROLS
    ]


def closed_loop(
    name: str, part: cpu_study.Part, suite: str, workdir: pathlib.Path, folder: pathlib.Path, kind: str
) -> Job:
    """One evaluation; kind: of `evaluate.py --policy`."""
    line = [
        "tools/evaluate.py", f"--policy={kind}", f"--checkpoint={workdir}", f"--suite={suite}",
        f"--episodes={part.episodes}", f"--execute={part.execute}", f"--image_size={IMAGE_SIZE}",
        f"--supersample={SUPERSAMPLE}", f"--processes={max(1, _PROCESSES.value // _TOGETHER.value)}", "--videos=0",
        "--failure_videos=0", f"--output={folder}",
    ]  # fmt: skip
    return Job(name, line, folder / "result.json", folder / "result.json")


def log_file(root: pathlib.Path, job: Job) -> pathlib.Path:
    return root / "logs" / (job.name.replace("/", "_") + ".log")


def run_all(root: pathlib.Path, chains: list[list[Job]], together: int, until: float) -> None:
    """Runs what is missing of the chains, each in its order, `together` at once, each on its share of the cores.

    No job starts after `until` (time.monotonic) or after one failed; the failure is raised when the others have ended.
    """
    missing = [chain for chain in ([job for job in chain if not job.done.exists()] for chain in chains) if chain]
    left = itertools.count(sum(map(len, missing)), -1)
    living: set[subprocess.Popen] = set()
    stopping = threading.Event()
    cores, number = sorted(os.sched_getaffinity(0)), itertools.count()

    def pin() -> None:
        # Of this thread, and so of the processes it starts.
        os.sched_setaffinity(0, cores[next(number) % together :: together] or cores)

    def work(chain: list[Job]) -> None:
        for job in chain:
            if stopping.is_set() or time.monotonic() > until:
                return
            # One write: print() sends the end of the line apart, and other threads come between.
            sys.stderr.write(f"{job.name}: {next(left)} jobs left, log {log_file(root, job)}\n")
            run(root, job, living)

    def terminate(*_) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, terminate)
    pool = futures.ThreadPoolExecutor(together, initializer=pin)
    try:
        for future in futures.as_completed([pool.submit(work, chain) for chain in missing]):
            future.result()
    except KeyboardInterrupt:
        stopping.set()
        for process in list(living):
            process.terminate()  # a training run saves its step
        raise
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, earlier)


def run(root: pathlib.Path, job: Job, living: set[subprocess.Popen]) -> None:
    """Runs one job to its end; what it cost is added up in ROOT/logs/NAME.cost.json, over restarts."""
    log = log_file(root, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    cost_file = log.with_suffix(".cost.json")
    began = time.monotonic()
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *job.line], cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    living.add(process)
    _, status, used = os.wait4(process.pid, 0)  # what this job used, not all that ran meanwhile
    process.returncode = os.waitstatus_to_exitcode(status)  # or it would be waited for again
    living.remove(process)
    spent = {"cpu_seconds": used.ru_utime + used.ru_stime, "wall_seconds": time.monotonic() - began}
    earlier = json.loads(cost_file.read_text()) if cost_file.exists() else {}
    total = {key: round(value + earlier.get(key, 0.0), 1) for key, value in spent.items()}
    files.write_whole(cost_file, json.dumps(total))
    if process.returncode:
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise errors.UserError(f"{job.name} ended with code {process.returncode}, log {log}:\n{tail}")
    if not job.done.exists():
        files.write_whole(job.done, "")


def report(root: pathlib.Path, output: pathlib.Path, jobs: list[Job]) -> int:
    """Copies the figures of finished jobs, with their cost, and writes tables and plots; returns how many there are."""
    kept = 0
    for job in jobs:
        cost = log_file(root, job).with_suffix(".cost.json")
        if not job.done.exists() or not cost.exists():
            continue
        content = json.loads(job.keep.read_text()) if job.keep else {}
        content.pop("results", None)  # one line per episode: in the run's folder
        target = output / f"{job.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(target, json.dumps({"cost": json.loads(cost.read_text())} | content, indent=1) + "\n")
        kept += 1
    study.write(output, list(cpu_study.PARTS), list(cpu_study.VARIANTS))
    return kept


if __name__ == "__main__":
    command.run(main)
