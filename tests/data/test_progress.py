import io

import numpy as np
import pytest

from cpt_mega.data import progress
from cpt_mega.data.encode import EncodedChunk
from cpt_mega.data.progress import EncodingProgress

CHUNK = EncodedChunk(np.arange(10), np.array([10]), 40, 50, [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_rates_share_and_time_left_are_shown(monkeypatch, stream):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setenv("COLUMNS", "120")
    with EncodingProgress(100, stream) as shown:
        shown.advance(CHUNK)
    for words in ("encoding", "50", "MB/s", "tokens/s", "left"):
        assert words in stream.getvalue()


def test_short_work_says_nothing_off_a_terminal():
    stream = io.StringIO()
    with EncodingProgress(100, stream) as shown:
        shown.advance(CHUNK)
    assert stream.getvalue() == ""
