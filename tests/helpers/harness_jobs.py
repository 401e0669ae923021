"""What worker processes do for tests of lm-evaluation-harness, which has to be installed; arguments and results are JSON."""

import os
import random
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.gates.asking import Interrupted
from cpt_mega.gates.harness import HarnessModel
from cpt_mega.gates.suite import open_suite, take_look
from cpt_mega.gates.undisturbed import undisturbed
from cpt_mega.hf.model_info import HF_FOLDER
from cpt_mega.loop.scoring import scoring_engine

ROW_TOKENS = 96


def lm_eval_alone(
    checkpoint: str, tasks: str, names: list[str], overrides: list[str], stop_at: int | None = None
) -> dict:
    """What lm-eval itself finds with the model; ``stop_at``: as ``gate_jobs.answers`` has it."""
    asked = []

    def stops() -> bool:
        asked.append(None)
        return len(asked) - 1 == stop_at

    with scoring_engine(checkpoint, overrides) as (engine, folder):
        model = HarnessModel.over(engine, folder / HF_FOLDER, ROW_TOKENS, stops)
        before = _state()
        with undisturbed():
            try:
                found = evaluated(model, tasks, names)
            except Interrupted:
                found = "interrupted"
        return {"found": found, "untouched": _state() == before}


def evaluated(model, tasks: str, names: list[str]) -> dict | None:
    """lm-eval's results, by task: its metrics, and of each document what was answered and the metrics that are one number.

    None where lm-eval gives no results."""
    manager = TaskManager(include_path=tasks, include_defaults=False)
    with patch("lm_eval.evaluator.add_env_info"):  # it asks pip for all that is installed, which takes seconds
        found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)
    return found and {name: _of_task(found["results"][name], found["samples"][name]) for name in names}


def _of_task(results: dict, documents: list[dict]) -> dict:
    documents = sorted(documents, key=lambda each: each["doc_id"])
    return {
        "results": {key.removesuffix(",none"): float(results[key]) for key in results if _is_metric(key)},
        "answers": [[_logprob(each[0]) for each in document["resps"]] for document in documents],
        "metrics": [
            {key: document[key] for key in document["metrics"] if isinstance(document[key], int | float)}
            for document in documents
        ],
    }


def _is_metric(key: str) -> bool:
    return key.endswith(",none") and "_stderr" not in key


def _logprob(response) -> float:
    return float(response[0] if isinstance(response, tuple | list) else response)


def look_and_state(checkpoint: str, suite: str, overrides: list[str]) -> dict:
    """What each probe found, and whether generators and environment were left alone by opening and looking twice."""
    with scoring_engine(checkpoint, overrides) as (engine, folder):
        tokenizer = TextTokenizer.load(folder / HF_FOLDER)
        before = _state()
        opened = open_suite(Path(suite), tokenizer, engine.shape.vocab_size, engine.shape.max_positions)
        found, again = take_look(engine, opened), take_look(engine, opened)
        after = _state()
    return {
        "untouched": before == after,
        "same_again": [one.items for one in found] == [one.items for one in again],
        "digests": opened.digests,
        "found": {
            one.probe.name: {
                "readings": {reading.metric: reading.value for reading in one.readings},
                "items": [asdict(item) for item in one.items],
            }
            for one in found
        },
    }


def _state() -> dict:
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
    }
