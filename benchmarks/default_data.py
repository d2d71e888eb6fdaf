"""The data set that a benchmark reads when none is named."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def write(scratch: str) -> str:
    """That of make_dataset.py below `scratch`, written on first use, in a process of its own; returns its folder."""
    command = [sys.executable, str(ROOT / "benchmarks" / "make_dataset.py"), scratch]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    made = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(made.stdout.strip().splitlines()[-1])["directory"]
