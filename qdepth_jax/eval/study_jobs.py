"""Jobs of a study: commands in processes of their own, several at once, each done once and for all.

A finished job leaves ROOT/logs/NAME.done.json with what it was: its command, the config of the experiment, and the
jobs before it, as one digest. A job that is asked for with another digest is refused, not skipped: figures of two
recipes would stand in one table. What `keep` writes carries one digest of the whole study's part, too: figures that
were made on another machine count like a finished job where that is asked for, and eval/study.py refuses to put figures
of two recipes into one table. One recipe may give two data sets on two machines: training figures carry what they were
made from, and only what was made from the same is compared.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from qdepth_jax import errors, files


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
      name: PART/RUN/... ; line: arguments of python.
      made: a file or folder that is there when it is done; to make it again it has to go.
      identity: of what it makes, as JSON; paths below the study's root and the tree are no part of it.
      keep: its file with figures, .json or .jsonl, or None.
    """

    name: str
    line: Sequence[str]
    made: pathlib.Path
    identity: str
    keep: pathlib.Path | None = None


def identity(root: pathlib.Path, tree: pathlib.Path, line: Sequence[str], config: str, before: Sequence[Job]) -> str:
    """Digest of a command, of the config it trains with and of the jobs it builds on; --processes changes nothing."""
    places = sorted(((str(root), "ROOT"), (str(tree), "TREE")), key=lambda place: -len(place[0]))

    def placed(text: str) -> str:
        for path, name in places:
            text = re.sub(rf"(?<![^\s=\"',:]){re.escape(path)}(?=/|$|[\s\"',])", name, text)
        return text

    words = [placed(word) for word in line if not word.startswith("--processes=")]
    text = json.dumps([words, placed(config), [job.identity for job in before]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe(jobs: Sequence[Job]) -> str:
    """One digest of what these jobs are."""
    return hashlib.sha256("".join(job.identity for job in jobs).encode()).hexdigest()[:16]


def log_file(root: pathlib.Path, job: Job) -> pathlib.Path:
    return root / "logs" / (job.name.replace("/", "_") + ".log")


def done_file(root: pathlib.Path, job: Job) -> pathlib.Path:
    return log_file(root, job).with_suffix(".done.json")


def done(root: pathlib.Path, job: Job) -> bool:
    """Whether it is finished.

    Raises:
      UserError: what is there was made by another command or config.
    """
    file = done_file(root, job)
    if not file.exists() or not job.made.exists():
        return False
    found = read(file, "identity", "line", "revision")
    if found["identity"] != job.identity:
        raise errors.UserError(
            f"{job.name} in {root} was made by another recipe or command (python {' '.join(found['line'])}, revision "
            f"{found['revision'] or 'unknown'}) than this tree's (python {' '.join(job.line)}): use another --root, or "
            f"delete {file}, its .cost.json and {job.made} to make it again"
        )
    return True


def kept(output: pathlib.Path, job: Job, recipe: str) -> bool:
    """Whether its figures are in OUTPUT, made by this very recipe."""
    file = output / f"{job.name}.json"
    return file.exists() and read(file).get("recipe") == recipe


def read(file: pathlib.Path, *needed: str) -> dict[str, Any]:
    """A JSON object of this study.

    Raises:
      UserError: it is none, or has not what is needed.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError as error:  # JSON or UTF-8
        raise errors.UserError(
            f"{file} is damaged ({error}): delete it; what --root has is copied, the rest done again"
        ) from error
    if not isinstance(found, dict) or (missing := [name for name in needed if name not in found]):
        what = (
            f"lacks {', '.join(missing)}" if isinstance(found, dict) else f"is {type(found).__name__}, no JSON object"
        )
        raise errors.UserError(f"{file} {what}: delete it; what --root has is copied, the rest done again")
    return found


def refuse_others(output: pathlib.Path, part: str, recipe: str) -> None:
    """Before anything is computed: figures of a part that are in OUTPUT must be of this recipe.

    Raises:
      UserError: a file that is of another.
    """
    for file in sorted((output / part).rglob("*.json")):
        found = read(file)
        if found.get("recipe") != recipe:
            raise errors.UserError(
                f"{file} is of another recipe ({found.get('recipe')}, revision {found.get('revision') or 'unknown'}) "
                f"than this tree's ({recipe}): use another --output, or the tree of that revision"
            )


def run_all(
    root: pathlib.Path, tree: pathlib.Path, chains: Sequence[Sequence[Job]], together: int, until: float
) -> None:
    """Runs what is missing of the chains, each in its order, `together` at once, each on its share of the cores.

    No job starts after `until` (time.monotonic) or after one failed; the failure is raised when the others have ended.
    SIGTERM and Ctrl-C reach the running jobs.
    """
    missing = [left for chain in chains if (left := [job for job in chain if not done(root, job)])]
    left = itertools.count(sum(map(len, missing)), -1)
    living: set[subprocess.Popen] = set()
    stopping = threading.Event()
    cores, number = sorted(os.sched_getaffinity(0)), itertools.count()

    def pin() -> None:
        # Of this thread, and so of the processes it starts.
        os.sched_setaffinity(0, cores[next(number) % together :: together] or cores)

    def work(chain: Sequence[Job]) -> None:
        for job in chain:
            if stopping.is_set() or time.monotonic() > until:
                return
            # One write: print() sends the end of the line apart, and other threads come between.
            sys.stderr.write(f"{job.name}: {next(left)} jobs left, log {log_file(root, job)}\n")
            run(root, tree, job, living)

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


def run(root: pathlib.Path, tree: pathlib.Path, job: Job, living: set[subprocess.Popen]) -> None:
    """Runs one job to its end; what it cost is added up in ROOT/logs/NAME.cost.json, over restarts."""
    log = log_file(root, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    cost_file = log.with_suffix(".cost.json")
    began, code = time.monotonic(), revision(tree)
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *job.line], cwd=tree, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(tree)}
        )
    living.add(process)
    _, status, used = os.wait4(process.pid, 0)  # what this job used, not all that ran meanwhile
    process.returncode = os.waitstatus_to_exitcode(status)  # or it would be waited for again
    living.remove(process)
    spent = {"cpu_seconds": used.ru_utime + used.ru_stime, "wall_seconds": time.monotonic() - began}
    # Simulators of a command that was killed are nobody's children any more: then the sum is a lower bound.
    spent["interrupted"] = int(process.returncode != 0)
    earlier = read(cost_file) if cost_file.exists() else {}
    total = {key: round(value + earlier.get(key, 0.0), 2) for key, value in spent.items()}
    files.write_whole(cost_file, json.dumps(total))
    if process.returncode or not job.made.exists():
        tail = "\n".join(log.read_text().splitlines()[-5:])
        why = f"ended with code {process.returncode}" if process.returncode else f"did not make {job.made}"
        raise errors.UserError(f"{job.name} {why}, log {log}:\n{tail}")
    mark = {"identity": job.identity, "revision": code, "line": list(job.line)}
    files.write_whole(done_file(root, job), json.dumps(mark, indent=1))


def revision(tree: pathlib.Path) -> str:
    """Commit of a checkout, with "-dirty" where its code differs; "" where there is none."""
    git = ["git", "-C", str(tree)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # an unpacked archive: the identity says what was run
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    return head.stdout.strip() + ("-dirty" if changed else "")


def keep(root: pathlib.Path, output: pathlib.Path, jobs: Sequence[Job], recipe: str) -> int:
    """Copies figures of finished jobs, with recipe, cost and revision, to OUTPUT/NAME.json; returns their number."""
    finished = [job for job in jobs if done(root, job)]
    for job in finished:
        cost = log_file(root, job).with_suffix(".cost.json")
        content = {
            "recipe": recipe,
            # Null where it was not measured: something else made it.
            "cost": read(cost) if cost.exists() else None,
            "revision": read(done_file(root, job), "revision")["revision"],
        }
        if job.keep is not None and job.keep.name == "metrics.jsonl":
            content["made_from"] = made_from(job)
        target = output / f"{job.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(target, json.dumps(content | figures(job.keep), indent=1) + "\n")
    return len(finished)


def made_from(training: Job) -> dict[str, Any]:
    """What a run was made from: fingerprints of its data, identity of its depth tokens, digest of the start's weights.

    "tokens" and "start" are "" where it has none. Equal values are equal contents, on whatever machine they were made.
    """
    from qdepth_jax import checkpoint

    meta = checkpoint.read_meta(str(training.made))
    # Not where the checkpoint says that the start was: the folder may have been moved since.
    start = "".join(word.partition("=")[2] for word in training.line if word.startswith("--config.init_from="))
    if start:
        start = json.dumps(checkpoint.read_meta(start)["leaves"]["params"], sort_keys=True)
        start = hashlib.sha256(start.encode()).hexdigest()[:16]
    data = {item["name"]: item["fingerprint"] for item in meta["data"]["datasets"]}
    return {"data": data, "tokens": meta["tokenizer"], "start": start}


def figures(path: pathlib.Path | None) -> dict:
    """What is worth keeping of a job's file: the losses of metrics.jsonl, one character for each episode."""
    if path is None:
        return {}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {"metrics": [{k: _short(v) for k, v in row.items() if _is_figure(k)} for row in rows]}
    content = read(path)
    if "results" in content:
        outcomes: dict[str, str] = {}
        for row in sorted(content.pop("results"), key=lambda row: (row["suite"], row["task_id"], row["start"])):
            key = f"{row['suite']}/{row['task_id']}"
            outcomes[key] = outcomes.get(key, "") + ("c" if row["crash"] else str(int(row["success"])))
        content["outcomes"] = outcomes
        del content["checkpoint"]  # a path of this machine
    return content


def _is_figure(name: str) -> bool:
    return name == "step" or name.rpartition("/")[2] in ("loss", "flow_loss", "depth_loss", "depth_accuracy")


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
