import io

from rich.console import Console

from cpt_mega.loop.console import MOST_ODD_ROWS, Events


def said(*lines):
    stream = io.StringIO()
    events = Events(Console(file=stream, width=200, markup=False))
    for line in lines:
        events(line)
    return stream.getvalue().splitlines()


def test_what_happens_to_the_data_is_said():
    weights = {"kind": "weights", "step": 3, "weights": {"a": 3, "b": 1}, "by": "data.adaptive"}
    dropped = {"kind": "weights", "step": 4, "by": "data.max_epochs", "dropped": "a"}
    one, other = said(weights, {"kind": "verdict", "step": 3, "verdicts": []}, dropped)
    assert "iteration        3" in one and "a 75.0%, b 25.0% (data.adaptive)" in one
    assert "source a has been read out (data.max_epochs)" in other


def test_of_odd_rows_only_the_first_are_said():
    odd = {"kind": "odd_row", "step": 1, "source": "a", "row": 7, "problem": "all alike", "action": "skip"}
    lines = said(*[odd] * 50)
    assert len(lines) == MOST_ODD_ROWS + 1
    assert "row 7 of a: all alike (skip)" in lines[0] and "ledger.jsonl" in lines[-1]
