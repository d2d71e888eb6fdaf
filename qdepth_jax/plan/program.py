"""The train step of an experiment, compiled for devices that are not there. Nothing of its data is opened."""

import dataclasses
import functools
import gzip
import hashlib
import json
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import experiment, files, optim, sharding, train_step
from qdepth_jax.models import flops, policy
from qdepth_jax.models import objective as objective_lib

# Raw images and depth maps: their size stands in the data, which a plan does not open. Most of Open-X is 256 x 256.
RAW_SIZE = (256, 256)


class Plan(NamedTuple):
    """What the step needs of an experiment. `state`: ShapeDtypeStructs of the train state; `parts`: models/flops."""

    objective: objective_lib.Objective
    tx: Any
    frozen: optim.FrozenTable
    train: config_lib.TrainConfig
    mesh: config_lib.MeshConfig
    ema_decay: float
    model: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    state: train_step.TrainState
    parts: dict[str, flops.Part]
    remat: str
    tokens: int


def plan_of(config: ml_collections.ConfigDict) -> Plan:
    """The experiment as far as a plan needs it.

    Raises:
      UserError: anything in the config that does not build.
    """
    experiment.check_keys(config)
    train = config_lib.build(config_lib.TrainConfig, config.train, "train")
    optim_config = config_lib.build(config_lib.OptimConfig, config.optim, "optim")
    model, objective = experiment.model_config(config), experiment.make_objective(config)
    is_policy = config.model_kind == "policy"
    frozen = policy.frozen_table(model) if is_policy else ()
    tx = optim.make(optim_config, train.total_steps, frozen)
    return Plan(
        objective=objective,
        tx=tx,
        frozen=(*frozen, *optim_config.frozen),
        train=train,
        mesh=config_lib.build(config_lib.MeshConfig, config.mesh, "mesh"),
        ema_decay=optim_config.ema_decay,
        model=model,
        batch=_batch(config, model, objective.features, train.batch_size),
        state=train_step.abstract_state(objective, tx, optim_config.ema_decay > 0),
        parts=flops.policy(model) if is_policy else flops.tokenizer(model),
        remat=model.remat if is_policy else "none",
        tokens=sum(model.sizes.values()) if is_policy else model.grid**2,
    )


def with_layout(plan: Plan, micro_batches: int, remat: str) -> Plan:
    """The same plan with other micro-batches and remat; the state and the model's own FLOPs stay."""
    train = dataclasses.replace(plan.train, micro_batches=micro_batches)
    model = dataclasses.replace(plan.model, remat=remat) if hasattr(plan.model, "remat") else plan.model
    return plan._replace(train=train, model=model, remat=remat)


def _batch(
    config: ml_collections.ConfigDict, model: Any, features: tuple[str, ...], size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch as data/batch_keys.py documents it."""
    raw = tuple(config.data.image_size or RAW_SIZE)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "depth": (raw, np.uint16),
        "depth_scale": ((), np.float32),
        "depth_offset": ((), np.float32),
        "position": ((), np.uint32),
    }
    if config.model_kind == "policy":
        steps = () if model.image_steps == 1 else (model.image_steps,)
        shapes |= {
            "text": ((model.text_length,), np.int32),
            "proprio": ((model.proprio_steps, model.proprio_dim), np.float32),  # read where there are proprio tokens
            "action": ((model.horizon, model.robot_action_dim), np.float32),
            "action_mask": ((model.horizon,), np.bool_),
            "view_mask": ((len(model.views),), np.bool_),
            **{f"image_{view}": ((*steps, *raw, 3), np.uint8) for view in model.views},
        }
        if model.depth is not None:
            shapes["depth_tokens"] = ((model.depth.tokens,), np.int32)
            shapes["depth_tokens_mask"] = ((model.depth.tokens,), np.bool_)
    return {key: jax.ShapeDtypeStruct((size, *shapes[key][0]), shapes[key][1]) for key in features}


def lower(plan: Plan, mesh: Mesh) -> jax.stages.Lowered:
    """The loop's own step with its shardings and donation, traced and partitioned for `mesh`; nothing is allocated.

    Raises:
      UserError: the batch or a leaf of the state does not divide.
    """
    sharding.check_batch(plan.train, mesh.shape)
    placed = sharding.state_shardings(mesh, plan.state)
    with_place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = functools.partial(
        train_step.train_step,
        objective=plan.objective,
        tx=plan.tx,
        frozen=plan.frozen,
        micro_batches=plan.train.micro_batches,
        ema_decay=plan.ema_decay,
        placed=placed.params,
    )
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=(placed, None)).lower(
            jax.tree.map(with_place, plan.state, placed),
            {k: with_place(x, NamedSharding(mesh, sharding.BATCH)) for k, x in plan.batch.items()},
            with_place(key, NamedSharding(mesh, P())),
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. Bytes are per chip.

    Attributes:
      fits: False if it was refused for want of memory; then only `needed`, `limit` and `message` are known.
      arguments, outputs, aliased, temporary, code: of XLA's memory analysis. needed: their sum, what is aliased once.
      limit: what the compiler lets a program use; 0 = not said.
      message: the compiler's own words, if refused.
      text: the compiled program. seconds: of compilation. cached: taken from the cache.
    """

    fits: bool
    needed: float
    limit: float = 0.0
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    temporary: float = 0.0
    code: float = 0.0
    message: str = ""
    text: str = ""
    seconds: float = 0.0
    cached: bool = False


def compile_step(lowered: jax.stages.Lowered, where: str, cache: str = "") -> Compiled:
    """Compiles; a program that needs too much memory is a result, not an error.

    Args:
      where: name of the topology, part of the cache's key.
      cache: folder of earlier results, "" = none. Equal programs are not compiled again.
    """
    path = None
    if cache:
        versions = f"{jax.__version__} {_libtpu_version()} {where}"
        digest = hashlib.sha256(f"{versions}\n{lowered.as_text()}".encode()).hexdigest()[:24]
        path = pathlib.Path(cache) / f"{digest}.json.gz"
        if path.exists():
            return dataclasses.replace(Compiled(**json.loads(gzip.decompress(path.read_bytes()))), cached=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # The text from a dump: XLA cannot print every program that it made (v5p ones with asynchronous updates),
            # and a refused one tells what it would have sent.
            program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            result = refused(str(error))
            if result is None:
                raise
        else:
            m = program.memory_analysis()
            result = Compiled(
                fits=True,
                needed=m.argument_size_in_bytes
                + m.output_size_in_bytes
                - m.alias_size_in_bytes
                + m.temp_size_in_bytes
                + m.generated_code_size_in_bytes,
                arguments=m.argument_size_in_bytes,
                outputs=m.output_size_in_bytes,
                aliased=m.alias_size_in_bytes,
                temporary=m.temp_size_in_bytes,
                code=m.generated_code_size_in_bytes,
            )
        result = dataclasses.replace(result, text=_dumped(folder), seconds=time.monotonic() - start)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, gzip.compress(json.dumps(dataclasses.asdict(result)).encode()))
    return result


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# As libtpu 0.0.52 says it, arguments included in spite of the words; and as older ones did.
_REFUSALS = (
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm",
)


def refused(message: str) -> Compiled | None:
    """The compiler's refusal for want of memory as a result, or None if the message says something else."""
    found = next((match for pattern in _REFUSALS if (match := re.search(pattern, message))), None)
    if found is None:
        return None
    used, limit = (float(found.group(n)) * _UNITS[found.group(n + 1)] for n in (1, 3))
    return Compiled(fits=False, needed=used, limit=limit, message=message)


def _dumped(folder: str) -> str:
    """The text of the largest program that XLA dumped, after all its optimisations; "" if there is none."""
    found = sorted(pathlib.Path(folder).glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else ""


def _libtpu_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("libtpu")
