"""Configuration files and overrides: what is read, and what is refused in one line."""

import pytest
import yaml

from cpt_mega.config import explained_yaml, load_config, resolved_yaml
from cpt_mega.config.load import describe_options
from cpt_mega.errors import InputError

MINIMAL = """\
run: {dir: runs/x}
model: {checkpoint: imports/base}
train: {tokens: 1e6}
data: {sources: [{name: a, path: data/a, role: domain}]}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(MINIMAL)
    return path


def test_resolved_configuration_reads_back_equal(config, tmp_path):
    loaded = load_config(config, ["optimizer.lr=2e-5", "parallel.tp=2", "parallel.sp=true"])
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(loaded))
    assert load_config(tmp_path / "resolved.yaml") == loaded
    assert loaded.train.tokens == 1_000_000 and loaded.optimizer.lr == 2e-5


def test_every_option_is_explained_once_where_its_value_stands(config):
    curriculum = "data.curriculum=[{tokens: 1, weights: {domain: 1}}, {tokens: 2, weights: {domain: 0.5}}]"
    known = load_config(config, [curriculum, "eval.sets=[{path: a, bucket: general}]"])
    text = explained_yaml(known)
    assert yaml.safe_load(text) == yaml.safe_load(resolved_yaml(known))
    for name, _, _, words in describe_options():
        (line,) = [line for line in text.splitlines() if line.endswith(f"  # {words}")] if words else [name]
        assert name.split(".")[-1].removesuffix("[]") in line


def test_paths_are_relative_to_the_current_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_config(config, ["tokenizer.path=tok"])
    assert loaded.run.dir == str(tmp_path / "runs/x")
    assert loaded.tokenizer.path == str(tmp_path / "tok")
    assert loaded.data.sources[0].path == str(tmp_path / "data/a")


def test_a_file_may_extend_another(config, tmp_path):
    (tmp_path / "child.yaml").write_text("extends: train.yaml\ntrain: {seq_length: 64}\n")
    loaded = load_config(tmp_path / "child.yaml")
    assert (loaded.train.tokens, loaded.train.seq_length) == (1_000_000, 64)


def test_files_that_extend_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match="circle"):
        load_config(tmp_path / "a.yaml")


REFUSED = {
    "train.tokns=3": ("train.tokns", "did you mean 'tokens'"),
    "trin.tokens=3": ("trin", "did you mean 'train'"),
    "train.tokens=-1": ("train.tokens", "greater than or equal to 0"),
    "train.tokens=1.5": ("train.tokens", "integer"),
    "train.tokens=true": ("train.tokens", "integer"),
    "train.seq_length=abc": ("train.seq_length", "integer"),
    "train.dropout=1.5": ("train.dropout", "less than or equal to 1"),
    "precision=fp16": ("precision", "'fp32', 'bf16'"),
    "parallel.sp=true": ("parallel.sp", "parallel.tp above 1"),
    "optimizer.lr=-1": ("optimizer.lr", "greater than or equal to 0"),
    "restore.accept=[optimizer.lrr]": ("restore.accept", "did you mean 'optimizer.lr'"),
    "restore.accept=[everything]": ("restore.accept", "no such option"),
    "optimizer.lr=.nan": ("optimizer.lr", "finite"),
    "optimizer.min_lr=1": ("optimizer.min_lr", "must not exceed optimizer.lr"),
    "schedule.warmup_tokens=2e6": ("schedule.warmup_tokens", "must not exceed train.tokens"),
    "train.micro_batch_size=3": ("train.global_batch_size", "multiple of train.micro_batch_size"),
    "data.sources=[]": ("data.sources", "at least one corpus"),
    "data.sources=[{name: a, role: domain}]": ("data.sources.0.path", "is required"),
    "data.sources=[{name: a, role: domain, pth: b}]": ("data.sources.0.pth", "did you mean 'path'?"),
    "data.sources=[{name: a, path: b, role: other}]": ("data.sources.0.role", "'domain', 'replay' or 'instruct'"),
    "data.sources=[{name: a, path: b, role: domain, wight: 1}]": ("data.sources.0.wight", "did you mean 'weight'"),
    "eval.sets=[1]": ("eval.sets.0", "a mapping of its keys"),
    "train=3": ("train", "a mapping of its keys"),
    "restore.accept=": ("restore.accept", "must be a list"),
    "data.exclude=[1]": ("data.exclude", "must be a mapping"),
    "parallel.sp=off": ("parallel.sp", "true or false"),
    "train.tokens.more=3": ("train.tokens.more", "not a section"),
    "run.dir=3": ("run.dir", "string"),
    "run.dir=[": ("run.dir", "not valid YAML"),
    "nonsense": ("command line", "section.key=value"),
}


@pytest.mark.parametrize("word", REFUSED)
def test_wrong_values_are_refused_by_name_with_a_fix(config, word):
    field, fix = REFUSED[word]
    with pytest.raises(InputError) as refusal:
        load_config(config, [word])
    assert refusal.value.field == field
    assert fix in refusal.value.fix
    assert "\n" not in str(refusal.value)


def test_off_is_a_word(config):
    """YAML 1.1 has it as a boolean, which no option of words takes."""
    loaded = load_config(config, ["data.row_checks.action=off", "logging.wandb=off", "parallel.sp=false"])
    assert (loaded.data.row_checks.action, loaded.logging.wandb, loaded.parallel.sp) == ("off", "off", False)


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        ("- a", "mapping"),
        ("a: [", "not valid YAML"),
        ("train: {tokens: 1}\ntrain: {tokens: 2}", "given twice"),
        ("\x00", "YAML"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, content, fix):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InputError, match=fix):
        load_config(tmp_path / "x.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


WRONG = [
    *("{a: {b: 1}}", "[[1]]", "{}", "[]", "[null]", "{1: 2}", "text", "''", "'\\x00'", "true", "null", "2026-11-22"),
    *("0", "1", "-1", "1.5", "-0.5", ".nan", ".inf", "-.inf", "1e30", "9" * 40, "!!binary aGVsbG8="),
]
# What an entry of a list needs beside the option in question.
ENTRIES = {
    "data.sources": {"name": "a", "path": "b", "role": "domain"},
    "eval.sets": {"path": "a", "bucket": "domain"},
    "data.curriculum": {"tokens": "0", "weights": "{a: 1}"},
}
# Refused under the name of the option that does not go with it.
PARTNERS = {
    "train.micro_batch_size": "train.global_batch_size",
    "profile.end": "profile.start",
    "anomaly.skip_z": "anomaly.clip_z",
    "anomaly.roll_back_after": "anomaly.lower_lr_after",
}


def _word(name: str, value: str) -> str:
    section, listed, leaf = name.partition("[].")
    if not listed:
        return f"{name}={value}"
    entry = {**ENTRIES[section], leaf: value}
    return f"{section}=[{{{', '.join(f'{key}: {text}' for key, text in entry.items())}}}]"


def test_every_option_has_help_and_no_value_of_any_ends_otherwise_than_in_a_line(config, tmp_path):
    options = list(describe_options())
    assert len(options) > 45
    for name, _, _, text in options:
        assert text, name
        refused = 0
        for value in WRONG:
            word = _word(name, value)
            try:
                loaded = load_config(config, [word])
            except InputError as error:
                refused += 1
                assert "\n" not in str(error) and error.fix, word
                assert error.field.startswith((name.partition("[]")[0], PARTNERS.get(name, name))), (word, str(error))
            else:  # then it is a value of that option, and reads back
                (tmp_path / "resolved.yaml").write_text(resolved_yaml(loaded))
                assert load_config(tmp_path / "resolved.yaml") == loaded, word
        assert refused > len(WRONG) // 2, name


def test_a_default_that_does_not_go_with_an_option_is_shown(config):
    with pytest.raises(InputError, match=r"train.global_batch_size = 8: must be a multiple of train.micro_batch_size"):
        load_config(config, ["train.micro_batch_size=3"])
