"""Depth models of Hugging Face transformers as estimators: frame by frame, in torch (extra `transformers`).

A local folder works without a network; a model's name is looked up in the local cache first, then downloaded.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from qdepth_jax import depth_weights, errors
from qdepth_jax.data import depth_labels

DEVICE_BATCH = 8
# What AutoModelForDepthEstimation's networks return; those that are not here come in both kinds.
_KINDS = {"depth_pro": "metric", "zoedepth": "metric", "glpn": "metric"}


def make(model: str, options: Any) -> depth_labels.Estimator:
    """An estimator; options: `estimators.Options`.

    Raises:
      UserError: torch or transformers is missing, no such model, or its kind of depth is not known.
    """
    if not model:
        raise errors.UserError("--estimator=transformers:MODEL_OR_FOLDER: a model's name or folder is missing")
    why = "the model's own image processor sets the size that it sees"
    depth_labels.refuse_setting(f"transformers:{model}", "input_size", options.input_size, why)
    dtype = options.dtype or "float32"
    try:
        import torch
        import transformers
    except ImportError as error:
        raise errors.UserError(
            f"--estimator=transformers:{model} needs torch and transformers: pip install -e '.[transformers]'"
        ) from error
    folder = _folder(model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network = transformers.AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, dtype)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise errors.UserError(f"{folder} holds no depth model of transformers: {str(error)[:400]}") from error
    kind = _kind(config, options.kind, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, batch = network.to(device).eval(), options.device_batch or DEVICE_BATCH

    def maps(frames: np.ndarray) -> np.ndarray:
        inputs = processor(images=list(frames), return_tensors="pt").to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
        with torch.inference_mode():
            out = network(**inputs)
        sizes = [frames.shape[1:3]] * len(frames)
        # ZoeDepth's processor pads the pictures, and takes the border off again by their size.
        source = {"source_sizes": sizes} if config.model_type == "zoedepth" else {}
        found = processor.post_process_depth_estimation(out, target_sizes=sizes, **source)
        return np.stack([row["predicted_depth"].float().cpu().numpy() for row in found])

    def estimate(episodes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frames in episodes:
            yield np.concatenate([maps(frames[start : start + batch]) for start in range(0, len(frames), batch)])

    identity = f"sha256:{depth_weights.sha256_of(folder)}"
    return depth_labels.Estimator(
        name=f"transformers {config.model_type} {identity} {dtype} procedure 1",
        kind=kind,
        estimate=estimate,
        licence=_licence(folder),
        details={
            "network": config.model_type,
            "weights": identity,
            "dtype": dtype,
            "device_batch": batch,
            "backend": f"torch {device}",
            "transformers": transformers.__version__,
        },
    )


def _folder(model: str) -> str:
    if os.path.isdir(model):
        return model
    if os.path.exists(model) or model.startswith((".", "/", "~")):
        raise errors.UserError(f"transformers:{model} is no folder")
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(model, local_files_only=True)
    except Exception:  # its own classes, several of them: not in the cache, or no name of a model
        try:
            return huggingface_hub.snapshot_download(model)
        except Exception as error:
            raise errors.UserError(
                f"transformers:{model} is no folder, and no model that can be had from here: {str(error)[:300]}"
            ) from error


def _kind(config: Any, given: str, model: str) -> str:
    known = getattr(config, "depth_estimation_type", None) or _KINDS.get(config.model_type)
    if known is None and not given:
        raise errors.UserError(
            f"transformers:{model} ({config.model_type}) does not say what it estimates: give --depth_kind=metric "
            "(metres) or relative (inverse depth, larger is nearer)"
        )
    if known and given and known != given:
        raise errors.UserError(f"transformers:{model} estimates {known} depth, not --depth_kind={given}")
    return known or given


def _licence(folder: str) -> str:
    """`license:` of the model card; "unknown" without one."""
    path = os.path.join(folder, "README.md")
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            if found := re.search(r"^license:\s*(\S+)", file.read(10_000), re.MULTILINE):
                return f"{found[1]} (as its model card says)"
    return "unknown"
