"""Real BridgeData through the real commands: index, stand-in annotation, tokenizer, tokens, bridge recipe (shrunk)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from qdepth_jax import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY_TOKENIZER = [
    "depth_size=32",
    "grid=4",
    "num_codes=64",
    "code_dim=8",
    "widths=(8,8)",
    "blocks=1",
    "start_step=2",
]
TINY_POLICY = [
    "siglip.image_size=56", "siglip.width=24", "siglip.depth=2", "siglip.heads=2", "siglip.mlp=32",
    "vlm.width=32", "vlm.mlp=48", "action.width=16", "action.mlp=24",
    "depth.expert.width=16", "depth.expert.mlp=24", "depth.grid=4", "depth.codes=64", "depth.code_dim=8",
    "depth.conv_width=8", "layers=2", "heads=4", "head_dim=8", "vocabulary=600", "text_length=24",
]  # fmt: skip


def command(*words):
    """Run a command of the project; its last line of stdout as JSON."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_bridge_from_shard_to_step(bridge_dir, tmp_path):
    index, depth = tmp_path / "index", tmp_path / "depth"
    tokenizer, policy = tmp_path / "tokenizer", tmp_path / "policy"
    shared = [
        f"--config.datasets.bridge_dataset.path={bridge_dir}",
        f"--config.datasets.bridge_dataset.depth={depth}",
        f"--config.data.index_dir={index}",
        "--config.train.batch_size=8",
        "--config.train.log_every=1",
        "--config.train.eval_batches=1",
    ]
    found = command("tools/index_rlds.py", bridge_dir, f"--index_dir={index}")
    assert found["episodes"] == 50  # 25 episodes, the same in both splits
    made = command(
        "tools/annotate_depth.py", bridge_dir, "--estimator=stand_in", f"--output={depth}", f"--index_dir={index}"
    )
    assert made["depth_kind"] == "relative" and "stand_in" in made["estimator"]
    command(
        "-m", "qdepth_jax.train", "--config=experiments/tokenizer.py:bridge", f"--workdir={tokenizer}", *shared,
        "--config.train.total_steps=4", "--config.train.eval_every=4", "--config.data.held_out_every=5",
        *(f"--config.model.{flag}" for flag in TINY_TOKENIZER),
    )  # fmt: skip
    tokens = command("tools/tokenize_depth.py", f"--tokenizer={tokenizer}")["bridge_dataset"]
    assert {split: figures["frames"] for split, figures in tokens.items()} == {
        split: row["frames"] for split, row in found["splits"].items()
    }
    last = command(
        "-m", "qdepth_jax.train", "--config=experiments/bridge.py", f"--workdir={policy}", *shared,
        f"--config.tokenizer={tokenizer}", "--config.train.total_steps=2", "--config.train.micro_batches=2",
        "--config.train.eval_every=2", "--config.data.text_tokenizer=data/text_tokenizer/libero.model",
        *(f"--config.model.{flag}" for flag in TINY_POLICY),
    )  # fmt: skip
    assert last["step"] == 2 and last["flow_loss"] > 0
    rows = metrics.read(policy / "metrics.jsonl")
    first = next(row for row in rows if row["step"] == 1)
    # 64 codes: an untrained depth head starts at ln 64 = 4.16.
    assert abs(first["depth_loss"] - 4.159) < 0.42
    assert any("val/depth_accuracy" in row for row in rows)
