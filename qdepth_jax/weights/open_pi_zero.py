"""Parameters of the PyTorch code base open-pi-zero to ours and back, by one table.

Source: commit c3df7fb of github.com/allenzren/open-pi-zero, state dict `model` of its checkpoints: linears [out, in],
convolutions [out, in, kh, kw]. `mixtures.proprio` and `mixtures.action` are one module saved twice; a file may hold
either or both, and both must then be equal. Text embedding rows: 257,216.

Each source key must match exactly one row; all problems of a file are reported together.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qdepth_jax import errors

Path = tuple[str, ...]


def _same(w):
    return w


def _transposed(w):
    return w.T


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of weight.

    Attributes:
      source: key with `{i}` for the layer number, and the alternatives `proprio|action` in braces.
      target: our path. A source with `{i}` is one slice of a leaf with a leading layer axis.
      part: index after the layer axis, for leaves that hold two matrices.
      load: source array, target shape -> target array. save: the inverse, target array -> source array.
    """

    source: str
    target: str
    part: tuple[int, ...] = ()
    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = lambda w, shape: w
    save: Callable[[np.ndarray], np.ndarray] = _same

    @property
    def pattern(self) -> re.Pattern:
        """Matches whole source keys; group `i` is the layer."""
        text = re.escape(self.source).replace(re.escape("{i}"), r"(?P<i>\d+)")
        return re.compile(text.replace(re.escape("{expert}"), r"(?P<copy>proprio|action)"))


# Linear [out, in] -> [in, out].
_LINEAR = {"load": lambda w, shape: w.T, "save": _transposed}
# Convolution [out, in, kh, kw] -> [kh, kw, in, out].
_CONV = {"load": lambda w, shape: w.transpose(2, 3, 1, 0), "save": lambda w: w.transpose(3, 2, 0, 1)}
# SigLIP query, key, value [heads*H, D] -> [D, heads, H]; bias [heads*H] -> [heads, H].
_VISION_IN = {"load": lambda w, shape: w.T.reshape(shape), "save": lambda w: w.reshape(w.shape[0], -1).T}
_VISION_IN_BIAS = {"load": lambda w, shape: w.reshape(shape), "save": lambda w: w.reshape(-1)}
# SigLIP out [D, heads*H] -> [heads, H, D].
_OUT = {"load": lambda w, shape: w.T.reshape(shape), "save": lambda w: w.reshape(-1, w.shape[-1]).T}
# Gemma query, key, value [N*H, D] -> [N, D, H].
_HEADS_IN = {
    "load": lambda w, shape: w.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1),
    "save": lambda w: w.transpose(0, 2, 1).reshape(-1, w.shape[1]),
}
_POSITIONS = {"load": lambda w, shape: w[None], "save": lambda w: w[0]}


def _dense(source: str, target: str) -> list[Row]:
    return [Row(f"{source}.weight", f"{target}/kernel", **_LINEAR), Row(f"{source}.bias", f"{target}/bias")]


def _vision() -> list[Row]:
    source = "vision_tower.vision_model."
    layer, block = source + "encoder.layers.{i}.", "img/Transformer/encoderblock/"
    attention = block + "MultiHeadDotProductAttention_0/"
    rows = [
        Row(source + "embeddings.patch_embedding.weight", "img/embedding/kernel", **_CONV),
        Row(source + "embeddings.patch_embedding.bias", "img/embedding/bias"),
        Row(source + "embeddings.position_embedding.weight", "img/pos_embedding", **_POSITIONS),
        Row(layer + "self_attn.out_proj.weight", attention + "out/kernel", **_OUT),
        Row(layer + "self_attn.out_proj.bias", attention + "out/bias"),
        Row(source + "post_layernorm.weight", "img/Transformer/encoder_norm/scale"),
        Row(source + "post_layernorm.bias", "img/Transformer/encoder_norm/bias"),
        *_dense(layer + "mlp.fc1", block + "MlpBlock_0/Dense_0"),
        *_dense(layer + "mlp.fc2", block + "MlpBlock_0/Dense_1"),
        *_dense("multi_modal_projector.linear", "img/head"),
    ]
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rows.append(Row(f"{layer}self_attn.{short}_proj.weight", f"{attention}{name}/kernel", **_VISION_IN))
        rows.append(Row(f"{layer}self_attn.{short}_proj.bias", f"{attention}{name}/bias", **_VISION_IN_BIAS))
    for number in (0, 1):
        rows.append(Row(f"{layer}layer_norm{number + 1}.weight", f"{block}LayerNorm_{number}/scale"))
        rows.append(Row(f"{layer}layer_norm{number + 1}.bias", f"{block}LayerNorm_{number}/bias"))
    return rows


def _expert(mixture: str, expert: str) -> list[Row]:
    source, target = f"joint_model.mixtures.{mixture}.layers.{{i}}.", f"llm/layers/{expert}/"
    return [
        Row(source + "self_attn.q_proj.weight", target + "attn/q_einsum/w", **_HEADS_IN),
        Row(source + "self_attn.k_proj.weight", target + "attn/kv_einsum/w", part=(0,), **_HEADS_IN),
        Row(source + "self_attn.v_proj.weight", target + "attn/kv_einsum/w", part=(1,), **_HEADS_IN),
        Row(source + "self_attn.o_proj.weight", target + "attn/attn_vec_einsum/w", **_OUT),
        Row(source + "mlp.gate_proj.weight", target + "mlp/gating_einsum", part=(0,), **_LINEAR),
        Row(source + "mlp.up_proj.weight", target + "mlp/gating_einsum", part=(1,), **_LINEAR),
        Row(source + "mlp.down_proj.weight", target + "mlp/linear", **_LINEAR),
        Row(source + "input_layernorm.weight", target + "pre_attention_norm/scale"),
        Row(source + "post_attention_layernorm.weight", target + "pre_ffw_norm/scale"),
    ]


TABLE: tuple[Row, ...] = (
    Row("embed_tokens.weight", "llm/embedder/input_embedding"),
    *_vision(),
    *_expert("vlm", "vlm"),
    *_expert("{expert}", "action"),
    Row("joint_model.mixtures.{expert}.norm.weight", "llm/final_norm_action/scale"),
    *_dense("action_encoder.linear_1", "action_encoder/linear_1"),
    *_dense("action_encoder.linear_2", "action_encoder/linear_2"),
    *_dense("action_encoder.linear_3", "action_encoder/linear_3"),
    *_dense("proprio_encoder", "proprio_encoder"),
    *_dense("action_decoder", "action_decoder"),
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Attributes:
    params: nested dict with every leaf that the file provides, f32.
    read: source keys used, duplicates included. missing: paths of ours that the file does not provide (depth expert).
    """

    params: dict[str, Any]
    read: list[str]
    missing: list[str]


def load(source: Mapping[str, np.ndarray], shapes: Any) -> Loaded:
    """Converts a state dict.

    Args:
      source: key -> array; a prefix `_orig_mod.` of compiled models is removed.
      shapes: our parameter tree, arrays or ShapeDtypeStructs (`jax.eval_shape` of init).

    Returns:
      The parameters. Leaves of ours that no row of the table names (the depth expert's) are listed as missing.

    Raises:
      UserError: unknown or duplicate keys, unequal copies, wrong shapes, gaps in a leaf; all of them in one message.
    """
    targets = {"/".join(path): tuple(leaf.shape) for path, leaf in _flatten(shapes)}
    rows = [(row.pattern, row) for row in TABLE]
    leaves: dict[str, np.ndarray] = {}
    filled: dict[tuple[str, tuple[int, ...]], str] = {}
    read, problems = [], []
    for original in sorted(source):
        key = original.removeprefix("_orig_mod.")
        matches = [(row, m) for pattern, row in rows if (m := pattern.fullmatch(key))]
        if len(matches) != 1:
            problems.append(f"{original}: matches {len(matches)} rows of the table, needs exactly 1")
            continue
        row, match = matches[0]
        if row.target not in targets:
            problems.append(f"{original}: the model has no parameter {row.target}")
            continue
        layer = (int(match["i"]),) if "i" in match.re.groupindex else ()
        shape = targets[row.target]
        if layer and layer[0] >= shape[0]:
            problems.append(f"{original}: the model has {shape[0]} layers in {row.target}")
            continue
        index = layer + row.part
        wanted, array = shape[len(index) :], np.asarray(source[original], np.float32)
        if array.shape != (expected := row.save(np.empty(wanted, np.float32)).shape):
            problems.append(f"{original}: shape {array.shape}, the model needs {expected} for {row.target}")
            continue
        value = row.load(array, wanted)
        leaf = leaves.setdefault(row.target, np.zeros(shape, np.float32))
        if (row.target, index) in filled:
            if not np.array_equal(leaf[index], value):
                problems.append(f"{original}: differs from {filled[row.target, index]}, which is the same module")
        else:
            leaf[index] = value
            filled[row.target, index] = original
        read.append(original)

    for row in TABLE:
        shape = targets.get(row.target)
        if shape is None:
            continue
        layers = [(i,) for i in range(shape[0])] if "{i}" in row.source else [()]
        gaps = [layer for layer in layers if (row.target, layer + row.part) not in filled]
        for layer in gaps:
            problems.append(f"{_source_key(row, layer)}: not in the file")
    if problems:
        listed = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise errors.UserError(
            f"{len(problems)} problems with these open-pi-zero weights (is it a state dict of that code base, and do "
            f"the sizes of the config fit?):\n  {listed}"
        )
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return Loaded(params, read, sorted(set(targets) - set(leaves)))


def save(params: Any, copies: tuple[str, ...] = ("action", "proprio")) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) -> a state dict; the inverse of `load`. Leaves without a row are left out.

    Args:
      params: nested dict of arrays.
      copies: names under which the shared expert is written.
    """
    leaves = {"/".join(path): leaf for path, leaf in _flatten(params)}
    out = {}
    for row in TABLE:
        leaf = np.asarray(leaves[row.target], np.float32)
        layers = [(i,) for i in range(leaf.shape[0])] if "{i}" in row.source else [()]
        for layer in layers:
            value = row.save(leaf[layer + row.part])
            for copy in copies if "{expert}" in row.source else ("",):
                out[_source_key(row, layer, copy)] = value
    return out


def _source_key(row: Row, layer: tuple[int, ...], copy: str = "action") -> str:
    key = row.source.replace("{expert}", copy)
    return key.replace("{i}", str(layer[0])) if layer else key


def _flatten(tree: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        return [item for name in tree for item in _flatten(tree[name], (*path, name))]
    return [(path, tree)]
