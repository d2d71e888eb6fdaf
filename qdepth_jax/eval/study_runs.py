"""The figures that tools/run_study.py keeps of a study, read: variant or control -> seed -> run.

FOLDER/PART/VARIANT_SEED.json (training: cost, metrics), FOLDER/PART/VARIANT_SEED/{held_out,SUITE}.json, controls in
FOLDER/PART/CONTROL/SUITE.json, the cost of depth tokens in FOLDER/PART/{tokenizer,tokens}.json. Nothing is filled in,
and a seed counts when every suite of the part was run.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qdepth_jax import errors
from qdepth_jax.eval import study_jobs

BASELINE = "baseline"
START = "pretrained"  # the common start of all policies of a part that has one
CONTROLS = ("mean_action", "untrained")
SINGLE = (*CONTROLS, START)  # one run each, compared with nobody
SUCCESS, FAILURE, CRASH = "1", "0", "c"  # of an outcome string, one character for each start

# (suite/task, start) -> solved; a crash of the simulator is absent.
Outcomes = dict[tuple[str, int], bool]


@dataclasses.dataclass
class Run:
    """One seed of a variant, or a control: what its files say; {} and None where one is missing."""

    training: dict[str, Any]
    held_out: dict[str, Any]
    suites: dict[str, dict[str, Any]]
    outcomes: Outcomes | None
    crashed: frozenset[tuple[str, int]] = frozenset()


Rows = dict[str, dict[str, Run]]  # variant or control -> seed -> run


def collect(folder: pathlib.Path, suites: Sequence[str], variants: Sequence[str]) -> Rows:
    """What is there of a part.

    Raises:
      UserError: runs that were not made alike: other recipes (study_jobs.recipe), other numbers of training steps,
        other options of the evaluation.
    """
    rows: Rows = {}
    for variant in (*variants, *SINGLE):
        for path in sorted(folder.glob(variant if variant in SINGLE else f"{variant}_[0-9]*")):
            if path.is_dir():
                rows.setdefault(variant, {})[path.name.rpartition("_")[2]] = read(path, suites)
    alike: dict[str, dict[str, str]] = {}
    for variant, row in rows.items():
        for seed, run in row.items():
            said = {"training steps": run.held_out["step"]} if run.held_out else {}
            for suite, result in run.suites.items():
                options = ("step_cap", "execute", "image_size", "supersample", "max_steps", "simulator")
                said[f"options of {suite}"] = {name: result.get(name) for name in options}
            for content in (run.training, run.held_out, *run.suites.values()):
                if content:
                    alike.setdefault("recipes", {}).setdefault(content.get("recipe", "none"), f"{variant}, seed {seed}")
            for what, value in said.items():
                alike.setdefault(what, {}).setdefault(json.dumps(value), f"{variant}, seed {seed}")
    for what, values in alike.items():
        if len(values) > 1:
            listed = "; ".join(f"{value} ({where})" for value, where in values.items())
            raise errors.UserError(f"{folder}: {what} differ, these runs cannot be compared: {listed}")
    return rows


def read(path: pathlib.Path, suites: Sequence[str]) -> Run:
    """The run of folder PATH and of PATH.json."""
    found = {
        suite: study_jobs.read(file, "starts", "outcomes", "tasks")
        for suite in suites
        if (file := path / f"{suite}.json").exists()
    }
    training, held_out = path.with_name(path.name + ".json"), path / "held_out.json"
    outcomes, crashed = None, frozenset()
    if set(found) == set(suites):
        flags = {
            (task, result["starts"][0] + i): flag
            for result in found.values()
            for task, text in result["outcomes"].items()
            for i, flag in enumerate(text)
        }
        outcomes = {key: flag == SUCCESS for key, flag in flags.items() if flag != CRASH}
        crashed = frozenset(flags.keys() - outcomes.keys())
    return Run(
        study_jobs.read(training) if training.exists() else {},
        study_jobs.read(held_out, "step", "parameters", "actions") if held_out.exists() else {},
        found,
        outcomes,
        crashed,
    )


def judged(row: Mapping[str, Run]) -> dict[str, Outcomes]:
    """Seed -> outcomes, of the seeds whose every suite was run."""
    return {seed: run.outcomes for seed, run in row.items() if run.outcomes}


def rate(outcomes: Sequence[Outcomes], suite: str = "") -> tuple[int, int]:
    """(successes, episodes), of one suite or of all."""
    flags = [
        flag for found in outcomes for (task, _), flag in found.items() if task.startswith(f"{suite}/" if suite else "")
    ]
    return sum(flags), len(flags)


def both_finished(ours: Run, theirs: Run) -> tuple[Outcomes, Outcomes]:
    """Outcomes without the episodes in which either crashed."""
    crashed = ours.crashed | theirs.crashed
    return tuple({key: flag for key, flag in run.outcomes.items() if key not in crashed} for run in (ours, theirs))


def made_alike(ours: Run, theirs: Run) -> bool:
    """Whether two runs had the same data and the same start; where neither says what it had, that is not known."""
    known = [run.training.get("made_from") or {} for run in (ours, theirs)]
    return all(known[0].get(key) == known[1].get(key) for key in ("data", "start"))
