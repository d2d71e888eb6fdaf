"""What the main host of a run writes beside checkpoints: metrics.jsonl, TensorBoard event files, Weights & Biases.

Also config.json, command.txt (one line per start) and experiment.json (an id, the same over all starts).
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from qdepth_jax import distributed, errors, metrics, same_experiment, workdirs

Sink = tuple[Callable[[dict[str, Any]], None], Callable[[], None]]


class Logs(NamedTuple):
    """Where metric rows go. Without fields (hosts other than the main one) it takes them and writes nothing."""

    file: metrics.MetricsFile | None = None
    sinks: tuple[Sink, ...] = ()
    experiment_id: str = ""

    def write(self, row: dict[str, Any]) -> None:
        """One row everywhere."""
        if self.file is not None:
            self.file.write(row)
        for write, _ in self.sinks:
            write(row)

    def flush(self) -> None:
        """Rows are readable by others."""
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        """The end of the run, also of a failed one."""
        if self.file is not None:
            self.file.close()
        for _, close in self.sinks:
            close()


def start(
    workdir: str, config: dict[str, Any], step: int, command: str = "", use_tensorboard: bool = False, project: str = ""
) -> Logs:
    """Opens the logs of a start that begins after `step`; rows after it are moved aside.

    Args:
      config: the experiment as JSON types.
      command: what the user typed.
      use_tensorboard: write event files.
      project: of Weights & Biases, "" = none.
    """
    folder = workdirs.folder(workdir)
    found, sinks = experiment_id(folder), []
    if use_tensorboard:
        sinks.append(tensorboard(workdir, step + 1))
    if project:
        sinks.append(wandb(project, found, config.get("name", "train"), config, workdir))
    # Only now, when nothing can be refused any more: config.json makes the folder this experiment's.
    same_experiment.write_config(workdir, config)
    if command:
        path = folder / "command.txt"
        workdirs.write_whole(path, (path.read_text() if path.exists() else "") + command + "\n")
    return Logs(metrics.MetricsFile(folder / "metrics.jsonl", step), tuple(sinks), found)


def tensorboard(workdir: str, first_step: int) -> Sink:
    """Event files under WORKDIR/tensorboard; events of an earlier start from `first_step` on are superseded.

    Raises:
      UserError: WORKDIR is in a bucket: event files are appended to, which objects do not allow.
    """
    if workdirs.is_remote(workdir):
        raise errors.UserError(
            f"--tensorboard writes to local folders only, --workdir is {workdir}: pass --notensorboard and look at "
            "metrics.jsonl, or use --wandb"
        )
    import tensorboardX

    writer = tensorboardX.SummaryWriter(
        str(workdirs.folder(workdir) / "tensorboard"), purge_step=first_step, filename_suffix=f".{first_step}"
    )

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])

    return write, writer.close


def wandb(project: str, experiment_id: str, name: str, config: dict[str, Any], workdir: str) -> Sink:
    """A run of Weights & Biases that a restart continues: its id is the experiment's.

    Raises:
      UserError: the package is not installed, or it refuses to start (no login: WANDB_MODE=offline works without).
    """
    try:
        import wandb as package
    except ImportError as error:
        raise errors.UserError("--wandb needs the wandb package: pip install -e '.[wandb]'") from error
    local = str(workdir) if not workdirs.is_remote(workdir) else None
    try:
        run = package.init(project=project, id=experiment_id, name=name, config=config, dir=local, resume="allow")
    except Exception as error:  # whatever its client raises without network or login
        raise errors.UserError(
            f"--wandb={project}: wandb does not start ({error}); log in, or set WANDB_MODE=offline"
        ) from error

    def write(row: dict[str, Any]) -> None:
        run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    return write, run.finish


def experiment_id(folder: epath.Path) -> str:
    """The id of the experiment in `folder`, made at its first start."""
    path = folder / "experiment.json"
    if path.exists():
        try:
            return json.loads(path.read_text())["id"]
        except (ValueError, KeyError) as error:
            raise errors.UserError(f"{path} is damaged ({error}): delete it, the run then gets a new id") from error
    found = distributed.new_id()
    workdirs.write_whole(path, json.dumps({"id": found}))
    return found
