"""The jobs of the study, as --do=list names them; nothing is run."""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

TREE = pathlib.Path(__file__).resolve().parents[2]


def test_every_policy_of_a_part_starts_alike(tmp_path):
    ran = subprocess.run(
        [
            sys.executable, str(TREE / "tools" / "run_study.py"), f"--root={tmp_path}", f"--output={tmp_path}",
            "--do=list",
        ],
        capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    lines = dict(line.strip().split(": python ", 1) for line in ran.stdout.splitlines() if ": python " in line)
    trained = {name: line for name, line in lines.items() if "--config.seed=" in line}
    assert len(trained) == 36 and list(tmp_path.iterdir()) == []
    start = f"--config.init_from={tmp_path / 'libero' / 'pretrained'}"
    for name, line in trained.items():
        assert (start in line.split()) == name.startswith("libero/") and ("init_from" in line) == (start in line), name
    # The start is made before the first policy and judged on the same episodes, as itself.
    assert list(lines).index("libero/pretrained") < min(list(lines).index(name) for name in trained)
    judged = lines["libero/pretrained/libero_object"]
    assert "--policy=trained" in judged and f"--checkpoint={tmp_path / 'libero' / 'pretrained'} " in judged
    assert judged.split("--suite=")[1].split(" --output")[0] in lines["libero/qdepth_0/libero_object"]


def test_policies_with_figures_of_this_recipe_are_not_made_again_where_that_is_asked(tmp_path):
    root, output = tmp_path / "root", tmp_path / "kept"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TREE)}
    # Every figure of one policy, and nothing on this machine that made it.
    program = textwrap.dedent(f"""
        import itertools, json, pathlib
        from absl import flags
        from experiments import cpu_study
        from qdepth_jax.eval import study_jobs
        from tools import run_study
        flags.FLAGS(["run_study", "--root=unused"])
        root, output = pathlib.Path({str(root)!r}), pathlib.Path({str(output)!r})
        chains = run_study.plan(root, ["metaworld"], cpu_study.VARIANTS, ["0"])
        recipe = study_jobs.recipe(itertools.chain(*chains))
        for job in (job for job in itertools.chain(*chains) if "qdepth_0" in job.name or "_action" in job.name):
            path = output / (job.name + ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({{"recipe": recipe}}))
    """)
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
    command = [
        sys.executable, str(TREE / "tools" / "run_study.py"), f"--root={root}", f"--output={output}", "--do=list",
        "--parts=metaworld", "--variants=qdepth", "--skip_kept",
    ]  # fmt: skip

    def left(*flags):
        lines = subprocess.run([*command, *flags], capture_output=True, text=True, env=env, check=True).stdout
        return [line.strip().partition(":")[0] for line in lines.splitlines() if line.startswith(" ")]

    # The controls of seed 0 are not all there, so it is made again whole, and so is what it takes.
    assert left("--seeds=0")[0] == "demonstrations/metaworld" and "metaworld/qdepth_0" in left("--seeds=0")
    (output / "metaworld" / "untrained").mkdir()
    shutil.copy(*(output / "metaworld" / name / "metaworld_mt10.json" for name in ("mean_action", "untrained")))
    assert left("--seeds=0") == []
    # A seed is kept whole: qdepth is made again, for its baseline has to be made, and on other demonstrations.
    both = left("--variants=qdepth,baseline", "--seeds=0")
    assert "metaworld/qdepth_0" in both and "metaworld/baseline_0" in both
    assert left("--seeds=0,1")[-3:] == [f"metaworld/qdepth_1{end}" for end in ("", "/held_out", "/metaworld_mt10")]


def test_bad_flags_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for flags, said in {
        ("--root=",): "--root= is empty",
        (f"--root={tmp_path}", "--seeds=0,0"): "--seeds=0,0: name some of 0, 1, 2, each once",
        (f"--root={tmp_path}", "--variants="): "--variants=: name some of",
        (f"--root={tmp_path}/file/x", f"--output={tmp_path}/o"): "file/x cannot be made",
        (f"--root={tmp_path}", f"--output={tmp_path}/file/x"): f"--output={tmp_path}/file/x cannot be made",
    }.items():
        ran = subprocess.run(
            [sys.executable, str(TREE / "tools" / "run_study.py"), *flags],
            capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert ran.returncode == 2 and said in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def test_two_drivers_of_one_root_are_refused(tmp_path):
    with open(tmp_path / "lock", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = subprocess.run(
            [sys.executable, str(TREE / "tools" / "run_study.py"), f"--root={tmp_path}", f"--output={tmp_path}/o"],
            capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    assert ran.returncode == 2 and f"--root={tmp_path} is in use by another start" in ran.stderr
