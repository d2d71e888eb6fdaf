"""What a batch may hold, and the checks and tables that its keys need before the first batch.

    proprio           f32  [B, proprio_steps, Dp]   normalised; proprio_mask bool [B, proprio_steps]
    action            f32  [B, Z, A]                normalised; action_mask bool [B, Z]
    text              i32  [B, L]                   padded with 0
    image_<view>      u8   [B, H, W, 3]             [B, image_steps, H, W, 3] where image_steps > 1
    goal_<view>       u8   [B, H, W, 3]             a later frame of the episode
    view_mask         bool [B, views]               False: the data set lacks the view, its image is 0
    depth             u16  [B, H, W]                metres = raw * depth_scale + depth_offset, 0 = invalid
    depth_tokens      i32  [B, P]                   depth_tokens_mask bool [B, P]
    position          u32  [B]                      position in the global order, from which all randomness follows
    frame, dataset    i32  [B]                      frame id in its split, number in the mix

Every function raises UserError with the fix where the data sets of a mix do not fit a batch.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import data_config, definitions, frame_reader, normalise, source, text

FIXED = (
    "proprio", "proprio_mask", "action", "action_mask", "text", "view_mask", "depth", "depth_scale", "depth_offset",
    "depth_tokens", "depth_tokens_mask", "position", "frame", "dataset",
)  # fmt: skip

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]
# Of one instruction feature: id of each frame's text, token rows of the distinct texts (the texts themselves, where
# they are tokenised with the state), which of them say something.
TextTable = tuple[np.ndarray, np.ndarray, np.ndarray]


def check(keys: Sequence[str], config: data_config.DataConfig, sources: Sequence[source.Source]) -> None:
    """All keys exist, and the vectors of the mix have one width."""
    images = [f"image_{view}" for view in config.views]
    goals = [f"goal_{view}" for view in config.views]
    unknown = [name for name in keys if name not in (*images, *goals, *FIXED)]
    if unknown:
        raise errors.UserError(
            f"the model asks for {unknown}; with data.views={config.views} there is {(*images, *FIXED)}"
        )
    if not config.goal and (asked := [name for name in keys if name in goals]):
        raise errors.UserError(f"{asked} are asked for, but data.goal is empty: set it to 'final' or 'uniform'")
    swapping = [item.definition.name for item in sources if item.definition.swap and config.swap_views]
    if swapping and (asked := [name for name in keys if name in ("depth", "depth_tokens")]):
        raise errors.UserError(
            f"{swapping} show one of two cameras at random, but {asked} belong to the first: set data.swap_views=False"
        )
    if images[0] in keys and (asked := [name for name in keys if name in ("depth", "depth_tokens")]):
        for item in sources:
            name, views = item.definition.name, item.definition.views
            if views.get(config.views[0]) != item.definition.main_view:
                of = next(view for view, feature in views.items() if feature == item.definition.main_view)
                other = (
                    f"which data set {name} lacks: train without it, or with a model without depth"
                    if config.views[0] not in views
                    else f"set model.views (data.views) to begin with {of!r}"
                )
                raise errors.UserError(
                    f"{asked} of data set {name} belong to its view {of!r}, but depth is predicted from the first view "
                    f"of the model, {config.views[0]!r}: {other}"
                )
    for name, wanted in (("action", 0), ("proprio", config.proprio_dim)):
        widths = {item.definition.name: getattr(item.frames, name).shape[1] for item in sources}
        if wanted and max(widths.values()) > wanted:
            raise errors.UserError(f"data.{name}_dim={wanted}, but the data sets have {widths}: raise it")
        if not wanted and len(set(widths.values())) > 1:
            hint = f"data.{name}_dim={max(widths.values())} fills shorter ones with zeros" if name == "proprio" else ""
            raise errors.UserError(
                f"the data sets of the mix have {name} vectors of {widths} numbers; a batch needs one width: "
                + (hint or "train on data sets that agree")
            )
        for short, width in widths.items():
            if width < wanted:
                logging.warning("%s: %s has %d of %d numbers, the rest is 0", short, name, width, wanted)


def layout(
    rows: int,
    keys: Sequence[str],
    config: data_config.DataConfig,
    sources: Sequence[source.Source],
    image_shapes: Mapping[str, tuple[int, int, int]],
    depth_shape: tuple[int, ...],
    token_count: int,
) -> Layout:
    """Key -> (shape, dtype) of a part of a batch with `rows` rows."""
    frames = sources[0].frames
    proprio = config.proprio_dim or frames.proprio.shape[1]
    shapes = {
        "proprio": ((config.proprio_steps, proprio), np.float32),
        "proprio_mask": ((config.proprio_steps,), np.bool_),
        "action": ((config.horizon, frames.action.shape[1]), np.float32),
        "action_mask": ((config.horizon,), np.bool_),
        "text": ((config.max_text_tokens,), np.int32),
        "view_mask": ((len(config.views),), np.bool_),
        "depth": (depth_shape, np.uint16),
        "depth_scale": ((), np.float32),
        "depth_offset": ((), np.float32),
        "depth_tokens": ((token_count,), np.int32),
        "depth_tokens_mask": ((token_count,), np.bool_),
        "position": ((), np.uint32),
        "frame": ((), np.int32),
        "dataset": ((), np.int32),
    }
    steps = () if config.image_steps == 1 else (config.image_steps,)
    for view, shape in image_shapes.items():
        shapes[f"image_{view}"] = ((*steps, *shape), np.uint8)
        shapes[f"goal_{view}"] = (shape, np.uint8)
    return {key: ((rows, *shapes[key][0]), np.dtype(shapes[key][1])) for key in keys}


def image_shape(
    view: str, config: data_config.DataConfig, sources: Sequence[source.Source], files: frame_reader.ShardFiles
) -> tuple[int, int, int]:
    """(H, W, 3) of a view, one for the whole mix."""
    having = [item for item in sources if view in item.definition.views]
    lacking = [item.definition.name for item in sources if view not in item.definition.views]
    if lacking and config.missing_views == "error":
        raise errors.UserError(
            f"data sets {lacking} have no view {view!r}: change model.views, or set model.missing_views=True to leave "
            "their rows empty and masked (a loader without a model: data.views, data.missing_views='mask')"
        )
    if not having:
        raise errors.UserError(f"no data set of the mix has a view {view!r}: change data.views")
    if config.image_size:
        return (*config.image_size, 3)
    sizes = {}
    for item in having:
        name = item.image_feature(view)
        shape = item.index.dataset.feature(name).shape
        if len(shape) != 3 or min(shape) < 1:
            frame = int(item.frames.valid[0])
            offset, size = item.spans(name)[frame].tolist()
            shard = int(item.split.episodes["shard"][item.frames.episode[frame]])
            shape = (*frame_reader.image_size(files.read(item.split.shard_path(shard), offset, size)), 3)
        sizes[item.definition.name] = shape[:2]
    if len(set(sizes.values())) > 1:
        raise errors.UserError(
            f"images of view {view!r} differ in size: {sizes}; set data.image_size=(height, width) to resize them "
            "on the host"
        )
    return (*next(iter(sizes.values())), 3)


def text_tables(
    item: source.Source, tokenizer: text.TextTokenizer, max_tokens: int, rule: str = "raw"
) -> list[TextTable]:
    """One table for each instruction feature of a data set; only texts of sampled frames are tokenised.

    Where the text holds the state too, the table keeps the instructions themselves; that the longest of them fits with
    three digits for every number is known now, not in the middle of a run.
    """
    tables, with_state = [], rule == "openpi_state"
    for ids, strings in item.instructions():
        used = np.unique(ids[item.frames.valid])
        longest = np.ones((len(used), item.frames.proprio.shape[1]), np.float32) if with_state else None
        rows, unknown = tokenizer.encode_table([strings[i] for i in used], max_tokens, rule, longest)
        if unknown.any():
            logging.warning(
                "%s: %d of %d instructions hold tokens that %s does not know, for instance %r",
                item.definition.name, int((unknown > 0).sum()), len(used), tokenizer.path,
                strings[used[int(np.argmax(unknown))]],
            )  # fmt: skip
        table = np.asarray(strings, object) if with_state else np.zeros((len(strings), max_tokens), np.int32)
        if not with_state:
            table[used] = rows
        tables.append((ids, table, np.array([bool(string.strip()) for string in strings])))
    return tables


def depth_kind(sources: Sequence[source.Source]) -> str:
    """ "metric" or "relative", one for the whole mix."""
    kinds = {item.depth.metadata.details["depth_kind"] if item.depth is not None else "metric" for item in sources}
    if len(kinds) > 1:
        raise errors.UserError(f"the data sets of the mix have depth of different kinds {sorted(kinds)}")
    return kinds.pop()


def depth_shape(sources: Sequence[source.Source]) -> tuple[int, int]:
    """(H, W) of the depth maps, one for the whole mix, as is their kind."""
    depth_kind(sources)
    shapes = {}
    for item in sources:
        if item.depth is not None:
            shapes[item.definition.name] = item.depth.metadata.row_shape
        elif item.depth_feature():
            shapes[item.definition.name] = item.index.dataset.feature(item.depth_feature()).shape[:2]
        else:
            raise errors.UserError(
                f"data set {item.definition.name} in {item.index.dataset.directory} has no depth "
                f"(feature {definitions.depth_of(item.definition, item.index.dataset)[0]!r}): annotate it with "
                "tools/annotate_depth.py and set the data set's `depth` to the result"
            )
    if len(set(shapes.values())) > 1:
        raise errors.UserError(f"depth maps of the mix differ in size: {shapes}; annotate them at one size")
    return next(iter(shapes.values()))


def token_count(sources: Sequence[source.Source]) -> int:
    """P, if all data sets have depth tokens of one tokenizer."""
    identities = set()
    for item in sources:
        if item.depth_tokens is None:
            raise errors.UserError(
                f"data set {item.definition.name} has no depth tokens: run tools/tokenize_depth.py and set the "
                "data set's `depth_tokens` to the result"
            )
        identities.add((item.depth_tokens.metadata.identity, item.depth_tokens.metadata.row_shape))
    if len(identities) > 1:
        raise errors.UserError(f"depth tokens of the mix come from different tokenizers: {sorted(identities)}")
    return identities.pop()[1][0]


def normalised(values: np.ndarray, normaliser: normalise.Normaliser, width: int) -> np.ndarray:
    """Normalised vectors, filled with zeros up to `width`."""
    out = normalise.normalise(values, normaliser)
    if out.shape[-1] == width:
        return out
    return np.concatenate([out, np.zeros((*out.shape[:-1], width - out.shape[-1]), np.float32)], -1)
