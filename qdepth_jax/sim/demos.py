"""One demonstration: expert in, encoded RLDS episode out, and what its replay needs.

The expert runs without cameras; only an episode that reached the benchmark's own success flag within the step cap is
rendered, from the simulator states kept on the way. Nothing is removed from an episode (no filter of idle actions):
every stored frame keeps the action that was executed there, so that a replay (eval/replays.py) reaches success.
"""

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from qdepth_jax import errors
from qdepth_jax.data import example, tfrecord, write_rlds
from qdepth_jax.sim import render as render_lib

SUCCESS, FAILED, OVERLONG, CRASHED = "success", "failed", "overlong", "crashed"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """image_size in pixels (square). jpeg_quality 1..100. supersample: RGB samples per pixel and axis."""

    image_size: int = 128
    jpeg_quality: int = 90
    supersample: int = 2


def features(image_size: int, state_dim: int, joint_dim: int, action_dim: int, wrist: bool) -> write_rlds.Tree:
    """The features of a demonstration data set: those of modified_libero_rlds plus depth and what a replay needs."""
    observation = {
        "image": write_rlds.Image((image_size, image_size, 3)),
        "depth": write_rlds.Image((image_size, image_size, 1), "png", "uint16"),
        "state": write_rlds.Tensor((state_dim,)),
    }
    if wrist:
        observation["wrist_image"] = write_rlds.Image((image_size, image_size, 3))
    if joint_dim:
        observation["joint_state"] = write_rlds.Tensor((joint_dim,))
    return {
        "steps": {
            "observation": observation,
            "action": write_rlds.Tensor((action_dim,)),
            "reward": write_rlds.Tensor(),
            "discount": write_rlds.Tensor(),
            "is_first": write_rlds.Tensor((), "bool"),
            "is_last": write_rlds.Tensor((), "bool"),
            "is_terminal": write_rlds.Tensor((), "bool"),
            "language_instruction": write_rlds.Text(),
        },
        "episode_metadata": {
            "file_path": write_rlds.Text(),
            "success": write_rlds.Tensor((), "bool"),
            "suite": write_rlds.Text(),
            "task_id": write_rlds.Tensor((), "int64"),
            "task_name": write_rlds.Text(),
            "seed": write_rlds.Tensor((), "int64"),
            "initial_state": write_rlds.Tensor((None,)),
        },
    }


def libero_features(image_size: int) -> write_rlds.Tree:
    return features(image_size, state_dim=8, joint_dim=7, action_dim=7, wrist=True)


def metaworld_features(image_size: int) -> write_rlds.Tree:
    return features(image_size, state_dim=4, joint_dim=0, action_dim=4, wrist=False)


def run_libero_expert(env, seed: int, max_steps: int | None = None) -> tuple[str, dict[str, list]]:
    """One attempt in a LiberoEnv of at most max_steps (default: the official cap).

    Returns the outcome and per-step lists: action, state, joint_state, sim_state.
    """
    from qdepth_jax.sim import expert as expert_lib
    from qdepth_jax.sim import libero

    env.reset(seed)
    expert = expert_lib.Expert(env)
    track: dict[str, list] = {"action": [], "state": [], "joint_state": [], "sim_state": []}
    if env.success():
        return FAILED, track  # solved before it began: nothing to demonstrate
    for _ in range(max_steps or libero.step_cap(env.task.suite)):
        for name, value in env.proprio().items():
            track[name].append(value)
        track["sim_state"].append(env.sim_state())
        track["action"].append(expert.act())
        if env.step(track["action"][-1]):
            return SUCCESS, track
        if expert.gave_up:
            return FAILED, track
    return OVERLONG, track


def encode_libero(env, seed: int, track: dict[str, list], encoding: Encoding, episode_id: str) -> bytes:
    """Renders the states of a successful attempt and encodes the episode."""
    views: dict[str, list[bytes]] = {"image": [], "wrist_image": [], "depth": []}
    initial_state = env.initial_state
    for state in track["sim_state"]:
        env.set_sim_state(state)
        seen = env.render()
        views["image"].append(jpeg(seen["image"], encoding.jpeg_quality))
        views["wrist_image"].append(jpeg(seen["wrist_image"], encoding.jpeg_quality))
        views["depth"].append(png16(render_lib.millimetres(seen["depth"])))
    steps = {f"observation/{name}": values for name, values in views.items()}
    for name in ("state", "joint_state"):
        steps[f"observation/{name}"] = np.stack(track[name])
    metadata = {
        "file_path": episode_id,
        "success": np.bool_(True),
        "suite": env.task.suite,
        "task_id": np.int64(env.task.task_id),
        "task_name": env.task.name,
        "seed": np.int64(seed),
        "initial_state": initial_state,
    }
    steps |= episode_frame(np.stack(track["action"]), env.task.instruction)
    return write_rlds.encode_episode(libero_features(encoding.image_size), steps, metadata)


def run_metaworld_expert(env, seed: int, max_steps: int | None = None) -> tuple[str, dict[str, list]]:
    """One attempt in a MetaWorldEnv with the policy that ships with Meta-World."""
    from qdepth_jax.sim import metaworld

    env.reset(seed)
    track: dict[str, list] = {"action": [], "state": [], "sim_state": []}
    for _ in range(max_steps or metaworld.STEP_CAP):
        track["state"].append(env.proprio())
        track["sim_state"].append(env.sim_state())
        track["action"].append(env.expert_action())
        if env.step(track["action"][-1]):
            return SUCCESS, track
    return OVERLONG, track


def encode_metaworld(env, seed: int, track: dict[str, list], encoding: Encoding, episode_id: str) -> bytes:
    """Renders the states of a successful attempt and encodes the episode."""
    images, depths = [], []
    for state in track["sim_state"]:
        env.set_sim_state(state)
        seen = env.render()
        images.append(jpeg(seen["image"], encoding.jpeg_quality))
        depths.append(png16(render_lib.millimetres(seen["depth"])))
    steps = {
        "observation/image": images,
        "observation/depth": depths,
        "observation/state": np.stack(track["state"]),
    }
    metadata = {
        "file_path": episode_id,
        "success": np.bool_(True),
        "suite": "metaworld",
        "task_id": np.int64(env.task_id),
        "task_name": env.task,
        "seed": np.int64(seed),
        "initial_state": np.asarray(track["sim_state"][0], np.float32),
    }
    steps |= episode_frame(np.stack(track["action"]), env.instruction)
    return write_rlds.encode_episode(metaworld_features(encoding.image_size), steps, metadata)


def episode_frame(action: np.ndarray, instruction: str) -> dict:
    """The step features that follow from actions f32 [T, A] and instruction: reward 1 and terminal at the last step."""
    count = len(action)
    last = np.arange(count) == count - 1
    return {
        "action": action.astype(np.float32),
        "reward": last.astype(np.float32),
        "discount": np.ones(count, np.float32),
        "is_first": np.arange(count) == 0,
        "is_last": last,
        "is_terminal": last,
        "language_instruction": [instruction] * count,
    }


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a replay needs of one stored episode. action f32 [T, A]; initial_state f32 [D]; success: as recorded."""

    file_path: str
    suite: str
    task_id: int
    seed: int
    initial_state: np.ndarray
    action: np.ndarray
    success: bool


def expert_digest() -> str:
    """Says which version of LIBERO's scripted expert this is."""
    return hashlib.sha256(Path(__file__).with_name("expert.py").read_bytes()).hexdigest()[:16]


def read_recordings(directory: str | os.PathLike) -> dict[str, list[Recording]]:
    """Split -> the episodes of a demonstration data set, without their images."""
    info = Path(directory) / "dataset_info.json"
    if not info.is_file():
        versions = sorted(str(path.parent) for path in Path(directory).glob("*/dataset_info.json"))
        hint = f"; did you mean {' or '.join(versions)}?" if versions else ""
        raise errors.UserError(f"{directory} is no version directory of a data set: {info} is missing{hint}")
    recordings = {}
    for split in json.loads(info.read_text())["splits"]:
        shards = sorted(Path(directory).glob(f"*-{split['name']}.tfrecord-*"))
        records = (record for shard in shards for record in tfrecord.scan_records(shard))
        recordings[split["name"]] = [_recording(record.payload) for record in records]
    return recordings


def _recording(payload: bytes) -> Recording:
    features = example.scan(payload)
    meta = "episode_metadata/"

    def text(name: str) -> str:
        offset, length = features[meta + name].value[0]
        return payload[offset : offset + length].decode()

    try:
        return Recording(
            file_path=text("file_path"),
            suite=text("suite"),
            task_id=int(features[meta + "task_id"].value[0]),
            seed=int(features[meta + "seed"].value[0]),
            initial_state=np.array(features[meta + "initial_state"].value),
            action=np.array(features["steps/action"].value).reshape(len(features["steps/reward"].value), -1),
            success=bool(features[meta + "success"].value[0]),
        )
    except KeyError as error:
        raise errors.UserError(f"the episode has no {error}: it was not made by tools/collect_demos.py") from error


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """u8 [H, W, 3] to JPEG with the usual 4:2:0 chroma and optimised Huffman tables."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def png16(raw: np.ndarray) -> bytes:
    """u16 [H, W] to a 16-bit greyscale PNG."""
    buffer = io.BytesIO()
    Image.fromarray(raw).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
