import io

import pytest

from cpt_mega.data import progress
from cpt_mega.data.progress import EncodingProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_rates_share_and_time_left_are_shown(monkeypatch, stream):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setenv("COLUMNS", "120")
    with EncodingProgress(stream) as shown:
        shown.start(100, 20)
        shown.advance(30, 10)
    for words in ("going on: 20%", "encoding", "50", "MB/s", "tokens/s", "left"):
        assert words in stream.getvalue()


def test_short_work_says_nothing_off_a_terminal():
    stream = io.StringIO()
    with EncodingProgress(stream) as shown:
        shown.start(100, 0)
        shown.advance(50, 10)
    assert stream.getvalue() == ""
