"""What every command does alike: messages instead of tracebacks for bad input, and the experiment flag."""

import logging
import pathlib
import sys
import traceback
from collections.abc import Callable

from absl import app, flags

from qdepth_jax import errors


def run(main: Callable[[list[str]], int | None]) -> None:
    """`app.run(main)`; a UserError, a bad flag or a bad --config becomes a message on stderr and exit code 2.

    What is transient (errors.is_transient) ends with 75, also where it comes as a bare OSError.
    """

    def guarded(argv: list[str]) -> int:
        # Orbax tells its normal course at warning level through absl, and at error level, with tracebacks, what it also
        # raises; ours and JAX's messages come by other loggers.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("jax").setLevel(logging.WARNING)  # "no TPU found" is no news on a CPU
        try:
            return main(argv) or 0
        except errors.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return errors.exit_code(error)
        except KeyboardInterrupt:
            print("stopped; the same command, given again, continues from what is finished", file=sys.stderr)
            return errors.INTERRUPTED
        except Exception as error:
            if not errors.is_transient(error):
                raise
            traceback.print_exc()
            return errors.TRY_AGAIN

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
    except SystemExit:
        sys.exit(0)  # only --help and its kin end here; absl would say that they failed
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        # config_flags raises whatever the experiment file or the override raised; its text already says what.
        message = unknown_field(argv) if isinstance(error, KeyError | AttributeError) else ""
        message = message or str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        # ... and wraps it in a traceback; of our own messages only the message is for the user.
        print("error: " + message.rpartition("errors.UserError: ")[2].strip().replace("\\n", " "), file=sys.stderr)
        sys.exit(2)


def unknown_field(argv: list[str]) -> str:
    """A message if an override --config.a.b names a field that the experiment does not have."""
    from ml_collections import config_flags

    given = [(flag.lstrip("-").partition("="), following) for flag, following in zip(argv, [*argv[1:], ""])]
    found = [value if equals else following for (name, equals, value), following in given if name == "config"]
    again, bare = flags.FlagValues(), [argv[0], *(f"--config={path}" for path in found[-1:])]
    holder = config_flags.DEFINE_config_file("config", flag_values=again, sys_argv=bare)
    try:
        again(bare)
    except Exception:  # the experiment itself fails: its own message is the one to show
        return ""
    for (name, _, _), _ in given:
        section, walked = holder.value, "--config"
        for field in name.split(".")[1:] if name.startswith("config.") else []:
            if not hasattr(section, "keys") or field not in section:
                there = f"{walked} has {', '.join(sorted(section.keys()))}" if hasattr(section, "keys") else ""
                return f"--{name}: there is no field {field!r}; {there or f'{walked} has no fields'}"
            section, walked = section[field], f"{walked}.{field}"
    return ""


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
