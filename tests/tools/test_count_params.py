"""Published parameter counts, by shape alone."""

import importlib.util
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def test_published_counts(capsys):
    spec = importlib.util.spec_from_file_location("count_params", ROOT / "tools" / "count_params.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(["count_params.py"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["baseline_total"] == 3_238_100_727
    assert result["baseline_trained"] == 2_605_938_423
    assert result["qdepth_added_parts"] == {
        "depth expert": 311_464_960,
        "depth encoder MLP": 2_230_272,
        "depth decoder CNN": 4_092_448,
    }
    assert round(result["qdepth_trained"] / 1e9, 3) == 2.924
    assert result["other_totals"] == {"pi0": 3_238_048_528, "pi05": 3_353_433_872, "paligemma": 2_923_335_408}
