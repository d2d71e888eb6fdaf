"""An independent policy forward pass in NumPy float64, written from the published description, one example at a time.

Loops instead of batched products, explicit heads, lists of visible tokens instead of masks: as unlike the product as
possible.
Weights by open-pi-zero state-dict key; the depth expert, which that code base lacks, by our own paths.
"""

import math

import numpy as np

ROWS = {  # query group -> groups it sees
    "image": ("image", "text"),
    "text": ("image", "text"),
    "depth": ("image", "text", "depth"),
    "proprio": ("image", "text", "proprio"),
    "action": ("image", "text", "depth", "proprio", "action"),
}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def layer_norm(x, w, b):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * w + b


def rms_norm(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + w)


def rope(x, position, theta):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        a = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(a) - x[half + i] * math.sin(a)
        out[half + i] = x[half + i] * math.cos(a) + x[i] * math.sin(a)
    return out


def vision(w, image, c):
    """[S, S, 3] -> features [P, D]."""
    pre = "vision_tower.vision_model."
    p, grid = c.siglip.patch, c.siglip.grid
    kernel = w[pre + "embeddings.patch_embedding.weight"]
    tokens = []
    for i in range(grid):
        for j in range(grid):
            patch = image[i * p : (i + 1) * p, j * p : (j + 1) * p].transpose(2, 0, 1)
            tokens.append((kernel * patch[None]).sum((1, 2, 3)) + w[pre + "embeddings.patch_embedding.bias"])
    x = np.stack(tokens) + w[pre + "embeddings.position_embedding.weight"]
    h = c.siglip.width // c.siglip.heads
    for layer in range(c.siglip.depth):
        at = f"{pre}encoder.layers.{layer}."

        def linear(name, y, at=at):
            return y @ w[f"{at}{name}.weight"].T + w[f"{at}{name}.bias"]

        y = layer_norm(x, w[at + "layer_norm1.weight"], w[at + "layer_norm1.bias"])
        q, k, v = (linear(f"self_attn.{n}_proj", y) for n in "qkv")
        out = np.zeros_like(x)
        for head in range(c.siglip.heads):
            s = slice(head * h, (head + 1) * h)
            for t in range(len(x)):
                out[t, s] = softmax(k[:, s] @ q[t, s] / math.sqrt(h)) @ v[:, s]
        x = x + linear("self_attn.out_proj", out)
        y = layer_norm(x, w[at + "layer_norm2.weight"], w[at + "layer_norm2.bias"])
        x = x + linear("mlp.fc2", gelu(linear("mlp.fc1", y)))
    return layer_norm(x, w[pre + "post_layernorm.weight"], w[pre + "post_layernorm.bias"])


def depth_keys(params, layers):
    """Our depth leaves under open-pi-zero's naming, in its layout."""
    tree, w = params["llm"]["layers"]["depth"], {}
    flat = {
        "self_attn.q_proj": [tree["attn"]["q_einsum"]["w"][i].transpose(0, 2, 1) for i in range(layers)],
        "self_attn.k_proj": [tree["attn"]["kv_einsum"]["w"][i, 0].transpose(0, 2, 1) for i in range(layers)],
        "self_attn.v_proj": [tree["attn"]["kv_einsum"]["w"][i, 1].transpose(0, 2, 1) for i in range(layers)],
        "self_attn.o_proj": [tree["attn"]["attn_vec_einsum"]["w"][i].transpose(2, 0, 1) for i in range(layers)],
        "mlp.gate_proj": [tree["mlp"]["gating_einsum"][i, 0].T for i in range(layers)],
        "mlp.up_proj": [tree["mlp"]["gating_einsum"][i, 1].T for i in range(layers)],
        "mlp.down_proj": [tree["mlp"]["linear"][i].T for i in range(layers)],
        "input_layernorm": [tree["pre_attention_norm"]["scale"][i] for i in range(layers)],
        "post_attention_layernorm": [tree["pre_ffw_norm"]["scale"][i] for i in range(layers)],
    }
    for name, values in flat.items():
        for i, value in enumerate(values):
            at = f"joint_model.mixtures.depth.layers.{i}.{name}.weight"
            w[at] = np.asarray(value, np.float64)
            if "self_attn" in name:
                w[at] = (
                    w[at].reshape(w[at].shape[0], -1) if name.endswith("o_proj") else w[at].reshape(-1, w[at].shape[-1])
                )
    w["joint_model.mixtures.depth.norm.weight"] = np.asarray(params["llm"]["final_norm_depth"]["scale"], np.float64)
    return w


def forward(w, c, images, text, proprio, x_t, t, params=None):
    """One example. images [views, S, S, 3], text [L], proprio [n, Dp], x_t [Z, A], t scalar.

    Returns velocity [Z, A], features [P, D] of the main view, and the normed depth stream [P, D] or None.
    """
    w = {key: np.asarray(value, np.float64) for key, value in w.items()}
    features = [vision(w, np.asarray(image, np.float64), c) for image in images]
    tokens = []  # (group, expert, position, state); padding has no token at all
    position = 1
    for view in features:
        for f in view:
            e = f @ w["multi_modal_projector.linear.weight"].T + w["multi_modal_projector.linear.bias"]
            tokens.append(["image", "vlm", position, e])
            position += 1
    for word in text:
        if word != 0:
            tokens.append(["text", "vlm", position, w["embed_tokens.weight"][word] * math.sqrt(c.vlm.width)])
        position += 1
    if params is not None:
        w |= depth_keys(params, c.layers)
        enc = {
            n: {k: np.asarray(v, np.float64) for k, v in params["depth_encoder"][n].items()}
            for n in ("linear_1", "linear_2")
        }
        for i, f in enumerate(features[0]):
            h = gelu(f @ enc["linear_1"]["kernel"] + enc["linear_1"]["bias"])
            e = h @ enc["linear_2"]["kernel"] + enc["linear_2"]["bias"]
            tokens.append(["depth", "depth", 1 + i, e * math.sqrt(len(e))])
    for i, row in enumerate(proprio):
        e = w["proprio_encoder.weight"] @ row + w["proprio_encoder.bias"]
        tokens.append(["proprio", "action", 1 + i, e * math.sqrt(c.action.width)])
    d = c.action.width
    f = [math.exp(-k * math.log(c.flow.time_period) / (d / 2 - 1)) for k in range(d // 2)]
    time = np.array([math.sin(t * g) for g in f] + [math.cos(t * g) for g in f])
    for i, row in enumerate(x_t):
        u = w["action_encoder.linear_1.weight"] @ row + w["action_encoder.linear_1.bias"]
        h = w["action_encoder.linear_2.weight"] @ np.concatenate([time, u]) + w["action_encoder.linear_2.bias"]
        e = w["action_encoder.linear_3.weight"] @ (h / (1 + np.exp(-h))) + w["action_encoder.linear_3.bias"]
        tokens.append(["action", "action", 1 + len(proprio) + i, e * math.sqrt(d)])

    theta = {"vlm": c.vlm.rope_theta, "action": c.action.rope_theta}
    if c.depth is not None:
        theta["depth"] = c.depth.expert.rope_theta
    hd, group = c.head_dim, c.heads // c.kv_heads
    for layer in range(c.layers):
        q, k, v = [], [], []
        for _, expert, position, x in tokens:
            at = f"joint_model.mixtures.{expert}.layers.{layer}."
            y = rms_norm(x, w[at + "input_layernorm.weight"], c.norm_eps)
            heads = [(w[at + f"self_attn.{n}_proj.weight"] @ y).reshape(-1, hd) for n in "qkv"]
            q.append([rope(h, position, theta[expert]) for h in heads[0]])
            k.append([rope(h, position, theta[expert]) for h in heads[1]])
            v.append(heads[2])
        for n, token in enumerate(tokens):
            at = f"joint_model.mixtures.{token[1]}.layers.{layer}."
            seen = [m for m, other in enumerate(tokens) if other[0] in ROWS[token[0]]]
            out = []
            for head in range(c.heads):
                logits = np.array([q[n][head] @ k[m][head // group] for m in seen]) / math.sqrt(hd)
                p = softmax(c.softcap * np.tanh(logits / c.softcap) if c.softcap else logits)
                out.append(sum(p[i] * v[m][head // group] for i, m in enumerate(seen)))
            x = token[3] + w[at + "self_attn.o_proj.weight"] @ np.concatenate(out)
            y = rms_norm(x, w[at + "post_attention_layernorm.weight"], c.norm_eps)
            h = gelu(w[at + "mlp.gate_proj.weight"] @ y) * (w[at + "mlp.up_proj.weight"] @ y)
            token[3] = x + w[at + "mlp.down_proj.weight"] @ h

    def finals(name, expert):
        states = np.stack([token[3] for token in tokens if token[0] == name])
        return rms_norm(states, w[f"joint_model.mixtures.{expert}.norm.weight"], c.norm_eps)

    velocity = finals("action", "action") @ w["action_decoder.weight"].T + w["action_decoder.bias"]
    return velocity, features[0], finals("depth", "depth") if params is not None else None
