"""The jobs of the study, as --do=list names them; nothing is run."""

import os
import pathlib
import subprocess
import sys

TREE = pathlib.Path(__file__).resolve().parents[2]


def test_every_policy_of_a_part_starts_alike(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(TREE / "tools" / "run_study.py"), f"--root={tmp_path}", "--do=list"],
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
