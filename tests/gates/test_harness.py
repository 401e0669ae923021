"""Tasks of lm-evaluation-harness against its own model over transformers, item by item."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extras `harness,bench` are not installed (tests/run.sh --full does it)")

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.suite import open_suite
from cpt_mega.gates.undisturbed import undisturbed
from cpt_mega.hf.convert import export_hf, import_hf
from cpt_mega.hf.model_info import HF_FOLDER
from tests.helpers.corpora import write_bpe_tokenizer
from tests.helpers.harness_jobs import evaluated
from tests.helpers.harness_tasks import SUITE, write_tasks
from tests.helpers.models import tiny_llama

pytestmark = pytest.mark.full  # a minute to install, and one to run
NAMES = ["choices", "words", "texts"]
FP32 = ["precision=fp32"]
LAYOUTS = {"one": (1, []), "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"])}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A model as HF folder, import and export, and a suite; the tokenizer puts BOS before a text."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_llama(folder / "hf", num_hidden_layers=2, vocab_size=420)
    write_bpe_tokenizer(folder / "hf", adds_bos=True)
    import_hf(folder / "hf", folder / "import")
    export_hf(folder / "import", folder / "export")
    write_tasks(folder / "suite", _likeliest_words(folder / "export"))
    return folder


def _likeliest_words(folder: Path) -> list[dict]:
    """Texts and what goes on behind them; the model finds the first ones likeliest, as random words hardly ever are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for number in range(200):
        text = f"fox {number}"
        ids = tokenizer.encode(text)
        with torch.no_grad():
            target = tokenizer.decode(model(torch.tensor([ids])).logits[0, -1].argmax())
        whole = tokenizer.encode(text + target)
        if target.strip() and len(whole) == len(ids) + 1 and whole[:-1] == ids:
            found.append({"text": text, "target": target})
    assert len(found) > 3
    return [*found[:8], *({"text": line["text"], "target": " the dog"} for line in found[:8])]


@pytest.fixture(scope="module")
def expected(site) -> dict:
    """What lm-eval finds with its own model."""
    from lm_eval.models.huggingface import HFLM

    with undisturbed():
        model = HFLM(pretrained=str(site / "export"), dtype="float32", device="cpu", batch_size=8)
        return evaluated(model, str(site / "suite" / "tasks"), NAMES)


def test_the_tasks_have_what_is_compared(expected):
    """Right and wrong words and choices: a model that is always wrong agrees with any other."""
    assert 0.2 < expected["words"]["results"]["acc"] < 0.8
    assert 0 < expected["choices"]["results"]["acc"] < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_item_is_scored_as_by_lm_eval_s_own_model(workers, site, expected, layout):
    world, overrides = LAYOUTS[layout]
    words = {"checkpoint": str(site / "import"), "suite": str(site / "suite" / "suite.yaml")}
    by_rank = workers(world).run("harness_jobs.look_and_state", **words, overrides=[*FP32, *overrides])
    assert all(rank == by_rank[0] and rank["untouched"] and rank["same_again"] for rank in by_rank)
    for name in NAMES:
        found, right = by_rank[0]["found"][name], expected[name]
        for item, answers, metrics in zip(found["items"], right["answers"], right["metrics"], strict=True):
            logprobs = [item["values"][f"logprob/{place}"] for place in range(len(answers))]
            assert logprobs == pytest.approx(answers, abs=1e-4, rel=1e-6)  # of a text of 500 tokens, in fp32: rel
            for metric, value in metrics.items():
                assert item["values"][metric] == (value if "acc" in metric else pytest.approx(value, abs=1e-4))
        assert found["readings"] == pytest.approx(right["results"], rel=1e-5)


def test_lm_eval_itself_runs_with_the_model_and_leaves_no_trace(workers, site, expected):
    words = {"checkpoint": str(site / "import"), "tasks": str(site / "suite" / "tasks"), "names": NAMES}
    main, other = workers(2).run("harness_jobs.lm_eval_alone", **words, overrides=[*FP32, "parallel.tp=2"])
    for name in NAMES:
        assert main["found"][name]["results"] == pytest.approx(expected[name]["results"], rel=1e-5)
    assert other["found"] is None  # results are for who writes them
    assert main["untouched"] and other["untouched"]


def test_a_signal_ends_lm_eval_on_all_ranks(workers, site):
    words = {"checkpoint": str(site / "import"), "tasks": str(site / "suite" / "tasks"), "names": ["choices"]}
    found = workers(2).run("harness_jobs.lm_eval_alone", **words, overrides=[*FP32, "parallel.tp=2"], stop_at=1)
    assert found == [{"found": "interrupted", "untouched": True}] * 2


def opened(site: Path, folder: Path, text: str = SUITE, name: str = ""):
    """A suite over the tasks of the site, or over those of another folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "suite.yaml"
    path.write_text(text.replace("tasks: tasks", f"tasks: {name or site / 'suite' / 'tasks'}"))
    return open_suite(path, TextTokenizer.load(site / "import" / HF_FOLDER), 420, 128)


def test_a_digest_covers_task_and_texts_and_not_where_they_lie(site, tmp_path):
    before = opened(site, tmp_path).digests
    moved = write_tasks(tmp_path / "moved", [json.loads(x) for x in (site / "suite/words.jsonl").open()][:-2]).parent
    assert opened(site, tmp_path, name=str(moved / "tasks")).digests == before
    task = moved / "tasks" / "choices.yaml"
    task.write_text(task.read_text().replace("acc_norm", "acc_bytes"))
    (moved / "texts.jsonl").write_text((moved / "texts.jsonl").read_text().replace("lazy", "busy"))
    after = opened(site, tmp_path, name=str(moved / "tasks")).digests
    assert {name for name in before if before[name] != after[name]} == {"choices", "texts"}
    fewer = opened(site, tmp_path, SUITE.replace("task: choices,", "task: choices, shots: 1,")).digests
    assert {name for name in before if before[name] != fewer[name]} == {"choices"}


def test_some_items_and_shorter_texts_on_request(site, tmp_path):
    text = SUITE.replace("task: choices,", "task: choices, max_items: 5, metric: acc_norm,")
    suite = opened(site, tmp_path, text.replace("task: texts,", "task: texts, max_length: 16,"))
    choices, _, texts = suite.probes
    assert len(choices.requests) == 20 and choices.metric == "acc_norm" and choices.scale == "right_or_wrong"
    assert max(request.inputs for request in texts.requests) == 16 and texts.scale == "other"


BAD = [
    ("task: choices", "task: choice", "no such task"),
    ("task: choices", "task: written", "generation is not in this version"),
    ("task: choices", "task: choices, metric: brier_score", "compared by one of ['acc', 'acc_norm']"),
    ("task: texts", "task: texts, max_length: 0", "max_length"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_said_in_one_line(site, tmp_path, old, new, words):
    with pytest.raises(InputError, match=re.escape(words)):
        opened(site, tmp_path, SUITE.replace(old, new))


def test_a_task_whose_own_code_or_texts_fail_is_refused_when_it_is_opened(site, tmp_path):
    moved = write_tasks(tmp_path / "moved", []).parent
    (moved / "choices.jsonl").unlink()
    with pytest.raises(InputError, match="suite probe choices task = 'choices': lm-eval cannot read it.*FileNotFound"):
        opened(site, tmp_path, name=str(moved / "tasks"))
    (moved / "tasks" / "own.py").write_text("def score(doc, results):\n    return {'acc': doc['missing']}\n")
    task = moved / "tasks" / "texts.yaml"
    task.write_text(task.read_text() + "process_results: !function own.score\n")
    text = SUITE[: SUITE.index("  choices")] + SUITE[SUITE.index("  texts") :]
    with pytest.raises(InputError, match="suite probe texts = 'texts': lm-eval cannot score it.*missing"):
        opened(site, tmp_path, text, name=str(moved / "tasks"))
