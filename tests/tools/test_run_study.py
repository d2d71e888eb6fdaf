"""The jobs of the study, as --do=list names them; nothing is run."""

import json
import os
import pathlib
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
    # Every figure of one part, and nothing on this machine that made it.
    program = textwrap.dedent(f"""
        import itertools, json, pathlib
        from absl import flags
        from tools import run_study
        flags.FLAGS(["run_study", "--root=unused"])
        chains = run_study.plan(pathlib.Path({str(root)!r}), ["metaworld"], ["qdepth"], ["0"])
        for job in itertools.chain(*chains):
            path = pathlib.Path({str(output)!r}) / (job.name + ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({{"identity": job.identity}}))
    """)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TREE)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
    command = [
        sys.executable, str(TREE / "tools" / "run_study.py"), f"--root={root}", f"--output={output}",
        "--parts=metaworld", "--variants=qdepth", "--seeds=0",
    ]  # fmt: skip

    def last_line(*flags):
        ran = subprocess.run([*command, *flags], capture_output=True, text=True, env=env)
        return json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else ran.stderr

    assert last_line("--do=list", "--skip_kept") == {"jobs": 9, "left": 0} and last_line("--do=list")["left"] == 9
    (output / "metaworld" / "qdepth_2.json").write_text("{}")
    said = last_line("--do=list", "--skip_kept")
    assert "1 files were made by another recipe" in said and "qdepth_2.json" in said, said
