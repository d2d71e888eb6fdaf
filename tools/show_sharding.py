"""Prints where every leaf of an experiment's train state goes on a mesh, with bytes per device; needs no such devices.

  python tools/show_sharding.py --config=experiments/bridge.py [--devices=256] [--mesh=2,128,1] [--slices=2]
                                [--config.a.b=value]

--mesh is replica,fsdp,tensor (default: config.mesh; at most one may be -1). A line for each parameter: how it is split,
and MiB per device of the parameter, of its optimiser moments and of its average; then what is no parameter, totals, and
every leaf above 1 MiB that each device holds whole. Nothing is allocated. The last line of stdout is JSON, in bytes.
"""

import dataclasses
import json

from absl import flags

from qdepth_jax import command

_CONFIG = command.define_config()
_DEVICES = flags.DEFINE_integer("devices", 16, "chips of the mesh; none of them need be there", lower_bound=1)
_MESH = flags.DEFINE_list("mesh", None, "replica,fsdp,tensor; default: config.mesh")
_SLICES = flags.DEFINE_integer("slices", None, "slices that the devices are in; default: config.mesh.slices", 1)
flags.mark_flag_as_required("config")
flags.declare_key_flag("config")  # so that --help shows it


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import config as config_lib
    from qdepth_jax import errors, sharding, sharding_table
    from qdepth_jax.plan import program

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: flags are --config, --devices, --mesh, --slices")
    mesh = config_lib.build(config_lib.MeshConfig, _CONFIG.value.mesh, "mesh")
    if _MESH.value is not None:
        try:
            replica, fsdp, tensor = map(int, _MESH.value)
        except ValueError:
            raise errors.UserError(
                f"--mesh={','.join(_MESH.value)}: three numbers replica,fsdp,tensor are needed, e.g. 2,128,1"
            ) from None
        mesh = dataclasses.replace(mesh, replica=replica, fsdp=fsdp, tensor=tensor)
    slices = _SLICES.value or max(1, mesh.slices)
    sizes = sharding.mesh_sizes(mesh, _DEVICES.value, slices)
    lines, summary = sharding_table.report(_CONFIG.value.name, sizes, slices, program.plan_of(_CONFIG.value).state)
    print("\n".join(lines))
    print(json.dumps(summary))


if __name__ == "__main__":
    command.run(main)
