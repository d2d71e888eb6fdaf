"""TPU slices by the names that plan_pod.py takes ("v5e:4x4", "2xv5e-256"): hosts, and what Cloud TPU and GKE call them.

Sources, as read in 2026: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (topologies, machines; names count TensorCores on
v4 and v5p, chips on v5e and v6e), cloud.google.com/tpu/docs/supported-tpu-versions (runtimes),
cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, machine types); AI-Hypercomputer/xpk keeps the same
table in system_characteristics.py.
"""

import dataclasses

from qdepth_jax import errors
from qdepth_jax.plan import topology


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU.

    Attributes:
      cloud: prefix of the accelerator type of Cloud TPU.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
      runtime: software version of a TPU VM.
      most: chips of the largest slice.
    """

    cloud: str
    gke: str
    runtime: str
    most: int


GENERATIONS = {
    "v4": Generation("v4", "tpu-v4-podslice", "tpu-ubuntu2204-base", 4096),
    "v5e": Generation("v5litepod", "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 256),
    "v5p": Generation("v5p", "tpu-v5p-slice", "v2-alpha-tpuv5", 6144),
    "v6e": Generation("v6e", "tpu-v6e-slice", "v2-alpha-tpuv6e", 256),
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """Equal slices; `chips`, `hosts` and `accelerator` ("v5litepod-16", its Cloud TPU name) are those of one.

    Attributes:
      name: "v5e". shape: "4x4". usual: the shape that its size has by default.
    """

    generation: Generation
    name: str
    shape: str
    usual: bool
    slices: int
    chips: int
    hosts: int
    chips_per_host: int
    accelerator: str


def parse(text: str) -> Slices:
    """Slices by any of plan_pod.py's names.

    2x4 is one host of eight chips where it is v5e or v6e (machine type ...-8t); every larger slice has hosts of four.

    Raises:
      UserError: no TPU, or a shape that it does not come in.
    """
    found = topology.parse(text)
    if found.chip.name not in GENERATIONS:
        raise errors.UserError(f"--topology={text}: TPUs are {', '.join(GENERATIONS)}; for GPUs see slurm.py")
    generation, shape = GENERATIONS[found.chip.name], found.shape
    usual = tuple(topology.SHAPES[found.chip.dimensions].values())
    cubes = len(shape) == 3 and list(shape) == sorted(shape) and min(shape) >= 4 and not any(n % 4 for n in shape)
    chips = found.chips_per_slice
    if chips > generation.most or not (shape in usual or cubes):
        names = ", ".join(_side(s) for s in usual)
        raise errors.UserError(
            f"--topology={text}: {found.chip.name} comes as {names}"
            f"{' or multiples of 4 in ascending order' if len(shape) == 3 else ''}, up to {generation.most} chips"
        )
    return Slices(
        generation=generation,
        name=found.chip.name,
        shape=_side(shape),
        usual=shape in usual,
        slices=found.slices,
        chips=chips,
        hosts=chips // found.chips_per_host,
        chips_per_host=found.chips_per_host,
        accelerator=f"{generation.cloud}-{chips * found.chip.cores}",
    )


def _side(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
