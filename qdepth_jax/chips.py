"""What data sheets say about accelerators: arithmetic, memory and network, the denominators of every plan and MFU.

Rates are peaks. Bandwidths are one way, in bytes a second: a link named "900 GB/s bidirectional" stands here with 450.

Sources, as read in 2026:
  v4    cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s, 3D torus, 4 chips a host
  v5e   cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, ICI 1600 Gbit/s, DCN 6.4 Tbit/s a pod of 256
  v5p   docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, ICI 1200 GB/s both ways, DCN 50 Gbit/s
  v6e   docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1640 GB/s, ICI 3584 Gbit/s, DCN 25.6 Tbit/s a pod
  book  jax-ml.github.io/scaling-book/tpus: bytes a second of one ICI link, wraparound links, 25 GB/s for a v4 host
  A100  NVIDIA's data sheet (80 GB, SXM): 312 TFLOP/s dense, 2039 GB/s, NVLink 600 GB/s; DGX A100: 8 x 200 Gbit/s
  H100  NVIDIA's data sheet (SXM): 989.4 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 8 x 400 Gbit/s
  H200  NVIDIA's data sheet (SXM): the H100's arithmetic, 141 GB, 4.8 TB/s; DGX H200: 8 x 400 Gbit/s
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as in "v5e:4x4". kind: "tpu" | "gpu".
      peak_flops: dense bf16 FLOP/s.
      hbm_bytes, hbm_bandwidth: capacity in bytes; bytes a second.
      usable_bytes: what a program may use of hbm_bytes; the rest belongs to the runtime.
      link_bandwidth: of one ICI link; a GPU's whole NVLink.
      dcn_bandwidth: of one chip's share of its host's network.
      chips_per_host: of a pod slice of several hosts, or a DGX node (topology.chips_per_host knows single hosts).
      cores: TensorCores that Google counts in names such as v5p-64; JAX sees one device a chip (megacore).
      dimensions: of the ICI torus; 0 = all chips of a host reach each other at link_bandwidth (NVSwitch).
      wraps: a torus side is a ring when it is a multiple of this, otherwise a line.
      sources: keys of the module's docstring.
    """

    name: str
    kind: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    usable_bytes: float
    link_bandwidth: float
    dcn_bandwidth: float
    chips_per_host: int
    cores: int
    dimensions: int
    wraps: int
    sources: str


# usable_bytes of the TPUs is the limit that the TPU compiler itself names when a program is too large.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 32 * GIB, 1200e9, 30.75 * GIB, 45e9, 25e9 / 4, 4, 2, 3, 4, "v4, book"),
        Chip("v5e", "tpu", 197e12, 16 * GIB, 819e9, 15.75 * GIB, 50e9, 6.4e12 / 8 / 256, 4, 1, 2, 16, "v5e, book"),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 95.73 * GIB, 100e9, 50e9 / 8, 4, 2, 3, 4, "v5p, book"),
        Chip("v6e", "tpu", 918e12, 32 * GIB, 1640e9, 31.24 * GIB, 112e9, 25.6e12 / 8 / 256, 4, 1, 2, 16, "v6e"),
        Chip("a100", "gpu", 312e12, 80e9, 2039e9, 80e9 * 0.92, 300e9, 25e9, 8, 1, 0, 1, "A100"),
        Chip("h100", "gpu", 989.4e12, 80e9, 3.35e12, 80e9 * 0.92, 450e9, 50e9, 8, 1, 0, 1, "H100"),
        Chip("h200", "gpu", 989.4e12, 141e9, 4.8e12, 141e9 * 0.92, 450e9, 50e9, 8, 1, 0, 1, "H200"),
    )
}

# jax.Device.device_kind -> name, first match wins. The SXM boards alone: PCIe and NVL boards run at other rates.
KINDS: tuple[tuple[str, str], ...] = (
    (r"TPU v4", "v4"),
    (r"TPU (v5 lite|v5e)", "v5e"),
    (r"TPU (v5|v5p)", "v5p"),
    (r"TPU (v6 lite|v6e)", "v6e"),
    (r"NVIDIA A100-SXM4-80GB", "a100"),
    (r"NVIDIA H100 80GB HBM3", "h100"),
    (r"NVIDIA H200", "h200"),
)


def find(device_kind: str) -> Chip | None:
    """The chip behind a `jax.Device.device_kind`, or None for one that is not in the table."""
    return next((CHIPS[name] for pattern, name in KINDS if re.fullmatch(pattern, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device by its `device_kind`; None for a CPU or a chip that is not in the table."""
    chip = find(device_kind)
    return chip.peak_flops if chip else None
