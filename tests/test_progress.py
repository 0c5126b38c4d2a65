"""Progress: plain lines where there is no terminal, silence when it is quick."""

from jmm_fast.progress import Progress


def test_plain_progress_lines(capsys):
    with Progress("pretrain", 4, done=2, every=0.0) as progress:
        progress.advance(8, "loss 0.5")
        progress.advance(8, "loss 0.4")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("pretrain: step 3/4  loss 0.5") and "samples/s" in lines[0] and "left" in lines[0]
    assert "step 4/4" in lines[1] and "0:00 left" in lines[1]


def test_nothing_is_shown_unasked(capsys):
    with Progress("pretrain", 1, every=0.0, shown=False) as progress:
        progress.advance(8)
    assert capsys.readouterr().err == ""


def test_quick_work_is_silent(capsys):
    with Progress("features", 2) as progress:
        progress.advance(8)
        progress.advance(8)
    assert capsys.readouterr().err == ""
