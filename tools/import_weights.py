"""Weights of other code bases into a checkpoint of ours, from which training starts and models are loaded.

  python tools/import_weights.py --format=big_vision --input=pt_224.npz --output=CKPT
  python tools/import_weights.py --format=openpi --input=gs://openpi-assets/checkpoints/pi0_base/params --output=gs://B/C

  big_vision     PaliGemma 1 and 2, .npz                 hf_paligemma   the same, safetensors (a file, shards, a folder)
  open_pi_zero   .pt, a state dict, or safetensors       openpi         pi0 and pi0.5, Orbax folder
  lerobot_pi0    pi0 and pi0.5 of lerobot's PyTorch port, safetensors

Sizes come from the shapes of the weights, conventions from what their code base does; both are stored with the
checkpoint. Arrays go one after the other, in pieces, to the shards of the mesh. OUTPUT is a workdir with one
checkpoint: train from it with --config.init_from=OUTPUT. It appears whole or not at all, and one that exists is left
alone. The last line of stdout is JSON: format, model, parameters, keys read, unused, missing.
"""

import json

from absl import flags

from qdepth_jax import command

FORMATS = ("big_vision", "hf_paligemma", "open_pi_zero", "openpi", "lerobot_pi0")

_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "what the weights are", required=True)
_INPUT = flags.DEFINE_string("input", None, "file or folder, local or gs://", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "new workdir, local or gs://", required=True)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "pixels; resamples the positions of the vision tower; 0: as it is")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "of the stored parameters; train in float32")
_MESH = flags.DEFINE_list("mesh", ["1", "-1", "1"], "replica,fsdp,tensor; one may be -1")
_CHANGE = flags.DEFINE_multi_string(
    "change", [], "FIELD=VALUE of the model config that the weights do not tell, e.g. horizon=4, flow.time_period=100"
)


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import config as config_lib
    from qdepth_jax import errors, sharding, workdirs

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    try:
        mesh = config_lib.MeshConfig(**dict(zip(sharding.AXES, map(int, _MESH.value), strict=True)))
    except ValueError as error:
        raise errors.UserError(f"--mesh={','.join(_MESH.value)} must be three numbers: {sharding.AXES}") from error
    output = workdirs.folder(_OUTPUT.value)
    if output.exists():
        raise errors.UserError(f"--output={_OUTPUT.value} exists: choose another folder, or remove it")
    print(
        json.dumps(
            run(_FORMAT.value, _INPUT.value, _OUTPUT.value, mesh, _IMAGE_SIZE.value, _DTYPE.value, _CHANGE.value)
        )
    )


def run(
    form: str, path: str, output: str, mesh_config, image_size: int = 0, dtype: str = "float32", changes=()
) -> dict:
    """One import; returns the summary."""
    from qdepth_jax import sharding
    from qdepth_jax.weights import importing

    opened = importing.open_weights(form, path, image_size, changes)
    try:
        loaded = importing.place(opened, sharding.make_mesh(mesh_config), dtype)
        summary = importing.summary(opened, loaded)
    finally:
        opened.weights.close()
    meta = {"config": importing.experiment(opened), "source": {name: summary[name] for name in ("format", "files")}}
    write(output, loaded.params, meta)
    return summary | {"dtype": dtype, "output": output}


def write(output: str, params, meta: dict) -> None:
    """The checkpoint, in a folder that gets its name when it is complete (a bucket has no renaming: there the last
    file that Orbax writes says so)."""
    from qdepth_jax import checkpoint, workdirs

    out = workdirs.folder(output)
    kept = "nothing of the import was kept"
    with workdirs.full_disk(output, kept), workdirs.appears_whole(out, checkpoint.say) as folder:
        checkpoint.save_params(str(folder), params, meta)


if __name__ == "__main__":
    command.run(main)
