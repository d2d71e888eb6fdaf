"""TPU slices by the names that plan_pod.py takes ("v5e:4x4"): chips, hosts, and what Cloud TPU and GKE call them.

Sources, as read in 2026: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (topologies, hosts; names count TensorCores on v4
and v5p, chips on v5e and v6e), cloud.google.com/tpu/docs/supported-tpu-versions (runtimes),
cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, machine types); AI-Hypercomputer/xpk keeps the same
table in system_characteristics.py.
"""

import dataclasses
import math

from qdepth_jax import errors


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU.

    Attributes:
      cloud: prefix of the accelerator type of Cloud TPU. cores: that its number counts per chip.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
      runtime: software version of a TPU VM.
      sides: numbers in a topology. most: chips of the largest slice.
    """

    cloud: str
    cores: int
    gke: str
    runtime: str
    sides: int
    most: int


GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", 3, 4096),
    "v5e": Generation("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 2, 256),
    "v5p": Generation("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", 3, 6144),
    "v6e": Generation("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", 2, 256),
}

CHIPS_PER_HOST = 4  # of every slice of several hosts
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # all there is on v5e and v6e
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # then multiples of four in all directions


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice: `accelerator` is its Cloud TPU name, "v5litepod-16"."""

    generation: Generation
    topology: str
    chips: int
    hosts: int
    chips_per_host: int
    accelerator: str


def parse(text: str) -> Slice:
    """ "v5e:4x4" as a slice.

    2x4 is one host of eight chips where it is v5e or v6e (machine type ...-8t); every larger slice has hosts of four.

    Raises:
      UserError: an unknown generation or a topology that it does not come in.
    """
    name, colon, topology = text.partition(":")
    if not colon or name not in GENERATIONS:
        raise errors.UserError(
            f"--topology={text}: write GENERATION:SIDES, e.g. v5e:4x4; known: {', '.join(GENERATIONS)}"
        )
    generation = GENERATIONS[name]
    sides = [int(side) if side.isdecimal() else 0 for side in topology.split("x")]
    if generation.sides == 2:
        good, known = topology in _FLAT, ", ".join(_FLAT)
    else:
        cubes = len(sides) == 3 and sides == sorted(sides) and min(sides) >= 4 and not any(side % 4 for side in sides)
        good, known = topology in _SMALL_CUBES or cubes, f"{', '.join(_SMALL_CUBES)}, multiples of 4 in ascending order"
    chips = math.prod(sides)
    if not good or chips > generation.most:
        raise errors.UserError(f"--topology={text}: {name} comes as {known}, up to {generation.most} chips")
    whole = chips in (1, 8) and generation.sides == 2
    per_host = chips if whole else CHIPS_PER_HOST
    return Slice(
        generation, topology, chips, chips // per_host, per_host, f"{generation.cloud}-{chips * generation.cores}"
    )
