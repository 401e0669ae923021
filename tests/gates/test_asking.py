"""Requests at every layout against transformers, each asked alone."""

import random

import numpy as np
import pytest
import torch

from cpt_mega.hf.convert import import_hf
from tests.helpers.workers import JobFailed

LAYOUTS = {
    "one": (1, []),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "dp2": (2, []),
    "cp2": (2, ["parallel.cp=2"]),
    "tp2_pp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2"]),
    "pp2_dp2": (4, ["parallel.pp=2"]),
    "cp2_dp2": (4, ["parallel.cp=2"]),
}
OFTEN = ("one", "tp2_sp", "pp2_vpp2", "cp2", "dp2")


@pytest.fixture(scope="module")
def requests() -> list[dict]:
    """Short and long ones; some behind another document; some of which not all counts; some differ in the last token alone."""
    draw = random.Random(3)
    found = []
    for number in range(41):
        tokens = [draw.randrange(1, 300) for _ in range(draw.choice((2, 3, 9, 30, 47)))]
        first = draw.randrange(1, len(tokens))
        before = [draw.randrange(1, 300) for _ in range(5)] if number % 4 == 0 else []
        counts = [draw.random() < 0.5 for _ in tokens] if number % 5 == 0 else None
        if counts:
            counts[-1] = True
            counts = [False] * len(before) + counts
        lengths = [len(before), len(tokens)] if before else []
        found.append({"tokens": before + tokens, "first": len(before) + first, "lengths": lengths, "counts": counts})
    plain = [one for one in found if one["counts"] is None][:6]
    others = [one | {"tokens": [*one["tokens"][:-1], last]} for one in plain for last in (5, 300)]
    return found + others + [found[1]]


@pytest.fixture(scope="module")
def expected(jobsite, requests) -> list[dict]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(jobsite.hf, dtype=torch.float32).eval()
    return [_alone(model, **request) for request in requests]


def _alone(model, tokens, first, lengths, counts) -> dict:
    start = lengths[0] if lengths else 0
    ids = torch.tensor(tokens[start:])
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    scored = [place for place in range(first, len(tokens)) if counts is None or counts[place]]
    logprobs = [logits[place - start - 1].log_softmax(-1)[tokens[place]].item() for place in scored]
    greedy = all(logits[place - start - 1].argmax().item() == tokens[place] for place in scored)
    return {"logprob": sum(logprobs), "is_greedy": greedy, "targets": len(scored)}


def ask(workers, jobsite, requests, row_tokens=64, world=1, overrides=(), **more) -> list:
    """What each rank was answered."""
    words = {"checkpoint": jobsite.checkpoint, "requests": requests, "overrides": ["precision=fp32", *overrides]}
    return workers(world).run("gate_jobs.answers", **words, row_tokens=row_tokens, **more)


@pytest.mark.parametrize(
    "layout", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_each_request_has_the_log_probability_that_it_has_alone(workers, jobsite, requests, expected, layout):
    world, overrides = LAYOUTS[layout]
    by_rank = ask(workers, jobsite, requests, world=world, overrides=overrides)
    assert all(found == by_rank[0] for found in by_rank)
    for found, right in zip(by_rank[0], expected, strict=True):
        assert found["logprob"] == pytest.approx(right["logprob"], abs=2e-5 * right["targets"])
        assert (found["is_greedy"], found["targets"]) == (right["is_greedy"], right["targets"])


def test_the_likeliest_continuation_is_greedy(workers, jobsite):
    """Random tokens hardly ever are."""
    from transformers import AutoModelForCausalLM

    model, tokens = AutoModelForCausalLM.from_pretrained(jobsite.hf, dtype=torch.float32).eval(), [7, 11]
    with torch.no_grad():
        for _ in range(3):
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    other = [*tokens[:-1], tokens[-1] ^ 1]
    asked = [{"tokens": each, "first": 2, "lengths": [], "counts": None} for each in (tokens, other)]
    assert [answer["is_greedy"] for answer in ask(workers, jobsite, asked, 8)[0]] == [True, False]


@pytest.mark.parametrize("row_tokens", [1, pytest.param(128, marks=pytest.mark.full)])
def test_rows_of_any_length_give_the_same_answers(workers, jobsite, requests, expected, row_tokens):
    """Shorter ones than a request are made longer."""
    found = ask(workers, jobsite, requests, row_tokens)[0]
    assert [answer["logprob"] for answer in found] == pytest.approx([right["logprob"] for right in expected], abs=1e-3)


def test_a_look_is_given_up_on_all_ranks_when_it_is_asked_to(workers, jobsite, requests):
    found = ask(workers, jobsite, requests, 48, 2, ["parallel.tp=2"], stop_at=1)
    assert found == ["interrupted"] * 2


def test_what_differs_in_its_last_token_alone_is_read_once(workers, jobsite):
    """Letters behind one prompt: five rounds of rows of one text each, or one."""
    prompt = list(range(1, 31))
    letters = [{"tokens": [*prompt, last], "first": 30, "lengths": [], "counts": None} for last in range(40, 60)]
    apart = [one | {"tokens": [number, *one["tokens"][1:]]} for number, one in enumerate(letters, 1)]
    assert len(ask(workers, jobsite, letters, 8, stop_at=1)[0]) == 20
    assert ask(workers, jobsite, apart, 8, stop_at=1)[0] == "interrupted"


def test_a_token_that_the_model_does_not_have_is_refused(workers, jobsite):
    with pytest.raises(JobFailed, match="vocabulary of 301"):
        ask(workers, jobsite, [{"tokens": [1, 2, 301], "first": 1, "lengths": [], "counts": None}])


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ("one", 5),
        ("one", 301),
        ("tp2_sp", 5),
        ("tp2_sp", 301),
        ("cp2", 5),
        ("dp2", 5),
        pytest.param("pp2_vpp2", 5, marks=pytest.mark.full),
        pytest.param("tp2_pp2", 301, marks=pytest.mark.full),
        pytest.param("cp2_dp2", 5, marks=pytest.mark.full),
    ],
)
def test_a_divergence_lies_within_its_bounds_and_is_exact_where_nothing_is_cut_off(
    workers, jobsite, moved, requests, layout, count
):
    world, overrides = LAYOUTS[layout]
    folder, texts, right = moved
    words = {"checkpoint": str(folder), "base": jobsite.checkpoint, "texts": texts, "count": count}
    found = workers(world).run("gate_jobs.divergences", **words, overrides=["precision=fp32", *overrides])
    assert all(other == found[0] for other in found)
    low, high, rest = (np.array(found[0][name]) for name in ("low", "high", "rest"))
    assert len(low) == len(right) and (low <= right + 1e-4).all() and (right <= high + 1e-4).all()
    if count == 301:
        assert np.allclose(low, right, atol=1e-4) and np.allclose(high, right, atol=1e-4) and rest.max() < 1e-5
    else:
        assert rest.min() > 0.01 and (high - low).max() > 0.01


@pytest.fixture(scope="module")
def moved(jobsite, requests, tmp_path_factory):
    """Another model, texts, and the KL from the first to it at each of their targets, by transformers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("moved")
    base = AutoModelForCausalLM.from_pretrained(jobsite.hf, dtype=torch.float32).eval()
    now = AutoModelForCausalLM.from_pretrained(jobsite.hf, dtype=torch.float32).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    now.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "import")
    texts, right = [request["tokens"] for request in requests[:20]], []
    for tokens in texts:
        with torch.no_grad():
            p, q = (model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1) for model in (base, now))
        right += (p.exp() * (p - q)).sum(-1).tolist()
    return folder / "import", texts, np.array(right)
