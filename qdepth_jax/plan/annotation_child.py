"""Compiles the window function for `plan.placed`, which ends this process when it has seen enough.

python -m qdepth_jax.plan.annotation_child ORDER FOLDER
"""

import json
import sys

from qdepth_jax.plan import topology


def main(order: dict, folder: str) -> None:
    topology.prepare_environment()
    from qdepth_jax.models import depth_anything
    from qdepth_jax.plan import annotation

    where = topology.parse(order["topology"])
    config = depth_anything.sized(order["encoder"], video=True, dtype=order["dtype"])
    lowered = annotation.lower(
        config, tuple(order["size"]), order["input_size"], order["batch"], topology.devices(where)
    )
    lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
