"""Runs the study of experiments/cpu_study.py: demonstrations, tokens, every variant and seed, closed loop, tables.

  python tools/run_study.py --root=runs/study [--parts=metaworld,libero] [--seeds=0,1,2] [--hours=3] [--together=2]
  python tools/run_study.py --root=runs/study --do=list

Jobs are ordinary commands, each in a process of its own that continues where it was killed; a finished job leaves a
file and is not repeated, so start the command again as often as it takes. --hours stops before the next job.
Demonstrations and depth tokens come first, one job at a time; then --together policies at once, each on its share of
the cores. Figures of finished jobs are copied to --output (default docs/study), small enough to commit, and the tables
and plots there are written anew. To go on on another machine there is --skip_kept: seeds whose policies all have their
figures of this recipe in --output are not made again. Needs the `sim` extra. The last line of stdout is JSON.
"""

import functools
import importlib
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's experiments, wherever the command is started

from experiments import cpu_study  # noqa: E402
from qdepth_jax import command, errors, workdirs  # noqa: E402
from qdepth_jax.eval import study, study_jobs, study_runs  # noqa: E402
from qdepth_jax.eval.study_jobs import Job  # noqa: E402

_ROOT = flags.DEFINE_string("root", None, "folder of demonstrations, runs and logs", required=True)
_OUTPUT = flags.DEFINE_string("output", str(ROOT / "docs" / "study"), "folder of the figures to keep")
_PARTS = flags.DEFINE_list("parts", list(cpu_study.PARTS), "simulators")
_VARIANTS = flags.DEFINE_list("variants", list(cpu_study.VARIANTS), "variants")
_SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in cpu_study.SEEDS], "seeds of the training runs")
_HOURS = flags.DEFINE_float("hours", 0.0, "start no job after so many hours; 0 = no limit", lower_bound=0.0)
_PROCESSES = flags.DEFINE_integer("processes", 2, "parallel simulators, of all policies at once", lower_bound=1)
_TOGETHER = flags.DEFINE_integer("together", 1, "policies at once, each on its share of the cores", lower_bound=1)
_SKIP = flags.DEFINE_bool("skip_kept", False, "do not repeat a seed whose figures of this recipe are all in --output")
_DO = flags.DEFINE_enum("do", "run", ["run", "list", "report"], "run what is missing, list it, or write the tables")

CONTROLLED = (next(iter(cpu_study.VARIANTS)), str(cpu_study.SEEDS[0]))  # whose model the controls take
IMAGE_SIZE, SUPERSAMPLE = 128, 1  # of the demonstrations and of the evaluation alike


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    if not _ROOT.value:
        raise errors.UserError("--root= is empty: name a folder for demonstrations, runs and logs")
    for name, given, known in (
        ("parts", _PARTS.value, cpu_study.PARTS),
        ("variants", _VARIANTS.value, cpu_study.VARIANTS),
        ("seeds", _SEEDS.value, [str(seed) for seed in cpu_study.SEEDS]),
    ):
        if unknown := [item for item in given if item not in known]:
            raise errors.UserError(f"--{name}: {', '.join(unknown)} is unknown, use some of {', '.join(known)}")
        if not given or len(set(given)) < len(given):
            raise errors.UserError(f"--{name}={','.join(given)}: name some of {', '.join(known)}, each once")
    root, output = pathlib.Path(_ROOT.value).absolute(), pathlib.Path(_OUTPUT.value).absolute()
    if CONTROLLED[0] not in _VARIANTS.value or CONTROLLED[1] not in _SEEDS.value:
        print(f"no controls: they take model and statistics of {'_'.join(CONTROLLED)}", file=sys.stderr)
    chains = plan(root, _PARTS.value, _VARIANTS.value, _SEEDS.value)
    # Of all variants and of what is common: a change of any of them is another study.
    seed = [str(cpu_study.SEEDS[0])]
    recipes = {
        part: study_jobs.recipe([job for chain in plan(root, [part], cpu_study.VARIANTS, seed) for job in chain])
        for part in _PARTS.value
    }

    def left(chain: list[Job]) -> bool:
        if all(study_jobs.done(root, job) for job in chain):
            return False
        # Seeds are kept whole: what two machines made of one recipe differs, and is not compared.
        of = part_of(chain[0]), seed_of(chain[0])
        whole = itertools.chain(*(c for c in policies if (part_of(c[0]), seed_of(c[0])) == of))
        return not (_SKIP.value and all(study_jobs.kept(output, job, recipes[of[0]]) for job in whole))

    # Jobs of a chain use what those before them made: a policy with nothing left to do is left out whole.
    first, policies = chains[: len(_PARTS.value)], chains[len(_PARTS.value) :]
    wanted = [chain for chain in policies if left(chain)]
    needed = {part_of(chain[0]) for chain in wanted}
    first = [job for chain in first for job in chain if part_of(job) in needed]

    def keep() -> None:
        for part, recipe in recipes.items():
            # What all policies share stays as the machine had it that made the first of them.
            shared = lambda job: _SKIP.value and not seed_of(job) and study_jobs.kept(output, job, recipe)  # noqa: B023, E731
            jobs = [job for job in itertools.chain(*chains) if part_of(job) == part and not shared(job)]
            study_jobs.keep(root, output, jobs, recipe)
        suites = {name: tuple(part.suites.values()) for name, part in cpu_study.PARTS.items()}
        study.write(output, suites, {name: needs for name, (_, needs) in cpu_study.VARIANTS.items()})

    if _DO.value == "list":
        for job in itertools.chain(*chains):
            is_left = any(job in jobs for jobs in (first, *wanted)) and not study_jobs.done(root, job)
            print(f"{'      ' if is_left else 'done  '}{job.name}: python {' '.join(job.line)}")
    else:
        folder(output, "--output")
        for part, recipe in recipes.items():
            study_jobs.refuse_others(output, part, recipe)
    if _DO.value == "run":
        with workdirs.only_one(folder(root, "--root"), functools.partial(print, file=sys.stderr), "--root"):
            try:
                until = time.monotonic() + 3600 * _HOURS.value if _HOURS.value else float("inf")
                study_jobs.run_all(root, ROOT, [first], 1, until)
                study_jobs.run_all(root, ROOT, wanted, _TOGETHER.value, until)
            except BaseException:
                try:  # what is finished is kept
                    keep()
                except errors.UserError as error:
                    print(f"the tables were not written: {error}", file=sys.stderr)
                raise  # why it stopped is what has to be told
    if _DO.value != "list":
        keep()
    remaining = [job for job in itertools.chain(first, *wanted) if not study_jobs.done(root, job)]
    print(json.dumps({"jobs": sum(map(len, chains)), "left": len(remaining)}))


def folder(path: pathlib.Path, flag: str) -> pathlib.Path:
    """The folder, made where it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(f"{flag}={path} cannot be made ({error}): choose another") from error
    return path


def seed_of(job: Job) -> str:
    """The seed of a policy's jobs; "" of what several share, as the controls are."""
    _, _, seed = job.name.split("/")[1].rpartition("_")
    return seed if seed.isdecimal() else ""


def part_of(job: Job) -> str:
    """The part of the study that it is of."""
    first, _, second = job.name.partition("/")
    return first if first in cpu_study.PARTS else next(n for n, p in cpu_study.PARTS.items() if second in p.suites)


def plan(root: pathlib.Path, parts: Sequence[str], variants: Sequence[str], seeds: Sequence[str]) -> list[list[Job]]:
    """Chains of jobs: first one for each part that its others need, then one for each policy."""
    prepared = {part: prepare(root, part) for part in parts}
    judged = [chain for part in parts if (chain := judged_start(root, part, prepared[part]))]
    # Seeds outside of parts: a study cut short has every variant of both.
    return [*prepared.values(), *judged] + [
        policy(root, part, variant, seed, prepared[part]) for seed in seeds for part in parts for variant in variants
    ]


def prepare(root: pathlib.Path, part_name: str) -> list[Job]:
    """Demonstrations, the depth tokenizer and its tokens, the common start; each is done when all before it are."""
    part, jobs = cpu_study.PARTS[part_name], []

    def add(name: str, line: list[str], made: pathlib.Path, config: str = "", kept: pathlib.Path | None = None) -> None:
        jobs.append(Job(name, line, made, study_jobs.identity(root, ROOT, line, config, jobs), kept))

    for dataset, suite in part.suites.items():
        line = [
            "tools/collect_demos.py", f"--suite={dataset}", f"--tasks={','.join(tasks_of(suite))}",
            f"--episodes={part.demonstrations}", f"--val_episodes={part.held_out}", "--jpeg_quality=90",
            f"--image_size={IMAGE_SIZE}", f"--supersample={SUPERSAMPLE}", f"--output_dir={root / 'data'}",
            f"--processes={_PROCESSES.value}",
        ]  # fmt: skip
        data = root / "data" / dataset / "1.0.0"
        add(f"demonstrations/{dataset}", line, data / "dataset_info.json")
        add(f"index/{dataset}", ["tools/index_rlds.py", str(data.parent)], data / "qdepth_index")
    workdir, config = root / part_name / "tokenizer", f"experiments/cpu_study.py:{part_name},tokenizer"
    line = train_line(config, workdir, root, part_name)
    add(f"{part_name}/tokenizer", line, workdir, config_text(config))
    line = ["tools/tokenize_depth.py", f"--tokenizer={workdir}"]
    add(f"{part_name}/tokens", line, workdir / "tokens")
    if part.pretraining:
        workdir = root / part_name / study_runs.START
        config = f"experiments/{study_runs.BASELINE}.py:cpu_study,{part_name}"
        line = [
            *train_line(config, workdir, root, part_name), f"--config.train.total_steps={part.pretraining}",
            f"--config.train.eval_every={part.pretraining // 4}", "--config.train.checkpoint_every=500",
        ]  # fmt: skip
        add(f"{part_name}/{study_runs.START}", line, workdir, config_text(config), workdir / "metrics.jsonl")
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


def config_text(config: str) -> str:
    """The experiment that --config=experiments/NAME.py:ARGUMENT names, as text."""
    path, _, argument = config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return json.dumps(module.get_config(argument).to_dict(), sort_keys=True, default=str, ensure_ascii=False)


def policy(root: pathlib.Path, part_name: str, variant: str, seed: str, prepared: list[Job]) -> list[Job]:
    """Training, held-out figures and closed loop of one variant with one seed; once, of the controls, too."""
    part = cpu_study.PARTS[part_name]
    file, needs_tokens = cpu_study.VARIANTS[variant]
    config = f"experiments/{file}.py:cpu_study,{part_name}" if file else f"experiments/cpu_study.py:{part_name}"
    name, workdir = f"{part_name}/{variant}_{seed}", root / part_name / f"{variant}_{seed}"
    line = [*train_line(config, workdir, root, part_name), f"--config.seed={seed}"]
    if needs_tokens:
        line.append(f"--config.tokenizer={root / part_name / 'tokenizer'}")
    if part.pretraining:
        line.append(f"--config.init_from={root / part_name / study_runs.START}")
    of = study_jobs.identity(root, ROOT, line, config_text(config), prepared)
    train = Job(name, line, workdir, of, workdir / "metrics.jsonl")
    made = workdir / "held_out.json"
    line = [
        "tools/evaluate_offline.py", f"--policy={workdir}", f"--tokenizer={root / part_name / 'tokenizer'}",
        f"--output={made}",
    ]  # fmt: skip
    held_out = Job(f"{name}/held_out", line, made, study_jobs.identity(root, ROOT, line, "", [train]), made)
    loops = [
        closed_loop(root, f"{name}/{suite}", suite, part, workdir, workdir / suite, "trained", train)
        for suite in part.suites.values()
    ]
    if (variant, seed) == CONTROLLED:
        loops += [
            closed_loop(
                root, f"{part_name}/{kind}/{suite}", suite, part, workdir, root / part_name / kind / suite, kind, train
            )
            for kind in study_runs.CONTROLS
            for suite in part.suites.values()
        ]
    return [train, held_out, *loops]


def judged_start(root: pathlib.Path, part_name: str, prepared: list[Job]) -> list[Job]:
    """Closed loop of the common start; [] where every policy starts from random weights."""
    part, name = cpu_study.PARTS[part_name], f"{part_name}/{study_runs.START}"
    workdir = root / name
    return [
        closed_loop(root, f"{name}/{suite}", suite, part, workdir, workdir / suite, "trained", prepared[-1])
        for suite in part.suites.values()
        if part.pretraining
    ]


def closed_loop(
    root: pathlib.Path,
    name: str,
    suite: str,
    part: cpu_study.Part,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    kind: str,
    train: Job,
) -> Job:
    """One evaluation; kind: of `evaluate.py --policy`."""
    line = [
        "tools/evaluate.py", f"--policy={kind}", f"--checkpoint={workdir}", f"--suite={suite}",
        f"--episodes={part.episodes}", f"--execute={part.execute}", f"--image_size={IMAGE_SIZE}",
        f"--supersample={SUPERSAMPLE}", f"--processes={max(1, _PROCESSES.value // _TOGETHER.value)}", "--videos=0",
        "--failure_videos=0", f"--output={folder}",
    ]  # fmt: skip
    made = folder / "result.json"
    return Job(name, line, made, study_jobs.identity(root, ROOT, line, "", [train]), made)


if __name__ == "__main__":
    command.run(main)
