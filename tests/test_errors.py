"""Exit codes: what a supervisor may restart and what it must not."""

import errno
import subprocess
import sys

import multihost
import pytest

from qdepth_jax import checkpoint_read, distributed, errors


class Http(Exception):
    """As gcsfs raises them."""

    def __init__(self, code: int | dict):
        super().__init__(f"{code}")
        self.code = code


def from_(cause: Exception) -> errors.UserError:
    error = errors.UserError("/data/shard cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("no such field"), 2),
        (errors.TryAgain("no answer"), 75),
        (distributed.HostFailed("host 1: no answer", 75), 75),
        (distributed.HostFailed("host 1: KeyError", 1), 1),
        *((OSError(number, "x"), 75) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET)),
        *((OSError(number, "x"), 1) for number in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EMFILE)),
        (from_(OSError(errno.EIO, "Input/output error")), 75),
        (from_(OSError(errno.ENOENT, "No such file")), 2),
        (from_(from_(TimeoutError())), 75),
        (Http(503), 75),
        (Http(404), 1),
        (Http({}), 1),
        (ValueError("UNAVAILABLE: connection reset"), 75),
        (ValueError("the word UNAVAILABLE in a sentence"), 1),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (KeyError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_code(error, code):
    assert errors.exit_code(error) == code


@pytest.mark.parametrize("tool", ["convert_rlds.py", "convert_lerobot.py"])
def test_a_conversion_whose_disk_is_away_may_be_started_again(tool):
    program = (
        "import runpy, sys; from qdepth_jax import command, errors\n"
        f"tool = runpy.run_path('tools/{tool}')\n"
        "def convert(*_): raise errors.TryAgain('/data/shard cannot be read')\n"
        "tool['main'].__globals__['convert'] = convert\n"
        f"sys.argv = ['{tool}', *{['import'] if 'lerobot' in tool else []}, 'there', '--output=here']\n"
        "command.run(tool['main'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=multihost.ROOT)
    assert done.returncode == 75 and done.stderr.strip() == "error: /data/shard cannot be read", done.stderr


def test_missing_rights_below_another_error_are_no_reason_to_start_again():
    error = ValueError("cannot open the array")
    error.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    assert checkpoint_read._is_unavailable(error) and checkpoint_read._is_refused(error)
    error.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    assert checkpoint_read._is_unavailable(error) and not checkpoint_read._is_refused(error)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("errors.UserError('no')", 2, "error: no"),
        ("errors.TryAgain('later')", 75, "error: later"),
        ("OSError(5, 'Input/output error', '/data/shard')", 75, "Traceback"),  # from where nobody expected it
        ("KeyError('x')", 1, "Traceback"),
    ],
)
def test_a_command_ends_with_it(raised, code, said):
    program = f"""
from qdepth_jax import command, errors
def main(argv):
    raise {raised}
command.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=multihost.ROOT)
    assert done.returncode == code and said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), errors.TryAgain),
        (ValueError("RESOURCE_EXHAUSTED: rate limit"), errors.TryAgain),
        (PermissionError(errno.EACCES, "Permission denied"), errors.UserError),
        (ValueError("PERMISSION_DENIED: no rights"), errors.UserError),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_tried_again(tmp_path, cause, kind):
    def read():
        raise cause

    with pytest.raises(errors.UserError, match="no sign of damage") as found:
        checkpoint_read.together(lambda ok: ok, tmp_path, read)
    assert type(found.value) is kind
