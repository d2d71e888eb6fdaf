"""Video-Depth-Anything's own forward pass, from a checkout, for the race in benchmarks/video_depth.py.

Its class `VideoDepthAnything` as it is. The first start draws the weights: torch's own initialisation, with new values
where that is a constant. Fresh layer scales are tiny and the last layer of every temporal module is zero: as they are,
the two sides would be compared on a network without trunk and without time.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import video_depth_order

# run.py of the checkout.
SIZES: dict[str, dict[str, Any]] = {
    "vits": {"encoder": "vits", "features": 64, "out_channels": [48, 96, 192, 384]},
    "vitb": {"encoder": "vitb", "features": 128, "out_channels": [96, 192, 384, 768]},
    "vitl": {"encoder": "vitl", "features": 256, "out_channels": [256, 512, 1024, 1024]},
}


def build(order: video_depth_order.Order) -> tuple[Callable[[int], None], dict[str, Any]]:
    """-> run(forward passes), which leaves the last depth in the folder, and facts."""
    sys.path.insert(0, order.checkout)  # its packages are called `video_depth_anything` and `utils`
    import torch
    from video_depth_anything.motion_module import attention as motion_attention
    from video_depth_anything.video_depth import VideoDepthAnything

    torch.set_num_threads(order.threads)
    device, low = "cuda" if order.device == "gpu" else "cpu", order.dtype == "bfloat16"
    torch.manual_seed(0)
    model = VideoDepthAnything(**SIZES[order.encoder]).eval()
    _stir(model, torch)
    np.savez(order.weights, **{key: value.numpy() for key, value in model.state_dict().items()})
    model.to(device)
    frames = torch.from_numpy(video_depth_order.make_frames(order)).permute(0, 1, 4, 2, 3).contiguous().to(device)

    def run(passes: int) -> None:
        with torch.no_grad(), torch.autocast(device_type=device, dtype=torch.bfloat16, enabled=low):
            for _ in range(passes):
                depth = model.forward(frames)
        if device == "cuda":
            torch.cuda.synchronize()
        if not order.depth_file(order.contestant).exists():
            np.save(order.depth_file(order.contestant), depth.float().cpu().numpy())

    notes = [f"torch {torch.__version__}", f"{torch.get_num_threads()} threads"]
    notes.append("xformers" if motion_attention.XFORMERS_AVAILABLE else "xformers absent: its own plain attention")
    if low:
        notes.append("float32 weights under autocast to bfloat16")
    return run, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": notes,
        "device_kind": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def _stir(model, torch) -> None:
    """New values for parameters that are constant at the start: scales about 0.5, everything else about 0.05."""
    for value in model.parameters():
        if value.numel() > 1 and value.min() == value.max():
            scale = value.max() > 0
            noise = torch.randn_like(value) * 0.05
            value.data.copy_(noise + 0.5 if scale else noise)
