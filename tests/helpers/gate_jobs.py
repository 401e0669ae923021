"""What worker processes do for tests of the gates; arguments and results are JSON."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.gates.asking import Interrupted, score_requests
from cpt_mega.gates.requests import Request
from cpt_mega.gates.suite import open_suite, take_look
from cpt_mega.hf.model_info import HF_FOLDER
from cpt_mega.loop.scoring import scoring_engine


def answers(
    checkpoint: str, requests: list[dict], overrides: list[str], row_tokens: int, stop_at: int | None = None
) -> list[dict] | str:
    """Answers to requests; ``stop_at``: the time it is asked whether to stop at which it says so."""
    asked = []

    def stops() -> bool:
        asked.append(None)
        return len(asked) - 1 == stop_at

    with scoring_engine(checkpoint, overrides) as (engine, _):
        try:
            found = score_requests(engine, [_request(**each) for each in requests], row_tokens, stops)
        except Interrupted:
            return "interrupted"
    return [asdict(answer) for answer in found]


def look(checkpoint: str, suite: str, overrides: list[str]) -> list[dict]:
    """What each probe of a suite found: its readings and the scores and values of its items."""
    with scoring_engine(checkpoint, overrides) as (engine, folder):
        tokenizer = TextTokenizer.load(folder / HF_FOLDER)
        opened = open_suite(Path(suite), tokenizer, engine.shape.vocab_size, engine.shape.max_positions)
        found = take_look(engine, opened)
    return [
        {"probe": one.probe.name, "readings": one.to_json(), "items": [asdict(item) for item in one.items]}
        for one in found
    ]


def _request(tokens: list[int], first: int, lengths: list[int], counts: list[bool] | None) -> Request:
    return Request(
        np.array(tokens, np.int64), first, tuple(lengths), None if counts is None else np.array(counts, bool)
    )
