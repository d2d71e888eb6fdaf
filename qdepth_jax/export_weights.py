"""The weights of an export in each format, written leaf by leaf (an Orbax checkpoint: all at once)."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from qdepth_jax import checkpoint, checkpoint_sum, errors, stored_model
from qdepth_jax.models import paligemma
from qdepth_jax.weights import safetensors_write, table


def write(
    stored: stored_model.Stored, model: Any, item: str, folder: epath.Path, form: str, dtype: str, shard_bytes: int
) -> tuple[dict[str, int], dict[str, Any]]:
    """Writes parameters and state into a folder.

    Args:
      stored: where they are. model: its config. item: "params" or "ema".
      form: format. dtype: to which parameters are cast; state (codebooks, counts) stays as it is.
      shard_bytes: of one file, where the format has files of a size.

    Returns:
      (file -> bytes, empty for Orbax; item -> path -> {"shape", "dtype", "sum"}).

    Raises:
      UserError: the source is damaged, the format has no name for an array, or needs a package that is missing.
    """
    wanted = {"params": (item, stored_model.whole(stored, item, dtype))}
    wanted["state"] = ("state", stored_model.whole(stored, "state"))
    leaves: dict[str, Any] = {"params": {}} | ({"state": {}} if wanted["state"][1] else {})

    def read(name: str) -> Iterator[tuple[str, jax.Array]]:
        for path, array in stored_model.read_leaves(stored, *wanted[name]):
            found = checkpoint_sum.sums({path: array})[path]
            leaves[name][path] = {"shape": list(array.shape), "dtype": str(array.dtype), "sum": found}
            held = [array]
            del array  # nobody keeps it while the next one is read
            yield path, held.pop()

    if form == "orbax":
        tree = {name: table.nest(dict(read(name))) for name in leaves}
        meta = {name: value for name, value in stored.meta.items() if name not in ("step", "metrics", "crc32")}
        checkpoint.save_params(str(folder), tree["params"], meta, tree.get("state"), stored.meta["step"])
        return {}, leaves  # Orbax checks its own files
    if form == "safetensors":
        entries = [
            safetensors_write.Entry(stored_model.key_of(name, path), leaf.shape, str(leaf.dtype))
            for name in leaves
            for path, leaf in wanted[name][1].items()
        ]
        arrays = map(_host, itertools.chain.from_iterable(map(read, list(leaves))))
        return safetensors_write.write(folder, entries, arrays, shard_bytes, {"format": "np"}), leaves
    entries, arrays = _renamed(form, model, wanted["params"][1], read("params"))
    if form != "open_pi_zero_pt":
        return safetensors_write.write(folder, entries, arrays, shard_bytes, {"format": "pt"}), leaves
    return _write_pt(folder / "model.pt", entries, arrays), leaves


def transformers_config(model: paligemma.PaligemmaConfig) -> dict[str, Any]:
    """config.json of a PaliGemma as transformers writes it: sizes, and the conventions that no shape shows."""
    words = {
        "hidden_size": model.vlm.width,
        "intermediate_size": model.vlm.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.vlm.rope_theta,
        "vocab_size": model.vocabulary,
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma2" if model.vlm.post_norms else "gemma",
    }
    if model.vlm.post_norms:
        scale = model.query_scale or model.head_dim
        words |= {
            # transformers takes a whole number alone where it is one.
            "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
            "attn_logit_softcapping": model.softcap or None,
            "final_logit_softcapping": model.final_softcap or None,
            # A window of 0 is a window that shows nothing there: no window is a kind of layer (and 4096, as in the
            # published files, for versions that do not read the kinds).
            "sliding_window": model.window or 4096,
        }
        if not model.window:
            words["layer_types"] = ["full_attention"] * model.layers
    image = model.siglip
    pictures = {
        "hidden_size": image.width,
        "intermediate_size": image.mlp,
        "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads,
        "patch_size": image.patch,
        "image_size": image.image_size,
        "num_image_tokens": image.tokens,
        "projection_dim": model.vlm.width,
        "vision_use_head": False,
        "model_type": "siglip_vision_model",
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "image_token_index": 257152,
        "hidden_size": model.vlm.width,
        "projection_dim": model.vlm.width,
        "text_config": words,
        "vision_config": pictures,
    }


def _host(pair: tuple[str, jax.Array]) -> np.ndarray:
    return np.asarray(pair[1])


def _renamed(
    form: str, model: Any, wanted: dict[str, jax.ShapeDtypeStruct], leaves: Iterator[tuple[str, jax.Array]]
) -> tuple[list[safetensors_write.Entry], Iterator[np.ndarray]]:
    """The entries of a state dict, leaf after leaf of ours, and their arrays.

    Raises:
      UserError: a leaf that the other code base has no name for.
    """
    places = stored_model.slices(form, model, {path: leaf.shape for path, leaf in wanted.items()})
    if nameless := [path for path in wanted if path not in places]:
        raise errors.UserError(
            f"format {form} has no names for {len(nameless)} arrays of this model ({', '.join(nameless[:5])}): use "
            "--format=safetensors or orbax"
        )
    entries = []
    for path, leaf in wanted.items():
        for keys, index, row in places[path]:
            shape = table.source_shape(row, leaf.shape[len(index) :])
            entries += [safetensors_write.Entry(key, shape, str(leaf.dtype)) for key in keys]

    def arrays() -> Iterator[np.ndarray]:
        for path, leaf in leaves:
            array = np.asarray(leaf)
            del leaf
            for keys, index, row in places[path]:
                value = row.save(array[index])
                for _ in keys:
                    yield value
            del array, value

    return entries, arrays()


def _write_pt(path: epath.Path, entries, arrays) -> dict[str, int]:
    try:
        import torch
    except ImportError as error:
        raise errors.UserError(
            "--format=open_pi_zero_pt needs torch: pip install -e '.[interop]', or take --format=open_pi_zero, the "
            "same keys in safetensors"
        ) from error
    content = {}
    for entry, array in zip(entries, arrays, strict=True):
        array = np.ascontiguousarray(array)
        bits = torch.from_numpy(array.view(np.int16).copy() if entry.dtype == "bfloat16" else array.copy())
        content[entry.key] = bits.view(torch.bfloat16) if entry.dtype == "bfloat16" else bits
    with path.open("wb") as file:
        torch.save({"model": content}, file)
    return {path.name: path.stat().length}
