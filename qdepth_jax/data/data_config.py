"""The data section of an experiment: frozen dataclasses."""

import dataclasses

from qdepth_jax import errors
from qdepth_jax.data import text, windows


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One data set of a mix.

    Attributes:
      path: folder of the data set version (features.json) or its parent.
      name: row of `qdepth_jax.data.definitions`; empty = the name in dataset_info.json.
      weight: share in the mix, per frame if DataConfig.balance.
      depth: root of a depth-map sidecar (tools/annotate_depth.py); empty = the data set's own depth images.
      depth_tokens: root of a depth-token sidecar (tools/tokenize_depth.py).
    """

    path: str = ""
    name: str = ""
    weight: float = 1.0
    depth: str = ""
    depth_tokens: str = ""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is presented.

    Attributes:
      datasets: the mix.
      split: "train", "val", or with an episode slice as in TFDS: "train[:95%]", "train[95%:]", "train[:100]".
      held_out_every: n > 0 sets every n-th episode of the split aside (n-1, 2n-1, ...); 0 = none.
      held_out: False reads the rest, True reads the episodes set aside.
      statistics_split: whose sampled frames (of actions: their chunks, with chunk_end="truncate") give the
        normalisation; empty = `split`. Episodes set aside never count.
      views: camera views, main view first.
      proprio_steps, image_steps: observed steps of a sample, the present one last; before the start of an episode the
        first one is repeated (batch key "proprio_mask").
      horizon: actions in a chunk.
      chunk_end: what stands behind an episode's last action: "repeat" | "neutral" | "truncate" (see windows.py).
      depth_offset: depth and depth tokens are those of frame t + this.
      goal: "" | "final" | "uniform": which later frame of the episode the keys "goal_<view>" show.
      goal_max_steps: of "uniform", at most this many steps ahead; 0 = to the end of the episode.
      instructions: "first" | "random": of several instructions of one frame.
      swap_views: data sets with two like cameras (DROID) show one of them at random, for each episode and epoch anew.
      missing_views: "error", or "mask": a data set without a view leaves its rows 0, reads nothing, and the batch key
        "view_mask" says so.
      proprio_dim: n > 0 fills shorter proprioception up to n with zeros; 0 = all data sets of the mix must agree.
      max_text_tokens: length of the text row, bos and newline included.
      text_tokenizer: SentencePiece model file.
      text_rule: "raw" | "openpi" | "openpi_state": how an instruction is written, see text.py; the last puts the
        normalised state into the text, as pi0.5 reads it.
      normalisation: "bounds" | "minmax" | "normal".
      normalise_gripper: False leaves the gripper action in {0, 1} (open-pi-zero).
      balance: weights count per frame, so weight 1 for all means every frame equally often.
      skip_unlabelled: leave out frames without an instruction.
      max_frames_per_episode: of longer episodes use this many frames, drawn once per seed; 0 = all. `balance` counts
        the frames before that.
      image_size: (height, width) to resize to on the host; empty = native, the device resizes. Needed only where
        the data sets of a mix differ in size.
      shuffle: False walks the frames in order.
      read: "frames" reads every image alone and shuffles the whole data set; "blocks" is for object stores: long
        sequential reads, shuffled inside a window (see blocks.py).
      block_mib, block_window_mib: size of a block and of the shuffle window of all data sets together; about twice the
        window is held in memory.
      index_dir: root for indexes; empty = inside each data set.
      threads: decode threads; 0 = number of CPU cores.
    """

    datasets: tuple[DatasetConfig, ...] = ()
    split: str = "train"
    held_out_every: int = 0
    held_out: bool = False
    statistics_split: str = ""
    views: tuple[str, ...] = ("main",)
    proprio_steps: int = 1
    image_steps: int = 1
    horizon: int = 4
    chunk_end: str = "repeat"
    depth_offset: int = 0
    goal: str = ""
    goal_max_steps: int = 0
    instructions: str = "first"
    swap_views: bool = True
    missing_views: str = "error"
    proprio_dim: int = 0
    max_text_tokens: int = 20
    text_tokenizer: str = ""
    text_rule: str = "raw"
    normalisation: str = "bounds"
    normalise_gripper: bool = False
    balance: bool = True
    skip_unlabelled: bool = True
    max_frames_per_episode: int = 0
    image_size: tuple[int, ...] = ()
    shuffle: bool = True
    read: str = "frames"
    block_mib: float = 64
    block_window_mib: float = 1024
    index_dir: str = ""
    threads: int = 0

    def __post_init__(self):
        for name, allowed in (
            ("goal", ("", "final", "uniform")),
            ("instructions", ("first", "random")),
            ("missing_views", ("error", "mask")),
            ("read", ("frames", "blocks")),
            ("text_rule", text.RULES),
        ):
            if getattr(self, name) not in allowed:
                raise errors.UserError(f"data.{name}={getattr(self, name)!r} is unknown: use one of {allowed}")
        if len(set(self.views)) != len(self.views):
            raise errors.UserError(f"data.views={self.views} names a view twice")
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise errors.UserError(f"data.image_size={self.image_size} must be (height, width) in pixels, or ()")
        for name in ("proprio_steps", "image_steps", "horizon", "max_text_tokens"):
            if getattr(self, name) < 1:
                raise errors.UserError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name in ("depth_offset", "goal_max_steps", "max_frames_per_episode", "proprio_dim", "threads"):
            if getattr(self, name) < 0:
                raise errors.UserError(f"data.{name}={getattr(self, name)} must not be negative")
        if not 0 < self.block_mib <= self.block_window_mib:
            raise errors.UserError(
                f"data.block_mib={self.block_mib} must be positive and at most data.block_window_mib="
                f"{self.block_window_mib}"
            )
        windows.check_ending(self.chunk_end)
