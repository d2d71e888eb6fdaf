"""Progress of long work: the time left does not count what was paid once."""

from qdepth_jax import progress


def test_the_first_part_with_its_compilation_is_left_out_of_the_rate(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(100, "frames", unit="frame")
    now[0] = 1000.0  # compiled
    bar.begin(10)
    assert capsys.readouterr().err == ""
    now[0] = 1002.0
    bar.update(20)
    assert "30/100 frame, 10.00/s, 7 s left" in capsys.readouterr().err
    whole = progress.Progress(10, "one episode")
    whole.begin(10)
    assert "10/10 it" in capsys.readouterr().err, "what is done at once says so"
