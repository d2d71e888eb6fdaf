"""Tables of a study: the numbers are counted by hand."""

import json

import pytest

from qdepth_jax import errors
from qdepth_jax.eval import study

VARIANTS = {"qdepth": True, "baseline": False, "pixel_depth": False}


def keep(folder, name, content):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def result(outcomes, suite="s", **options):
    return {
        "starts": [0, len(outcomes) - 1],
        "outcomes": {f"{suite}/0": outcomes},
        "tasks": {f"{suite}/0": {"task": "reach"}},
    } | options


def flags(successes, episodes=20):
    return "1" * successes + "0" * (episodes - successes)


@pytest.fixture
def folder(tmp_path):
    for seed, (base, ours) in enumerate(((4, 6), (2, 6), (4, 10))):
        for variant, successes in (("baseline", base), ("qdepth", ours)):
            keep(tmp_path / "toy", f"{variant}_{seed}", {"cost": {"cpu_seconds": 100 + seed}})
            keep(tmp_path / "toy" / f"{variant}_{seed}", "s", result(flags(successes)))
    keep(tmp_path / "toy" / "untrained", "s", result(flags(0)))
    return tmp_path


def write(folder, *suites):
    study.write(folder, {"toy": suites or ("s",), "absent": ("s",)}, VARIANTS)
    return (folder / "tables.md").read_text()


def cells(text, name):
    """Header -> cell of all tables that have a row of this name."""
    lines, out = text.splitlines(), {}
    for i, line in enumerate(lines):
        if line.startswith("| variant |"):
            header = [cell.strip() for cell in line.strip("|").split("|")]
            for row in lines[i:]:
                if not row:
                    break
                if row.startswith(f"| {name} |"):
                    out |= dict(zip(header, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    return out


def test_rates_and_intervals(folder):
    text = write(folder)
    ours = cells(text, "qdepth")
    assert ours["successes"] == "22 of 60" and ours["rate, %"] == "36.7" and ours["seeds"] == "3"
    assert ours["each seed, %"] == "30.0, 30.0, 50.0"
    # Wilson of 22 of 60 (Brown, Cai and DasGupta 2001, eq. 4, by hand).
    assert ours["95 % (episodes)"] == "25.6 to 49.3"
    # Differences of 10, 20, 30 points: mean 20, deviation 10, t(0.975, 2) = 4.3027, half 4.3027 * 10 / sqrt(3) = 24.84.
    assert ours["minus baseline, points (95 %, seeds)"] == "+20.0 (-4.8 to +44.8)"
    # 12 episodes that only it solved, at 8 starts: 2 * 2^-8.
    assert ours["won : lost against baseline (p)"] == "12 : 0 (0.008)"
    assert cells(text, "baseline")["minus baseline, points (95 %, seeds)"] == ""
    assert cells(text, "untrained")["successes"] == "0 of 20"
    assert ours["training CPU-s"] == "101 (100 to 102)"
    assert "pixel_depth" not in text and "absent" not in text and "| s/0 reach | 22 / 60 | 10 / 60 | 0 / 20 |" in text
    assert "svg" in (folder / "success_toy.svg").read_text()


def test_seeds_of_one_start_are_one_sign(folder):
    # Without repetition the sign test: 8 of 10, 2 * (45 + 10 + 1) / 1024.
    assert study.flipped_signs([1] * 8 + [-1] * 2 + [0] * 5) == pytest.approx(112 / 1024)
    # 3 + 1 - 1 among the eight sums of +-3, +-1, +-1: 5 and -5 once each, 3 and -3 twice each.
    assert study.flipped_signs([3, 1, -1]) == pytest.approx(6 / 8)
    assert study.flipped_signs([2, 2]) == 0.5 and study.flipped_signs([]) == 1.0


def test_a_seed_that_lacks_a_suite_of_the_part_is_in_no_rate(folder):
    """Whatever the other seeds of its variant have: suites differ in difficulty."""
    keep(folder / "toy" / "baseline_0", "t", result(flags(0), "t"))
    keep(folder / "toy" / "qdepth_0", "t", result(flags(20), "t"))
    text = write(folder, "s", "t")
    ours = cells(text, "qdepth")
    assert ours["successes"] == "26 of 40" and ours["seeds"] == "1 (2 more unfinished)"
    assert (ours["s, %"], ours["t, %"]) == ("30.0", "100.0")
    assert ours["minus baseline, points (95 %, seeds)"] == "+55.0 (one seed)"
    for path in (folder / "toy").glob("qdepth_*/t.json"):
        path.unlink()
    text = write(folder, "s", "t")
    assert cells(text, "qdepth")["successes"] == "" and cells(text, "baseline")["successes"] == "4 of 40"


def test_equal_differences_give_no_interval(folder):
    for seed in range(3):
        keep(folder / "toy" / f"baseline_{seed}", "s", result(flags(4)))
        keep(folder / "toy" / f"qdepth_{seed}", "s", result(flags(6)))
    assert (
        cells(write(folder), "qdepth")["minus baseline, points (95 %, seeds)"]
        == "+10.0 (equal for every seed: no interval)"
    )


def test_other_episodes_are_not_compared(folder):
    keep(folder / "toy" / "qdepth_0", "s", result(flags(20, 40)))
    ours = cells(write(folder), "qdepth")
    assert ours["minus baseline, points (95 %, seeds)"] == "other episodes"
    assert ours["won : lost against baseline (p)"] == ""


def test_crashes_are_named_and_in_no_rate(folder):
    keep(folder / "toy" / "untrained", "s", result("1c" + flags(0, 18)))
    assert cells(write(folder), "untrained")["successes"] == "1 of 19, 1 crashes"


def test_an_episode_that_crashed_for_either_is_left_out_of_the_comparison(folder):
    keep(folder / "toy" / "baseline_0", "s", result("c" + flags(3, 19)))
    keep(folder / "toy" / "qdepth_0", "s", result("11c1" + flags(4, 16)))
    for seed in (1, 2):
        (folder / "toy" / f"qdepth_{seed}" / "s.json").unlink()
    ours = cells(write(folder), "qdepth")
    # Starts 1 and 3 to 19: 1 + 1 + 4 of 18 against 1 (start 1) and 1 (start 3).
    assert ours["minus baseline, points (95 %, seeds)"] == "+22.2 (one seed), 2 crashed left out"
    assert ours["won : lost against baseline (p)"] == "4 : 0 (0.125)"


def made_from(start, **data):
    return {"cost": {"cpu_seconds": 100.0}, "made_from": {"data": data, "tokens": "t", "start": start}}


def test_only_what_was_made_from_the_same_is_paired(folder):
    whole = cells(write(folder), "qdepth")["minus baseline, points (95 %, seeds)"]
    for seed, start in enumerate("ab"):  # another start for every seed, but one for both of a seed
        for variant in ("baseline", "qdepth"):
            keep(folder / "toy", f"{variant}_{seed}", made_from(start, toy="1"))
    text = write(folder)
    assert cells(text, "qdepth")["minus baseline, points (95 %, seeds)"] == whole
    assert "from the same demonstrations and start: 0 | 1 | 2 (not recorded)." in text
    for other in (made_from("b", toy="2"), made_from("c", toy="1"), {"cost": None}):
        keep(folder / "toy", "qdepth_1", other)
        ours = cells(write(folder), "qdepth")
        # Seeds 0 and 2, 10 and 30 points; the rate stays that of all three.
        assert ours["minus baseline, points (95 %, seeds)"].startswith("+20.0 (-107.1 to +147.1), seed 1 left out: ")
        assert ours["won : lost against baseline (p)"] == "8 : 0 (0.031)" and ours["successes"] == "22 of 60"


def test_what_the_number_of_episodes_allows(folder):
    # 2, 4 and 6 of 20 end differently: 4 on average, 100 * sqrt(4) / 20 = 10 points; 4.303 * 10 / sqrt(3) = 24.8.
    text = write(folder)
    assert "4.0 of 20 episodes of a pair end differently" in text and "standard deviation of 10.0 points" in text
    assert "plus or minus: 24.8 with 3, 12.4 with 5, 7.2 with 10, 4.7 with 20 seeds." in text


@pytest.mark.parametrize("content", ["", "[]", '{"starts": [0, 1]}', b"\xff"])
def test_a_damaged_file_is_named(folder, content):
    path = folder / "toy" / "qdepth_1" / "s.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(errors.UserError, match=r"qdepth_1/s.json (is|lacks) .*: delete it"):
        write(folder)


def test_runs_that_were_not_made_alike_are_refused(folder):
    keep(folder / "toy" / "qdepth_1", "s", result(flags(4), execute=8))
    with pytest.raises(errors.UserError, match=r"options of s differ.*qdepth, seed 1"):
        write(folder)
    keep(folder / "toy" / "qdepth_1", "s", result(flags(4)))
    for seed, step in enumerate((1000, 2000)):
        keep(folder / "toy" / f"qdepth_{seed}", "held_out", held_out(0.25, 0.8, 0) | {"step": step})
    with pytest.raises(
        errors.UserError, match=r"training steps differ.*1000 \(qdepth, seed 0\); 2000 \(qdepth, seed 1\)"
    ):
        write(folder)


def test_runs_of_other_recipes_stand_in_no_common_table(folder):
    keep(folder / "toy" / "qdepth_2", "s", result(flags(4), recipe="ab"))
    with pytest.raises(errors.UserError, match=r"recipes differ.*none \(qdepth, seed 0\); ab \(qdepth, seed 2\)"):
        write(folder)


def held_out(rmse, accuracy, offset):
    actions = {name: {"l1": 0.1} for name in ("policy", "mean_action", "repeat_last_action")}
    depth = {"unit": "m"} | {name: {"rmse": rmse, "abs_rel": rmse / 2} for name in ("policy", "mean_map", "tokenizer")}
    tokens = {"accuracy": accuracy, "most_frequent_per_position_accuracy": 0.5}
    return {"step": 1, "parameters": 1234, "actions": actions, "depth": depth, "depth_tokens": tokens} | (
        {"depth_offset": offset} if offset else {}
    )


def test_depth_of_another_frame_has_its_own_reference(folder):
    for seed in range(3):
        keep(folder / "toy" / f"qdepth_{seed}", "held_out", held_out(0.25, 0.8, 0))
        keep(folder / "toy" / f"pixel_depth_{seed}", "held_out", held_out(0.5, 0.7, 16))
    text = write(folder)
    assert cells(text, "qdepth")["depth of frame"] == "t" and cells(text, "pixel_depth")["depth of frame"] == "t+16"
    assert "Depth of frame t: RMSE 0.2500 m" in text and "Depth of frame t+16: RMSE 0.5000 m" in text


def test_depth_tokens_are_paid_by_those_who_need_them(folder):
    keep(folder / "toy", "tokenizer", {"cost": {"cpu_seconds": 200.0}})
    keep(folder / "toy", "tokens", {"cost": {"cpu_seconds": 100.0}})
    text = write(folder)
    assert cells(text, "qdepth")["with its share of the depth tokens"] == "201 (200 to 202)"
    assert cells(text, "baseline")["with its share of the depth tokens"] == "none"
    keep(folder / "toy", "tokens", {"cost": None})
    assert cells(write(folder), "qdepth")["with its share of the depth tokens"] == ""


def test_the_common_start_of_all_policies_has_a_row_and_its_cost_but_is_compared_with_nobody(folder):
    keep(folder / "toy", "pretrained", {"cost": {"cpu_seconds": 5000}, "metrics": [{"step": 9, "val/flow_loss": 0.1}]})
    keep(folder / "toy" / "pretrained", "s", result(flags(3)))
    text = write(folder)
    start = cells(text, "pretrained")
    assert start["successes"] == "3 of 20" and start["minus baseline, points (95 %, seeds)"] == ""
    assert "The common start of all of them cost 5000 CPU-s, once." in text
    assert not (folder / "loss_toy.svg").exists()  # its curve has another length than the variants'
