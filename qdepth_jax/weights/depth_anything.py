"""Parameters of Depth Anything V2 and Video-Depth-Anything to ours, by two tables.

TABLE: the authors' .pth state dicts (DepthAnything/Depth-Anything-V2, DepthAnything/Video-Depth-Anything).
HF_TABLE: `DepthAnythingForDepthEstimation` of Hugging Face transformers, safetensors; its older key names are renamed
first. There the positions are interpolated without the offset of 0.1: set trunk.offset=0.

Linears are [out, in], convolutions [out, in, kh, kw], transposed convolutions [in, out, kh, kw].
"""

import re

from qdepth_jax.weights.table import CONV, LINEAR, OUT, Row

_CONV_TRANSPOSED = {"load": lambda w, shape: w.transpose(2, 3, 0, 1), "save": lambda w: w.transpose(2, 3, 0, 1)}
# [3*N*H, D] -> [3, D, N, H]; its bias [3*N*H] -> [3, N, H].
_QKV = {
    "load": lambda w, shape: w.reshape(shape[0], -1, shape[1]).transpose(0, 2, 1).reshape(shape),
    "save": lambda w: w.reshape(*w.shape[:2], -1).transpose(0, 2, 1).reshape(-1, w.shape[1]),
}
# One of the three alone: [N*H, D] -> [D, N, H].
_HEADS = {"load": lambda w, shape: w.T.reshape(shape), "save": lambda w: w.reshape(w.shape[0], -1).T}
_QKV_BIAS = {"load": lambda w, shape: w.reshape(shape), "save": lambda w: w.reshape(-1)}

# Names that transformers used before version 5, and since.
_RENAMED = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", lambda m: ".attention.o_proj."),
)


def _pair(source: str, target: str, kernel: dict, bias: bool = True) -> list[Row]:
    rows = [Row(f"{source}.weight", f"{target}/kernel", **kernel)]
    return rows + ([Row(f"{source}.bias", f"{target}/bias")] if bias else [])


def _norm(source: str, target: str) -> list[Row]:
    return [Row(f"{source}.weight", f"{target}/scale"), Row(f"{source}.bias", f"{target}/bias")]


def _trunk() -> list[Row]:
    source, block, target = "pretrained.", "pretrained.blocks.{i}.", "trunk/blocks/"
    return [
        Row(source + "mask_token", ""),  # of masked training
        Row(source + "cls_token", "trunk/cls_token"),
        Row(source + "pos_embed", "trunk/pos_embedding"),
        *_pair(source + "patch_embed.proj", "trunk/embedding", CONV),
        *_norm(source + "norm", "trunk/norm"),
        *_norm(block + "norm1", target + "norm_1"),
        *_norm(block + "norm2", target + "norm_2"),
        Row(block + "attn.qkv.weight", target + "attention/qkv/kernel", **_QKV),
        Row(block + "attn.qkv.bias", target + "attention/qkv/bias", **_QKV_BIAS),
        Row(block + "attn.proj.weight", target + "attention/out/kernel", **OUT),
        Row(block + "attn.proj.bias", target + "attention/out/bias"),
        Row(block + "ls1.gamma", target + "scale_1"),
        Row(block + "ls2.gamma", target + "scale_2"),
        *(
            row
            for name in ("fc1", "fc2", "w12", "w3")
            for row in _pair(f"{block}mlp.{name}", f"{target}mlp/{name}", LINEAR)
        ),
    ]


def _head() -> list[Row]:
    scratch, rows = "head.scratch.", []
    for i in range(4):
        rows += _pair(f"head.projects.{i}", f"head/project_{i}", CONV)
        rows += _pair(f"{scratch}layer{i + 1}_rn", f"head/reduce_{i + 1}", CONV, bias=False)
        fuse, target = f"{scratch}refinenet{i + 1}.", f"head/fuse_{i + 1}/"
        rows += _pair(fuse + "out_conv", target + "out", CONV)
        for unit in (1, 2):
            for conv in (1, 2):
                rows += _pair(f"{fuse}resConfUnit{unit}.conv{conv}", f"{target}unit_{unit}/conv_{conv}", CONV)
    for i in (0, 1):
        rows += _pair(f"head.resize_layers.{i}", f"head/resize_{i}", _CONV_TRANSPOSED)
    rows += _pair("head.resize_layers.3", "head/resize_3", CONV)
    rows += _pair(scratch + "output_conv1", "head/output_1", CONV)
    rows += _pair(scratch + "output_conv2.0", "head/output_2", CONV)
    return rows + _pair(scratch + "output_conv2.2", "head/output_3", CONV)


def _motion() -> list[Row]:
    rows = []
    for i in range(4):
        source, target = f"head.motion_modules.{i}.temporal_transformer.", f"head/motion_{i}/"
        block = source + "transformer_blocks.0."
        rows += _norm(source + "norm", target + "norm")
        rows += _pair(source + "proj_in", target + "proj_in", LINEAR)
        rows += _pair(source + "proj_out", target + "proj_out", LINEAR)
        rows += _norm(block + "ff_norm", target + "ff_norm")
        rows += _pair(block + "ff.net.0.proj", target + "ff_in", LINEAR)
        rows += _pair(block + "ff.net.2", target + "ff_out", LINEAR)
        for number in (0, 1):
            attention = f"{block}attention_blocks.{number}."
            rows.append(Row(attention + "pos_encoder.pe", ""))  # dpt.frame_positions
            rows += _norm(f"{block}norms.{number}", f"{target}norm_{number}")
            for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
                rows += _pair(f"{attention}to_{short}", f"{target}attention_{number}/{name}", LINEAR, bias=False)
            rows += _pair(attention + "to_out.0", f"{target}attention_{number}/out", LINEAR)
    return rows


TABLE: tuple[Row, ...] = (*_trunk(), *_head(), *_motion())


def renamed(key: str) -> str:
    """A key of any transformers version -> that of HF_TABLE."""
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _hf() -> list[Row]:
    source, block, target = "backbone.", "backbone.encoder.layer.{i}.", "trunk/blocks/"
    rows = [
        Row(source + "embeddings.mask_token", ""),
        Row(source + "embeddings.cls_token", "trunk/cls_token"),
        Row(source + "embeddings.position_embeddings", "trunk/pos_embedding"),
        *_pair(source + "embeddings.patch_embeddings.projection", "trunk/embedding", CONV),
        *_norm(source + "layernorm", "trunk/norm"),
        *_norm(block + "norm1", target + "norm_1"),
        *_norm(block + "norm2", target + "norm_2"),
        Row(block + "attention.o_proj.weight", target + "attention/out/kernel", **OUT),
        Row(block + "attention.o_proj.bias", target + "attention/out/bias"),
        Row(block + "layer_scale1.lambda1", target + "scale_1"),
        Row(block + "layer_scale2.lambda1", target + "scale_2"),
    ]
    for part, letter in enumerate("qkv"):
        name = f"{block}attention.{letter}_proj."
        rows.append(Row(name + "weight", target + "attention/qkv/kernel", part=(part,), **_HEADS))
        rows.append(Row(name + "bias", target + "attention/qkv/bias", part=(part,), **_QKV_BIAS))
    for theirs, ours in (("fc1", "fc1"), ("fc2", "fc2"), ("weights_in", "w12"), ("weights_out", "w3")):
        rows += _pair(f"{block}mlp.{theirs}", f"{target}mlp/{ours}", LINEAR)
    for i in range(4):
        rows += _pair(f"neck.reassemble_stage.layers.{i}.projection", f"head/project_{i}", CONV)
        if i != 2:
            kind = CONV if i == 3 else _CONV_TRANSPOSED
            rows += _pair(f"neck.reassemble_stage.layers.{i}.resize", f"head/resize_{i}", kind)
        rows += _pair(f"neck.convs.{i}", f"head/reduce_{i + 1}", CONV, bias=False)
        # Theirs are counted from the coarsest level, ours from the finest.
        fuse, into = f"neck.fusion_stage.layers.{i}.", f"head/fuse_{4 - i}/"
        rows += _pair(fuse + "projection", into + "out", CONV)
        for unit in (1, 2):
            for conv in (1, 2):
                rows += _pair(f"{fuse}residual_layer{unit}.convolution{conv}", f"{into}unit_{unit}/conv_{conv}", CONV)
    for i in (1, 2, 3):
        rows += _pair(f"head.conv{i}", f"head/output_{i}", CONV)
    return rows


HF_TABLE: tuple[Row, ...] = tuple(_hf())
