"""The data section of an experiment: frozen dataclasses, no imports beyond the standard library."""

import dataclasses


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
      statistics_split: whose sampled frames give the normalisation; empty = `split`. Episodes set aside never count.
      views: camera views, main view first.
      horizon: actions in a chunk.
      depth_offset: depth and depth tokens are those of frame t + this.
      max_text_tokens: length of the text row, bos and newline included.
      text_tokenizer: SentencePiece model file.
      normalisation: "bounds" | "minmax" | "normal".
      normalise_gripper: False leaves the gripper action in {0, 1} (open-pi-zero).
      balance: weights count per frame, so weight 1 for all means every frame equally often.
      skip_unlabelled: leave out frames without an instruction.
      max_frames_per_episode: of longer episodes use this many frames, drawn once per seed; 0 = all.
      image_size: (height, width) to resize to on the host; empty = native, the device resizes. Needed only where
        the data sets of a mix differ in size.
      shuffle: False walks the frames in order.
      index_dir: root for indexes; empty = inside each data set.
      threads: decode threads; 0 = number of CPU cores.
    """

    datasets: tuple[DatasetConfig, ...] = ()
    split: str = "train"
    held_out_every: int = 0
    held_out: bool = False
    statistics_split: str = ""
    views: tuple[str, ...] = ("main",)
    horizon: int = 4
    depth_offset: int = 0
    max_text_tokens: int = 20
    text_tokenizer: str = ""
    normalisation: str = "bounds"
    normalise_gripper: bool = False
    balance: bool = True
    skip_unlabelled: bool = True
    max_frames_per_episode: int = 0
    image_size: tuple[int, ...] = ()
    shuffle: bool = True
    index_dir: str = ""
    threads: int = 0
