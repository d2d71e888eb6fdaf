"""What every command does alike: messages instead of tracebacks for bad input, and the experiment flag."""

import logging
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags

from qdepth_jax import errors


def run(main: Callable[[list[str]], int | None]) -> None:
    """`app.run(main)`; a UserError, a bad flag or a bad --config becomes a message on stderr and exit code 2."""

    def guarded(argv: list[str]) -> int:
        # Orbax tells its normal course at warning level through absl, and at error level, with tracebacks, what it also
        # raises; ours and JAX's messages come by other loggers.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("jax").setLevel(logging.WARNING)  # "no TPU found" is no news on a CPU
        try:
            return main(argv) or 0
        except errors.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped; the same command, given again, continues from what is finished", file=sys.stderr)
            return 130

    app.run(guarded, flags_parser=_parse)


def define_config() -> flags.FlagHolder:
    """--config=experiments/NAME.py[:args], with --config.a.b=value for any field."""
    from ml_collections import config_flags

    # Experiments import each other (`from experiments import libero`), wherever the command is started from.
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    return config_flags.DEFINE_config_file("config", None, "experiments/NAME.py[:args]", lock_config=True)


def _parse(argv: list[str]) -> list[str]:
    missing = _missing_experiment(argv)
    if missing:
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        # config_flags raises whatever the experiment file or the override raised; its text already says what.
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        # ... and wraps it in a traceback; of our own messages only the message is for the user.
        print("error: " + message.rpartition("errors.UserError: ")[2].strip().replace("\\n", " "), file=sys.stderr)
        sys.exit(2)


def _missing_experiment(argv: list[str]) -> str:
    """A message if --config names a file that is not there (config_flags would answer later, with a traceback)."""
    for flag, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = flag.lstrip("-").partition("=")
        if name == "config" and flag.startswith("-"):
            path = pathlib.Path((value if equals else following).split(":")[0])
            if not path.is_file():
                near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
                there = f"; {path.parent} holds {', '.join(near)}" if near else ""
                return f"--config={value or following}: there is no experiment file {str(path)!r}{there}"
    return ""
