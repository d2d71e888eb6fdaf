"""Configs: strict conversion, suggestions, and the messages a user sees on the command line."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from qdepth_jax import config as config_lib
from qdepth_jax import errors

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1
    rows: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner | None = Inner()
    rate: float = 0.5
    name: str = "x"
    table: str | tuple[tuple[str, ...], ...] = "r1"


def test_a_section_builds_back_into_its_dataclass():
    value = Outer(Inner(3, (("a", 1.0), ("b", 2.0))), 2.0, "y", (("p", "q"), ("r",)))
    section = config_lib.section(value)
    assert config_lib.build(Outer, section, "model") == value
    section.inner = None
    assert config_lib.build(Outer, section, "model").inner is None
    assert config_lib.build(Outer, {"rate": 2}, "model").rate == 2.0


def test_json_round_trip_builds_the_same():
    section = config_lib.section(Outer(Inner(3, (("a", 1.0),))))
    assert config_lib.build(Outer, config_lib.to_json(section), "model") == Outer(Inner(3, (("a", 1.0),)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"sise": 3}}, r'unknown config key model.inner.sise: did you mean "size"\?'),
        ({"zzz": 3}, "known keys are"),
        ({"inner": {"size": "3"}}, r"model.inner.size must be int, got '3'"),
        ({"inner": {"size": True}}, "must be int, got True"),
        ({"inner": 3}, "must be a section"),
        ({"inner": {"rows": 3}}, "must be a list"),
        ({"inner": {"rows": [["a", 1.0, 2.0]]}}, r"rows\[0\] must have 2 entries, got 3: \['a', 1.0, 2.0\]"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(errors.UserError, match=message):
        config_lib.build(Outer, values, "model")


@pytest.mark.parametrize("values", [{"clip_norm": 0.0}, {"eps": 0.0}, {"eps": float("nan")}])
def test_what_would_train_nothing_or_divide_by_zero_is_refused(values):
    (name,) = values
    with pytest.raises(errors.UserError, match=f"optim.{name}={values[name]} must be a number > 0"):
        config_lib.OptimConfig(**values)


def test_differences_name_the_leaf():
    a, b = {"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}, "w": 4}
    assert config_lib.differences(a, b) == ["w: '<absent>' there, 4 here", "x.z: 2 there, 3 here"]


def run_train(*flags):
    """The real command as a user types it; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "qdepth_jax.train", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_help_answers_without_importing_jax():
    lines = [
        "import sys, runpy",
        "sys.argv = ['train', '--help']",
        "try: runpy.run_module('qdepth_jax.train', run_name='__main__')",
        "except SystemExit as end: assert end.code == 0, end",
        "assert 'jax' not in sys.modules, 'heavy'",
    ]
    code = chr(10).join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout


BAD = {
    "unknown key": (["--config=experiments/demo.py", "--config.train.batch_sise=3"], "batch_size"),
    "unknown section key": (["--config=experiments/demo.py", "--config.optm.x=3"], "no field 'optm'; --config has aug"),
    "key of another section": (
        ["--config=experiments/demo.py", "--config.train.remat", "full"],
        "--config.train.remat: there is no field 'remat'; --config.train has batch_size",
    ),
    "a field of a number": (["--config=experiments/demo.py", "--config.seed.x=1"], "no field 'x'"),
    "missing file": (["--config=experiments/nothing.py"], "nothing.py"),
    "unknown recipe": (["--config=experiments/baseline.py:brigde"], "bridge"),
    "unknown suite": (["--config=experiments/libero.py:objects"], "object"),
    "missing data": (
        ["--config=experiments/demo.py:tokenizer", "--config.datasets.libero_object.path=nowhere/at/all"],
        "nowhere/at/all",
    ),
    "no tokenizer": (["--config=experiments/demo.py"], "--config.tokenizer"),
    "wrong tokenizer": (["--config=experiments/demo.py", "--config.tokenizer=nowhere"], "nowhere"),
    "batch": (["--config=experiments/demo.py:tokenizer", "--config.train.batch_size=7"], "batch_size=7"),
    "range": (
        ["--config=experiments/demo.py:tokenizer", "--config.model.range.kind=relative",
         "--config.model.range.near=1.0", "--config.model.range.far=0.0"],
        "has 'metric' depth",
    ),
    "range beside the data": (
        ["--config=experiments/demo.py:tokenizer", "--config.model.range.near=5.0", "--config.model.range.far=10.0"],
        "only 0.0% of the depth in the first batch lies inside the range 5.0..10.0",
    ),
    "codebook never starts": (
        ["--config=experiments/demo.py:tokenizer", "--config.train.total_steps=50"],
        "model.start_step=60 is not before train.total_steps=50",
    ),
    "interval": (["--config=experiments/demo.py", "--config.train.checkpoint_every=0"], "must be at least 1"),
    "text budget": (["--config=experiments/baseline.py:demo", "--config.model.text_length=6"], "max_text_tokens"),
    "no depth": (
        ["--config=experiments/tokenizer.py:bridge", "--config.datasets.bridge_dataset.path={bridge}"],
        "has no depth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_message_with_exit_code_two_and_writes_nothing(case, tmp_path, request):
    flags, expected = BAD[case]
    if any("{bridge}" in flag for flag in flags):
        bridge = request.getfixturevalue("bridge_dir")
        flags = [flag.format(bridge=bridge) for flag in flags] + [f"--config.data.index_dir={tmp_path / 'index'}"]
    if case == "batch":
        flags = [*flags, "--config.train.micro_batches=2"]
    workdir = tmp_path / "run"
    done = run_train(*flags, f"--workdir={workdir}")
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not workdir.exists() or not any(workdir.iterdir())


def test_every_config_file_is_json(tmp_path):
    from experiments import demo

    text = json.dumps(config_lib.to_json(demo.get_config("policy")))
    assert json.loads(text)["model"]["depth"]["grid"] == 8
