"""open-pi-zero's model and step, from a checkout, eager or compiled.

The step is that of its trainer (src/agent/train.py): loss, backward, joint clipping, two AdamW groups. Differences, in
its favour or neutral: torch.optim.AdamW instead of bitsandbytes' 8-bit one (the same mathematics on both sides of the
race), batches prepared once (masks, positions, pixels; ours prepares them in the step), no learning-rate schedule, the
loss read after the last step alone. The noise is that of one seed at every step, so that all contestants compute the
same numbers.
"""

import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import train_step_sizes as sizes


def build(order: sizes.Order) -> tuple[Callable[[int], list[tuple[float, float]]], dict[str, Any]]:
    """-> run(steps) -> [(loss, gradient norm) of each step], and `sizes.facts`."""
    stubs = stub_bitsandbytes()
    sys.path.insert(0, order.open_pi_zero)  # its package is called `src`
    import torch

    torch.set_num_threads(order.threads)
    device = "cuda" if order.device == "gpu" else "cpu"
    size, low = sizes.SIZES[order.size], order.dtype == "bfloat16"
    dtype = torch.bfloat16 if low else torch.float32
    model, folder = make_model(order.open_pi_zero, size), pathlib.Path(order.folder)
    if order.write_weights:
        for key, value in model.state_dict().items():
            np.save(folder / f"{key}.npy", value.numpy())
    else:
        model.load_state_dict({path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.*.npy")})
    model.to(dtype).to(device).train()
    inputs = _inputs(model, size, sizes.make_batch(size, order.batch), dtype)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    if order.write_weights:
        torch.manual_seed(sizes.NOISE_SEED)
        noise = torch.randn_like(inputs["actions"], device=device, dtype=dtype)
        np.save(folder / "noise.npy", noise.float().cpu().numpy())

    groups = (model.action_expert_parameters, model.trainable_vlm_parameters)
    optimizers = [
        torch.optim.AdamW(group, lr=sizes.LEARNING_RATE, weight_decay=0.0, fused=True if order.fused else None)
        for group in groups
    ]
    trained = [p for group in groups for p in group]
    count = sum(p.numel() for p in model.parameters())
    if order.contestant == "compile":
        import torch._inductor.config

        # The same random numbers as eager: the noise has to be the same.
        torch._inductor.config.fallback_random = True
        model = torch.compile(model, mode="default")

    def run(steps: int) -> list[tuple[float, float]]:
        rows = []
        for _ in range(steps):
            torch.manual_seed(sizes.NOISE_SEED)
            with torch.autocast(device_type=device, dtype=dtype, enabled=low):
                loss = model(**inputs)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, max_norm=sizes.CLIP_NORM)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            rows.append((loss.detach(), norm))
        return [(float(loss), float(norm)) for loss, norm in rows]

    notes = [*stubs, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads"]
    if order.fused:
        notes.append("fused AdamW")
    if low:
        notes.append("as its trainer: bfloat16 weights, gradients and moments, autocast; no float32 copy")
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return run, sizes.facts(
        parameters=count,
        trained=sum(p.numel() for p in trained),
        notes=notes,
        flops_per_sample=0.0,
        device_kind=kind,
    )


def stub_bitsandbytes() -> list[str]:
    """An empty stand-in where bitsandbytes is missing: lora.py derives classes from it that no step here uses."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        module = types.ModuleType("bitsandbytes")
        module.nn = types.SimpleNamespace(Params4bit=type("Params4bit", (), {}), Linear4bit=type("Linear4bit", (), {}))
        sys.modules["bitsandbytes"] = module
        return ["bitsandbytes stubbed (not used in the step)"]
    return []


def make_model(checkout: str, size: sizes.Size, name: str = "PiZero"):
    """PiZero (or PiZeroInference) with torch's own initialisation (seed 0), tied and frozen as its trainer does."""
    import torch
    from omegaconf import OmegaConf
    from src.model.vla import pizero

    config = OmegaConf.merge(
        OmegaConf.load(pathlib.Path(checkout) / "config" / "train" / "bridge.yaml"), _changes(size)
    )
    torch.manual_seed(0)
    model = getattr(pizero, name)(config)
    model.tie_action_proprio_weights()
    model.freeze_unused_weights()
    return model


def _changes(size: sizes.Size) -> dict[str, Any]:
    expert = {"hidden_size": size.action_width, "intermediate_size": size.action_mlp}
    vision = {
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "image_size": size.image_size,
        "patch_size": size.patch,
        "num_image_tokens": size.image_tokens,
    }
    projector = {"vision_config": {"hidden_size": size.vision_width, "projection_dim": size.vlm_width}}
    return {
        "max_seq_len": size.image_tokens + size.text_length,
        "horizon_steps": size.horizon,
        "action_dim": size.action_dim,
        "proprio_dim": size.proprio_dim,
        "time_max_period": size.time_period,
        "action_expert_rope_theta": size.action_rope_theta,
        "image_token_index": image_id(size),
        "vocab_size": size.vocabulary,
        "mixture": {
            "vlm": {
                "hidden_size": size.vlm_width,
                "intermediate_size": size.vlm_mlp,
                "rope_theta": size.rope_theta,
            },
            "proprio": expert,
            "action": expert,
        },
        "vision": {"config": vision},
        "vision_projector": {"config": projector},
        "joint": {
            "config": {
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "head_dim": size.head_dim,
            }
        },
    }


def image_id(size: sizes.Size) -> int:
    """`<image>`: 257152 of 257216 rows in the published table, the last row of a small one (make_batch avoids it)."""
    return 257_152 if size.vocabulary == 257_216 else size.vocabulary - 1


def _inputs(model, size: sizes.Size, batch: dict[str, np.ndarray], dtype) -> dict[str, Any]:
    """As preprocess_batch of its trainer."""
    import torch

    text = torch.from_numpy(batch["text"]).long()
    ids = torch.cat([torch.full((len(text), size.image_tokens), image_id(size)), text], dim=1)
    mask, vlm, proprio, action = model.build_causal_mask_and_position_ids((ids != 0).long(), dtype)
    pixels = (torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() * (1 / 255.0) - 0.5) / 0.5
    return {
        "input_ids": ids,
        "pixel_values": pixels.contiguous().to(dtype),
        "causal_mask": mask,
        "vlm_position_ids": vlm,
        "proprio_position_ids": proprio,
        "action_position_ids": action,
        "proprios": torch.from_numpy(batch["proprio"]).to(dtype),
        "actions": torch.from_numpy(batch["action"]).to(dtype),
        "t": torch.from_numpy(batch["t"]).to(dtype),
    }
