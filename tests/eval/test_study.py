"""Tables of a study: the numbers are counted by hand."""

import json

import pytest

from qdepth_jax.eval import study


def keep(folder, name, content):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def result(successes, episodes, suite="s"):
    rate = {"successes": successes, "episodes": episodes}
    return {"suites": {suite: rate}, "tasks": {f"{suite}/0": {"task": "reach"} | rate}}


@pytest.fixture
def folder(tmp_path):
    for seed, (base, ours) in enumerate(((4, 6), (2, 6), (4, 10))):
        for variant, successes in (("baseline", base), ("qdepth", ours)):
            keep(tmp_path / "toy", f"{variant}_{seed}", {"cost": {"cpu_seconds": 100 + seed}})
            keep(tmp_path / "toy" / f"{variant}_{seed}", "s", result(successes, 20))
    keep(tmp_path / "toy" / "untrained", "s", result(0, 20))
    return tmp_path


def cells(folder, name):
    lines = (folder / "tables.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| variant")).strip("| ").split(" | ")
    row = next(line for line in lines if line.startswith(f"| {name} |")).strip("|").split("|")
    return dict(zip(header, (cell.strip() for cell in row)))


def test_rates_and_intervals(folder):
    study.write(folder, ["toy", "absent"], ["qdepth", "baseline", "pixel_depth"])
    ours = cells(folder, "qdepth")
    assert ours["successes"] == "22 of 60" and ours["rate, %"] == "36.7"
    assert ours["rate of each seed, %"] == "30.0, 30.0, 50.0"
    # Wilson of 22 of 60 (Brown, Cai and DasGupta 2001, eq. 4, by hand).
    assert ours["95 % (episodes)"] == "25.6 to 49.3"
    # Differences of 10, 20, 30 points: mean 20, deviation 10, t(0.975, 2) = 4.3027, half 4.3027 * 10 / sqrt(3) = 24.84.
    assert ours["minus baseline, points (95 %, seeds)"] == "+20.0 (-4.8 to +44.8)"
    assert cells(folder, "baseline")["minus baseline, points (95 %, seeds)"] == ""
    assert cells(folder, "untrained")["successes"] == "0 of 20"
    assert ours["training CPU-s"] == "101 (100 to 102)" and ours["action L1"] == ""
    text = (folder / "tables.md").read_text()
    assert "pixel_depth" not in text and "absent" not in text and "| s/0 reach | 22 / 60 | 10 / 60 | 0 / 20 |" in text
    assert "svg" in (folder / "success_toy.svg").read_text()


def test_a_seed_that_lacks_a_suite_is_in_no_rate(folder):
    keep(folder / "toy" / "qdepth_0", "t", result(20, 20, "t"))
    study.write(folder, ["toy"], ["qdepth", "baseline"])
    assert cells(folder, "qdepth")["successes"] == "26 of 40"
    assert cells(folder, "qdepth")["minus baseline, points (95 %, seeds)"] == "+45.0 (one seed)"
