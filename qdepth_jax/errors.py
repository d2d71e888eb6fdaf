"""The one exception that a command shows as a plain message, and what its exit code tells a supervisor."""

import errno
import re

BAD_INPUT = 2  # the same command fails again: do not restart
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command may work later: restart, after a while
INTERRUPTED = 130  # Ctrl-C, as shells say it

# A disk, server or network that is away for now. Not here: a full disk, no rights, no such file, too many open files.
_AWAY = {
    errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ENETRESET,
}  # fmt: skip
# Clients of buckets raise whatever they like; the status code leads their message or stands in a field.
_STATUS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b")
_HTTP = {408, 429, *range(500, 600)}


class UserError(ValueError):
    """Input, configuration or environment is wrong. The message names the actual value and the fix.

    Commands print the message to stderr and exit with `exit_code(error)`; nothing has been overwritten by then.
    """

    exit_code: int | None = None  # of another host, where that one failed


class TryAgain(UserError):
    """Nothing is wrong with what the user gave: storage, network or another machine does not answer now."""


def exit_code(error: BaseException) -> int:
    """What a command ends with: TRY_AGAIN where the cause is transient, BAD_INPUT of a UserError, 1 of a crash.

    A UserError that was raised `from` a transient one is transient: whoever adds the path need not know errno.
    """
    if isinstance(error, UserError) and error.exit_code is not None:
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_transient(error):
        return TRY_AGAIN
    return BAD_INPUT if isinstance(error, UserError) else 1


def is_transient(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, goes away by itself: storage or network that is away."""
    while error is not None:
        if isinstance(error, TryAgain | TimeoutError | ConnectionError):
            return True
        if isinstance(error, OSError) and error.errno in _AWAY:
            return True
        # Of JAX too: a collective whose other side is gone.
        if not isinstance(error, UserError) and _STATUS.match(str(error)):
            return True
        found = [getattr(error, name, None) for name in ("code", "status")]  # of some clients a method or a dict
        if any(isinstance(value, int) and value in _HTTP for value in found):
            return True
        error = error.__cause__
    return False
