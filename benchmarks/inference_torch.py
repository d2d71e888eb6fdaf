"""open-pi-zero's sampler from a checkout, PiZeroInference, eager or compiled.

As its evaluation runs it (src/agent/eval.py): no gradients, default mode of torch.compile, masks and positions built
once. In its favour: tokens, pixels and masks are prepared outside of what is timed (ours prepares its pixels inside).
The noise is drawn from one seed at every call, so that all contestants compute the same numbers.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import inference_sizes as sizes
from benchmarks import train_step_torch


def build(order: sizes.Order) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """-> run(flow steps) -> actions [1, Z, A], and `sizes.facts`."""
    stubs = train_step_torch.stub_bitsandbytes()
    sys.path.insert(0, order.checkout)  # its package is called `src`
    import torch

    torch.set_num_threads(order.threads)
    device = "cuda" if order.device == "gpu" else "cpu"
    size, folder = sizes.SIZES[order.size], pathlib.Path(order.folder)
    dtype = torch.bfloat16 if order.dtype == "bfloat16" else torch.float32
    model = train_step_torch.make_model(order.checkout, size, "PiZeroInference")
    if order.write_weights:
        for key, value in model.state_dict().items():
            np.save(folder / f"{key}.npy", value.numpy())
    else:
        model.load_state_dict({path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.*.npy")})
    model.requires_grad_(False).to(dtype).to(device).eval()
    inputs = {name: value.to(device) for name, value in _inputs(model, size, dtype).items()}
    if order.write_weights:
        torch.manual_seed(sizes.NOISE_SEED)
        noise = torch.randn((1, size.horizon, size.action_dim), device=device, dtype=dtype)
        np.save(folder / "noise.npy", noise.float().cpu().numpy())
    count = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = model
    if order.contestant == "compile":
        import torch._inductor.config

        # The same random numbers as eager: the noise has to be the same.
        torch._inductor.config.fallback_random = True
        model = torch.compile(model, mode="default")

    def run(steps: int) -> np.ndarray:
        plain.num_inference_steps = steps  # compiled code is kept for each number
        torch.manual_seed(sizes.NOISE_SEED)
        with torch.inference_mode():
            return model(**inputs).float().cpu().numpy()

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    notes = [*stubs, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads"]
    return run, sizes.facts(parameters=count, weight_bytes=held, notes=notes, device_kind=kind)


def _inputs(model, size, dtype) -> dict[str, Any]:
    """As preprocess_batch of its evaluation."""
    import torch

    batch = sizes.observation(size)
    text = torch.from_numpy(batch["text"]).long()
    ids = torch.cat([torch.full((1, size.image_tokens), train_step_torch.image_id(size)), text], dim=1)
    mask, vlm, proprio, action = model.build_causal_mask_and_position_ids((ids != 0).long(), dtype)
    prefix_mask, action_mask = model.split_full_mask_into_submasks(mask)
    pixels = (torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() * (1 / 255.0) - 0.5) / 0.5
    return {
        "input_ids": ids,
        "pixel_values": pixels.contiguous().to(dtype),
        "image_text_proprio_mask": prefix_mask,
        "action_mask": action_mask,
        "vlm_position_ids": vlm,
        "proprio_position_ids": proprio,
        "action_position_ids": action,
        "proprios": torch.from_numpy(batch["proprio"]).to(dtype),
    }
