"""What the rows of a batch show: vectors and texts are filled in, pictures are listed for the loader to read.

Names: a *frame* is a frame id of a split, a *row* a row of this host's part of the batch, a *position* a place in the
global order. Every random choice is a function of (seed, position), or of (seed, epoch, episode).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qdepth_jax.data import batch_keys, data_config, frame_reader, normalise, order, sidecar, source, text, windows

# Streams of random choices, see order.draw.
GOAL, INSTRUCTION, SWAP = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a batch that one data set fills.

    Attributes:
      number: of the data set in the mix.
      item: the data set.
      rows, frames, position, epoch: i64 [n].
    """

    number: int
    item: source.Source
    rows: np.ndarray
    frames: np.ndarray
    position: np.ndarray
    epoch: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Encoded pictures to decode: frame frames[i] of `feature` into out[rows[i]]."""

    out: np.ndarray
    feature: str
    decode: Callable[[bytes, np.ndarray], None]
    rows: np.ndarray
    frames: np.ndarray


def fill_vectors(out: Mapping[str, np.ndarray], part: Part, config: data_config.DataConfig) -> None:
    """proprio, action, their masks, and view_mask."""
    item, rows, frames = part.item, part.rows, part.frames
    data = item.frames
    seen, mask = windows.observed(frames, data.start[frames], config.proprio_steps)
    if "proprio" in out:
        out["proprio"][rows] = batch_keys.normalised(data.proprio[seen], item.proprio, out["proprio"].shape[-1])
    if "proprio_mask" in out:
        out["proprio_mask"][rows] = mask
    if "action" in out or "action_mask" in out:
        absolute = item.definition.absolute_action_dims
        chunk, mask = windows.chunk(data.action, frames, data.end[frames], config.horizon, config.chunk_end, absolute)
        if "action" in out:
            out["action"][rows] = normalise.normalise(chunk, item.action)
        if "action_mask" in out:
            out["action_mask"][rows] = mask
    if "view_mask" in out:
        out["view_mask"][rows] = [view in item.definition.views for view in config.views]


def texts(
    part: Part,
    tables: Sequence[batch_keys.TextTable],
    config: data_config.DataConfig,
    seed: int,
    tokenizer: text.TextTokenizer,
) -> np.ndarray:
    """Token rows i32 [n, L] of the instruction of each frame, by config one of several."""
    spoken = np.stack([full[ids[part.frames]] for ids, _, full in tables])
    nth = np.zeros(len(part.frames), np.int64)
    if config.instructions == "random":
        nth = order.draw_below(seed, part.position, INSTRUCTION, np.maximum(spoken.sum(0), 1))
    # The nth of the variants that say something; where none does, the first, which is empty.
    chosen = np.argmax(np.cumsum(spoken, 0) == nth + 1, axis=0)
    out = np.empty((len(part.frames), config.max_text_tokens), np.int32)
    for variant, (ids, table, _) in enumerate(tables):
        mine = chosen == variant
        rows = table[ids[part.frames[mine]]]
        if config.text_rule == "openpi_state":
            state = normalise.normalise(part.item.frames.proprio[part.frames[mine]], part.item.proprio)
            rows, _ = tokenizer.encode_table(rows, config.max_text_tokens, config.text_rule, state)
        out[mine] = rows
    return out


def images(out: Mapping[str, np.ndarray], part: Part, config: data_config.DataConfig, seed: int) -> list[Pictures]:
    """Pictures of every view that the data set has, of every observed step, and of the goal."""
    seen, _ = windows.observed(part.frames, part.item.frames.start[part.frames], config.image_steps)
    goal = _goals(part, config, seed) if config.goal else None
    steps = np.arange(config.image_steps)
    found = []
    for view in config.views:
        cameras = _cameras(part, view, config, seed)
        if not cameras:  # the data set lacks the view: its rows are empty, and view_mask says so
            for name in (f"image_{view}", f"goal_{view}"):
                if name in out:
                    out[name][part.rows] = 0
        for camera, mine in cameras:
            feature = part.item.image_feature(camera)
            decode = frame_reader.decode_bgr if camera in part.item.swapped_channels else frame_reader.decode_rgb
            if (array := out.get(f"image_{view}")) is not None:
                flat = array.reshape(-1, *array.shape[-3:])
                places = (part.rows[mine, None] * config.image_steps + steps).reshape(-1)
                found.append(Pictures(flat, feature, decode, places, seen[mine].reshape(-1)))
            if (array := out.get(f"goal_{view}")) is not None:
                found.append(Pictures(array, feature, decode, part.rows[mine], goal[mine]))
    return found


def _cameras(part: Part, view: str, config: data_config.DataConfig, seed: int) -> list[tuple[str, np.ndarray]]:
    """(camera, bool [n] rows that show it as `view`): the view, or for two like cameras one of them at random."""
    definition = part.item.definition
    everyone = np.ones(len(part.rows), bool)
    if not (definition.swap and config.swap_views and view in definition.swap):
        return [(view, everyone)] if view in definition.views else []
    # One draw for all frames of an episode in an epoch, as in the published pipelines.
    episode = part.item.frames.episode[part.frames]
    key = part.epoch * len(part.item.split.episodes) + episode
    swapped = (order.draw(seed, key, SWAP + 16 * part.number) & np.uint64(1)).astype(bool)
    a, b = definition.swap
    return [(view, ~swapped), (b if view == a else a, swapped)]


def _goals(part: Part, config: data_config.DataConfig, seed: int) -> np.ndarray:
    """Frame of the goal picture, i64 [n]: at or after the row's own, in its episode, never a quarantined one."""
    last = part.item.end(part.frames) - 1
    goal = last
    if config.goal == "uniform":
        room = last - part.frames
        if config.goal_max_steps:
            room = np.minimum(room, config.goal_max_steps)
        goal = part.frames + order.draw_below(seed, part.position, GOAL, room + 1)
    if not len(part.item.split.quarantined):
        return goal
    # The nearest good frame from there on; behind the episode's last good frame, that one (the row's own is good).
    good = part.item.good_frames
    at = np.searchsorted(good, goal)
    following = good[np.minimum(at, len(good) - 1)]
    return np.where((at < len(good)) & (following <= last), following, good[np.maximum(at - 1, 0)])


def depth(out: Mapping[str, np.ndarray], part: Part, config: data_config.DataConfig) -> list[Pictures]:
    """Depth and depth tokens of this or a later frame; those that have to be decoded are returned."""
    if not any(name.startswith("depth") for name in out):
        return []
    item, rows = part.item, part.rows
    later, end = part.frames + config.depth_offset, item.end(part.frames)
    # Behind the end of the episode there is nothing to predict, nor where the later frame is quarantined.
    there = (later < end) & ~np.isin(later, item.split.quarantined)
    later = np.minimum(later, end - 1)
    episode = item.frames.episode[part.frames]
    if "depth_tokens" in out or "depth_tokens_mask" in out:
        codes = np.asarray(item.depth_tokens.values[later])
        valid = there[:, None] & (codes != sidecar.INVALID_TOKEN)
        if "depth_tokens" in out:
            out["depth_tokens"][rows] = np.where(valid, codes, 0)
        if "depth_tokens_mask" in out:
            out["depth_tokens_mask"][rows] = valid
    if "depth_scale" in out:
        out["depth_scale"][rows] = item.own_depth()[1] if item.depth is None else item.depth.scale[episode]
    if "depth_offset" in out:
        out["depth_offset"][rows] = 0.0 if item.depth is None else item.depth.offset[episode]
    if "depth" not in out:
        return []
    if item.depth is not None:
        out["depth"][rows[there]] = item.depth.values[later[there]]
        return []
    return [Pictures(out["depth"], item.depth_feature(), item.own_depth()[0], rows[there], later[there])]
