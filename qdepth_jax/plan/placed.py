"""A program as the TPU compiler leaves it before it writes machine code: optimised, with a place for every buffer.

All that a plan reads stands then. Machine code for a network of many large convolutions takes another ten minutes of a
core, so the compiler runs in a process of its own that is ended as soon as its report on memory is written.
"""

import dataclasses
import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from qdepth_jax import errors, files
from qdepth_jax.plan import program

_SETTLED = 2.0  # seconds after which a report that stands there is whole
_REPORT = "*.after_optimizations-memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Placed:
    """fits: False if refused for want of memory; needed: bytes a chip, arguments included, machine code not; text: the
    optimised program, "" if refused; seconds: of the compiler; message: its own words, if refused."""

    fits: bool
    needed: float
    text: str = ""
    seconds: float = 0.0
    message: str = ""
    cached: bool = False


def compile_placed(module: str, order: dict[str, Any], cache: str = "") -> Placed:
    """Runs `python -m module ORDER FOLDER`, which compiles with its dumps in FOLDER, until the buffers are placed.

    Args:
      module: its ending is awaited; what it prints goes to stderr. The libtpu of this environment is its own.
      order: JSON types. The key of the cache together with the source of models/ and video_depth.py.
      cache: folder of earlier results, "" = none.

    Raises:
      UserError: the compiler failed for another reason than memory.
    """
    path = None
    if cache:
        versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
        package = pathlib.Path(errors.__file__).parent
        sources = [
            file.read_text() for file in (*sorted((package / "models").glob("*.py")), package / "video_depth.py")
        ]
        digest = hashlib.sha256(json.dumps([versions, order, sources], sort_keys=True).encode()).hexdigest()[:24]
        path = pathlib.Path(cache) / f"placed-{digest}.json.gz"
        if path.exists():
            return dataclasses.replace(Placed(**json.loads(gzip.decompress(path.read_bytes()))), cached=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        errors_file = pathlib.Path(folder) / "stderr.txt"
        with open(errors_file, "w") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(order), folder], stdout=stderr, stderr=stderr
            )
            try:
                while child.poll() is None and not _report(folder):
                    time.sleep(0.5)
            finally:
                child.kill()
                child.wait()
        seconds = time.monotonic() - start
        if report := _report(folder):
            result = Placed(True, total_bytes(report), program._dumped(folder), seconds)
        else:
            message = errors_file.read_text()
            refused = program.refused(message)
            if refused is None:
                raise errors.UserError(f"the compiler failed: {message.strip()[-600:]}")
            result = Placed(False, refused.needed, "", seconds, message)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, gzip.compress(json.dumps(dataclasses.asdict(result)).encode()))
    return result


def _report(folder: str) -> str:
    """The report on memory of the largest program, "" while none is whole."""
    found = sorted(glob.glob(os.path.join(folder, _REPORT)), key=os.path.getsize)
    if not found or time.time() - os.path.getmtime(found[-1]) < _SETTLED:
        return ""
    return pathlib.Path(found[-1]).read_text()


def total_bytes(report: str) -> float:
    """Bytes of HBM (memory space `default`) of a report.

    Raises:
      ValueError: no such line: a libtpu that reports in another form.
    """
    found = re.search(r"Memory Space: default.*?\n\s*Total bytes: (\d+)", report, re.DOTALL)
    if found is None:
        raise ValueError(f"no total in the compiler's report on memory: {report[:200]!r}")
    return float(found.group(1))
