"""What worker processes do for tests of the gates; arguments and results are JSON."""

from dataclasses import asdict
from unittest.mock import patch

import numpy as np

from cpt_mega.config import load_config
from cpt_mega.gates.asking import Interrupted, distributions, likeliest_tokens, score_requests
from cpt_mega.gates.probes.drift import divergence
from cpt_mega.gates.requests import Request
from cpt_mega.loop import overlap
from cpt_mega.loop.gate_alone import measure_alone
from cpt_mega.loop.scoring import scorer, scoring_engine
from cpt_mega.loop.session import run_session
from cpt_mega.loop.signals import StopRequest


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


def look(checkpoint: str, suite: str, overrides: list[str], base: str | None = None) -> list[dict] | None:
    """What each probe of a suite found: its readings and the scores and values of its items; None but on the main rank."""
    measured = measure_alone(checkpoint, suite, base, overrides)
    if measured is None:
        return None
    return [
        {"probe": one.probe.name, "readings": one.to_json(), "items": [asdict(item) for item in one.items]}
        for one in measured.found
    ]


def divergences(checkpoint: str, base: str, texts: list[list[int]], count: int, overrides: list[str]) -> dict:
    """Bounds of KL(base || checkpoint) at every target of texts, and what was cut off."""
    requests = [_request(tokens, 1, [], None) for tokens in texts]
    with scorer(overrides) as opening:
        kept = likeliest_tokens(opening.engine(base)[0], requests, 64, count)
        engine, _ = opening.engine(checkpoint)
        found = divergence(kept, *distributions(engine, requests, 64, kept.ids))
    return {name: values.tolist() for name, values in vars(found).items()}


def train_with_many_beats(config: str, overrides: list[str], signalled: str | None) -> list[str]:
    """A run whose main process tells the others at every part of a corpus that it lives; a signal came before, if any."""
    request = StopRequest()
    request.name = signalled
    with patch.object(overlap, "_BEAT_S", -1.0), patch.object(overlap, "_SAY_S", -1.0):
        return list(run_session(load_config(config, overrides), "the same command", request))


def _request(tokens: list[int], first: int, lengths: list[int], counts: list[bool] | None) -> Request:
    return Request(
        np.array(tokens, np.int64), first, tuple(lengths), None if counts is None else np.array(counts, bool)
    )
