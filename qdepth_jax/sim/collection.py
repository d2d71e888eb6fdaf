"""Collects demonstrations over processes, resumably, and assembles the RLDS data set.

Attempt k of a task uses seed `base seed + k`; the first successful attempts in that order are the demonstrations, so
the result does not depend on the number of processes or on interruptions. Attempts are handed out in blocks (building
an environment takes seconds); a block ends where the attempts before it suffice. Every finished attempt leaves a file
in the work folder: a second run reads it instead of simulating.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tqdm

from qdepth_jax import config, errors, files
from qdepth_jax.data import write_rlds
from qdepth_jax.sim import demos, libero

BLOCK = 10  # attempts a process makes in one environment
METAWORLD = "metaworld"
OUTPUTS = "outputs.json"  # of a work folder


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to collect. episodes and val_episodes count successes per task; max_attempts bounds the tries per task."""

    suite: str
    tasks: tuple[int, ...]
    episodes: int
    val_episodes: int
    max_attempts: int
    seed: int
    max_steps: int | None  # None = the official cap of the suite
    encoding: demos.Encoding
    made_by: dict[str, str]  # versions of the simulator and of the expert

    @property
    def wanted(self) -> int:
        return self.episodes + self.val_episodes

    def identity(self) -> dict:
        """What must not change between runs that share a work folder. Counts may grow, tasks may be added."""
        return {
            "suite": self.suite,
            "seed": self.seed,
            "max_steps": self.max_steps,
            "made_by": self.made_by,
            **dataclasses.asdict(self.encoding),
        }


@dataclasses.dataclass(frozen=True)
class Attempt:
    number: int
    seed: int
    outcome: str
    steps: int
    note: str = ""


def collect(plan: Plan, work: Path, processes: int) -> tuple[dict[int, list[Attempt]], dict[int, str]]:
    """Runs attempts until every task has its episodes or used up its attempts.

    Returns the attempts of each task that count (`judged`), and for tasks that the expert cannot do the reason instead.
    """
    check_identity(plan, work)
    attempts = {task: judged(finished_attempts(work, task), plan.wanted) for task in plan.tasks}
    impossible: dict[int, str] = {}
    next_block = dict.fromkeys(plan.tasks, 0)
    total = plan.wanted * len(plan.tasks)
    with (
        worker_pool(processes) as pool,
        tqdm.tqdm(total=total, desc=plan.suite, unit="episode", disable=not sys.stderr.isatty()) as bar,
    ):
        running: dict[concurrent.futures.Future, int] = {}

        def submit(task: int) -> None:
            """Keeps as many blocks of the task under way as could still be needed."""
            if len(accepted(attempts[task])) >= plan.wanted:
                return
            # What later blocks have is worth counting, but only an earlier one can fill the gap before it.
            on_disk = len(accepted(finished_attempts(work, task)))
            under_way = sum(t == task for t in running.values())
            while (not under_way or under_way * BLOCK < plan.wanted - on_disk) and (
                next_block[task] * BLOCK < plan.max_attempts
            ):
                first = next_block[task] * BLOCK
                numbers = range(first, min(first + BLOCK, plan.max_attempts))
                next_block[task] += 1
                running[pool.submit(run_block, plan, str(work), task, numbers)] = task
                under_way += 1

        for task in plan.tasks:
            submit(task)
        while running:
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    reason = future.result()
                except concurrent.futures.process.BrokenProcessPool as error:
                    raise errors.UserError(
                        f"a simulator process was killed ({error}); each needs about 1.8 GB of memory: use fewer than "
                        f"--processes={processes}. Finished attempts are in {work}: the same command continues"
                    ) from error
                if reason:
                    impossible[task] = reason
                    continue
                attempts[task] = judged(finished_attempts(work, task), plan.wanted)
                have = [len(accepted(a)) for a in attempts.values()]
                bar.update(sum(have) - bar.n)
                if bar.disable:
                    print(f"{plan.suite}: {sum(have)} of {total} episodes", file=sys.stderr, flush=True)
                submit(task)
    return attempts, impossible


@contextlib.contextmanager
def worker_pool(processes: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that end at once when the block fails (Ctrl-C) or this process dies, whatever they are at."""
    context = multiprocessing.get_context("spawn")  # a forked GL context or simulator is not usable
    theirs, ours = context.Pipe(duplex=False)  # nothing is sent: its end tells them, and the system closes what we hold
    with theirs, ours:
        pool = concurrent.futures.ProcessPoolExecutor(processes, context, initializer=end_with, initargs=(theirs,))
        with pool:
            try:
                yield pool
            except BaseException:
                ours.close()
                raise


def end_with(parent: multiprocessing.connection.Connection) -> None:
    """In a worker: it ends when the other end of the pipe is closed. What it has finished is on disk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means

    def watch() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_block(plan: Plan, work: str, task: int, numbers: range) -> str:
    """One process's share: attempts in one environment. Returns why the expert cannot do the task, or ''."""
    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe: one rasteriser thread a process
    env = None
    for number in numbers:
        present = finished_attempts(Path(work), task)  # other blocks go on meanwhile
        if len(accepted(judged(present, plan.wanted))) >= plan.wanted:
            break
        if number not in {a.number for a in present}:
            if env is None:
                env, reason = make_env(plan, task)
                if reason:
                    env.close()
                    return reason
            run_attempt(plan, env, Path(work), task, number)
    if env is not None:
        env.close()
    return ""


def make_env(plan: Plan, task: int):
    """(environment, reason why its expert cannot do the task or '')."""
    if plan.suite == METAWORLD:
        from qdepth_jax.sim import metaworld

        return metaworld.MetaWorldEnv(task, plan.encoding.image_size, plan.encoding.supersample), ""
    from qdepth_jax.sim import expert

    listed = libero.list_tasks(plan.suite)
    env = libero.LiberoEnv(listed[task], plan.encoding.image_size, plan.encoding.supersample)
    return env, "; ".join(expert.unsupported(env))


def run_attempt(plan: Plan, env, work: Path, task: int, number: int) -> Attempt:
    """One attempt; its outcome, and its episode if it succeeded, are on disk when this returns."""
    seed = plan.seed + number
    folder = work / f"task_{task:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    steps, note = 0, ""
    try:
        if plan.suite == METAWORLD:
            outcome, track = demos.run_metaworld_expert(env, seed, plan.max_steps)
            encode = demos.encode_metaworld
        else:
            outcome, track = demos.run_libero_expert(env, seed, plan.max_steps)
            encode = demos.encode_libero
        steps = len(track["action"])
        if outcome == demos.SUCCESS:
            episode_id = f"{plan.suite}/task_{task:03d}/seed_{seed}"
            files.write_whole(folder / f"{number:05d}.episode", encode(env, seed, track, plan.encoding, episode_id))
    except libero.SimulatorFailure as error:
        outcome, note = demos.CRASHED, f"{type(error).__name__}: {error}"
    attempt = Attempt(number, seed, outcome, steps, note)
    files.write_whole(folder / f"{number:05d}.json", json.dumps(dataclasses.asdict(attempt)))
    return attempt


def judged(attempts: list[Attempt], wanted: int) -> list[Attempt]:
    """The attempts that count: from 0 on, up to the first that is missing or to the last success that is wanted."""
    counted, successes = [], 0
    for number, attempt in enumerate(attempts):
        if attempt.number != number or successes >= wanted:
            break
        counted.append(attempt)
        successes += attempt.outcome == demos.SUCCESS
    return counted


def accepted(attempts: list[Attempt]) -> list[Attempt]:
    """The successes among them."""
    return [a for a in attempts if a.outcome == demos.SUCCESS]


def finished_attempts(work: Path, task: int) -> list[Attempt]:
    """Attempts on disk, in order; one may be missing before another that a later block has made."""
    files = sorted((work / f"task_{task:03d}").glob("*.json"))
    return [Attempt(**json.loads(path.read_bytes())) for path in files]


def report(plan: Plan, attempts: dict[int, list[Attempt]], impossible: dict[int, str], names: list[str]) -> dict:
    """Prints one line per task and returns the figures for the summary."""
    tasks = {}
    for task in plan.tasks:
        if task in impossible:
            print(f"{task:3d} {names[task]}: not collected, {impossible[task]}")
            continue
        counts = Counter(a.outcome for a in attempts[task])
        kept = accepted(attempts[task])
        steps = [a.steps for a in kept]
        tasks[task] = {
            "name": names[task],
            "kept": len(kept),
            "attempts": len(attempts[task]),
            **{name: counts[name] for name in (demos.SUCCESS, demos.FAILED, demos.OVERLONG, demos.CRASHED)},
            "mean_steps": round(sum(steps) / len(steps), 1) if steps else None,
        }
        short = f"  SHORT OF {plan.wanted}" if len(kept) < plan.wanted else ""
        print(
            f"{task:3d} {names[task]}: expert {counts[demos.SUCCESS]}/{len(attempts[task])} "
            f"(failed {counts[demos.FAILED]}, over the step cap {counts[demos.OVERLONG]}, crashed "
            f"{counts[demos.CRASHED]}), kept {len(kept)}, mean steps {tasks[task]['mean_steps']}{short}"
        )
    return tasks


def assemble(
    plan: Plan, attempts: dict[int, list[Attempt]], work: Path, directory: Path, per_shard: int, version: str
) -> dict[str, write_rlds.Split]:
    """Writes the data set from the work folder. The last val_episodes of each task form split `val`.

    Episodes of the tasks alternate, so that a percentage slice of a split holds every task.

    Raises:
      UserError: see check_target.
    """
    check_target(work, directory)
    outputs = {*_outputs(work), os.path.relpath(directory, work)}
    files.write_whole(work / OUTPUTS, json.dumps(sorted(outputs)))
    name = directory.parent.name
    chosen: dict[str, list[tuple[int, int, Path]]] = {"train": [], "val": []}
    for task, tried in attempts.items():
        for rank, attempt in enumerate(accepted(tried)):
            split = "train" if rank < plan.episodes else "val"
            path = work / f"task_{task:03d}" / f"{attempt.number:05d}.episode"
            chosen[split].append((rank, task, path))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dataset_info.json").unlink(missing_ok=True)  # not whole until it is back
    splits = {}
    for split, items in chosen.items():
        paths = [path for _, _, path in sorted(items)]
        if not paths:
            continue
        shards = [paths[k : k + per_shard] for k in range(0, len(paths), per_shard)]
        splits[split] = write_rlds.write_split(directory, name, split, shards, Path.read_bytes)
    wanted = {
        write_rlds.shard_name(name, s.name, k, len(s.shard_lengths))
        for s in splits.values()
        for k in range(len(s.shard_lengths))
    }
    for stale in directory.glob(f"{name}-*.tfrecord-*"):
        if stale.name not in wanted:
            stale.unlink()
    size = plan.encoding.image_size
    tree = demos.metaworld_features(size) if plan.suite == METAWORLD else demos.libero_features(size)
    description = (
        f"Demonstrations of {plan.suite} by a scripted expert, rendered with true metric depth of the main view.\n"
        "Depth: u16 PNG in millimetres, 0 = invalid. Images and actions follow the published RLDS conventions."
    )
    write_rlds.write_metadata(directory, name, version, tree, list(splits.values()), description)
    return splits


def check_target(work: Path, directory: Path) -> None:
    """A data set is only written over one that came from the same work folder.

    Raises:
      UserError: the directory holds something else.
    """
    if directory.exists() and any(directory.iterdir()) and os.path.relpath(directory, work) not in _outputs(work):
        raise errors.UserError(
            f"{directory} is not empty and was not made from the attempts in {work}: choose another --output_dir, "
            "--name or --version, or delete it (what these attempts made is made of them again)"
        )


def check_growth(plan: Plan, directory: Path) -> None:
    """A data set may grow, but what is published stays, in its split: somebody may have trained on it.

    Raises:
      UserError: episodes that are there would go, or move between train and val.
    """
    if not (directory / "dataset_info.json").is_file():
        return
    try:
        published = demos.read_recordings(directory)
    except ValueError as error:
        raise errors.UserError(f"{error} Or delete {directory}: it is made of the same attempts again") from error
    held = Counter((episode.task_id, split) for split, episodes in published.items() for episode in episodes)
    tasks = sorted({task for task, _ in held})
    train, val = (max((held[task, split] for task in tasks), default=0) for split in ("train", "val"))
    # The episodes of val are those that come after the ones of train.
    moved = any(held[task, "val"] and held[task, "train"] < plan.episodes for task in tasks)
    if moved or train > plan.episodes or val > plan.val_episodes or not set(tasks) <= set(plan.tasks):
        listed, asked = (",".join(map(str, numbers)) for numbers in (tasks, plan.tasks))
        raise errors.UserError(
            f"{directory} holds --tasks={listed}, of each up to {train} episodes in train and {val} in val: "
            f"--tasks={asked} --episodes={plan.episodes} --val_episodes={plan.val_episodes} would take some of them "
            f"away or move them from one split to the other. Ask for these tasks or more, --episodes={train}"
            f"{'' if val else ' or more'} and --val_episodes={val} or more; for another data set choose another "
            "--version, --name or --output_dir, or delete this one"
        )


def _outputs(work: Path) -> list[str]:
    """Data sets that came from a work folder, as seen from it: both may be moved together."""
    path = work / OUTPUTS
    return json.loads(path.read_bytes()) if path.is_file() else []


def check_identity(plan: Plan, work: Path) -> None:
    """A work folder belongs to one suite, seed, encoding, simulator and expert; else data would be mixed silently."""
    path = work / "identity.json"
    if path.is_file():
        present = json.loads(path.read_bytes())
        if present != plan.identity():
            raise errors.UserError(
                f"{work} holds attempts that were made otherwise: "
                f"{'; '.join(config.differences(present, plan.identity()))}. "
                "Choose another --name, --output_dir or --work_dir, or delete that folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(plan.identity()))
