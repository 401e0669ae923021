"""Small tasks of lm-evaluation-harness, of each kind that is answered by likelihoods, with texts of their own."""

import json
import random
from pathlib import Path

# Paths of data are lm-eval's business: relative ones would be to where it is started.
TASKS = {
    "choices": """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/shown.jsonl, test: {folder}/choices.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
training_split: train
test_split: test
num_fewshot: 2
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
""",
    "words": """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}, cache_dir: {folder}/cache}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""",
    "texts": """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}, cache_dir: {folder}/cache}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "written": """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}, cache_dir: {folder}/cache}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: exact_match}}]
""",
}
SUITE = """\
name: harness
row_tokens: 96
probes:
  choices: {bucket: general, kind: harness, task: choices, tasks: tasks}
  words: {bucket: general, kind: harness, task: words, tasks: tasks}
  texts: {bucket: domain, kind: harness, task: texts, tasks: tasks}
"""
_WORDS = ("the", "quick", "brown", "fox", "over", "a", "lazy", "dog", "in time,", "naïve", "café;", "return", "a + b")


def write_tasks(folder: Path, words: list[dict]) -> Path:
    """Writes a suite of three tasks, and the tasks, into ``folder``; ``words``: texts and targets. Returns the suite."""
    draw = random.Random(5)
    files = {
        "shown": [_choice(draw, 5) for _ in range(6)],
        "choices": [_choice(draw, 60 if number % 8 == 0 else 5) for number in range(24)],  # some longer than is read
        "words": [*words, {"text": "", "target": "the dog"}, {"text": "the quick ", "target": "fox"}],
        "texts": [{"text": _text(draw, length)} for length in (1, 5, 40, 90, 200)],
    }
    (folder / "tasks").mkdir(parents=True)
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(task.format(folder=folder))
    (folder / "suite.yaml").write_text(SUITE)
    return folder / "suite.yaml"


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(_WORDS, k=words))


def _choice(draw: random.Random, words: int) -> dict:
    return {
        "question": _text(draw, words),
        "choices": [_text(draw, draw.randint(1, 3)) + f" {n}" for n in range(4)],
        "answer": draw.randrange(4),
    }
