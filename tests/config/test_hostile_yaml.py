"""Configuration files that are damaged, absurd or meant to do harm: an error in one line, quickly, in little memory."""

import json
import tracemalloc

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpt_mega.config.load import build_config, load_config, resolved_yaml
from cpt_mega.errors import InputError
from tests.helpers.jobsite import CONFIG
from tests.helpers.mutations import damaged_bytes, damaged_json, damaged_values

GOOD = CONFIG.format(folder="/nowhere").encode()
VALUES = json.dumps(yaml.safe_load(GOOD)).encode()  # JSON is YAML
CI = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LONG = settings(CI, max_examples=5000)


def laughs(levels, line):
    return "a0: &a0 [x, x]\n" + "".join(
        line.replace("NEW", f"a{i}").replace("OLD", f"*a{i - 1}") for i in range(1, levels)
    )


BOMBS = {
    "lists": laughs(20, "NEW: &NEW [OLD, OLD, OLD, OLD, OLD]\n"),
    "mappings": laughs(40, "NEW: &NEW {a: OLD, b: OLD}\n"),
    "cycle of lists": "a: &a [*a]",
    "cycle of mappings": "a: &a {b: {c: *a}}",
    "flow": "[" * 2_000,
    "blocks": "- " * 2_000,
    "keys": "? " * 2_000,
}
REFUSED = {
    "a command": "a: !!python/object/apply:os.system [id]",
    "a name": "a: !!python/name:os.system",
    "month 13": "a: 2001-13-01",
    "no time": "a: !!timestamp x",
    "no number": "a: !!int x",
    "an empty number": "a: !!int ''",
    "no float": "a: !!float x",
    "no boolean": "a: !!bool x",
    "an exponent of lists": "a: !exponent [a]",
    "a list for a key": "? [a]\n: b",
    "an exponent without a number": "a: !exponent x",
    "base64": "a: !!binary \N{SNOWMAN}",
}
PATHS = ["~nobody-of-this-name/run", "a\0b", "\ud800"]


def read(folder, content):
    path = folder / "train.yaml"
    path.write_bytes(content)
    return load_config(path)


def check(folder, content):
    try:
        config = read(folder, content)
    except InputError as error:
        assert error.field and error.fix and "\n" not in str(error) and len(str(error)) < 3000
    else:
        assert build_config(yaml.safe_load(resolved_yaml(config))) == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml")


def test_the_file_that_is_damaged_below_is_a_good_one(folder):
    read(folder, GOOD)


@CI
@given(content=damaged_bytes(GOOD) | damaged_json(VALUES))
@example(content=b'{"\\ud800\\udc00": null}')  # a key that is no text
def test_a_damaged_configuration_is_read_or_refused(folder, content):
    check(folder, content)


@pytest.mark.full
@LONG
@given(content=damaged_bytes(GOOD) | damaged_json(VALUES))
def test_many_damaged_configurations_are_read_or_refused(folder, content):
    check(folder, content)


@CI
@given(
    name=st.sampled_from(["train", "data.sources", "core.a", "run.dir", "data.exclude.x"]), text=st.text(max_size=12)
)
def test_an_override_of_any_text_is_taken_or_refused(name, text):
    try:
        build_config(json.loads(VALUES), [f"{name}={text}"])
    except InputError as error:
        assert error.field


@CI
@given(values=damaged_values(json.loads(VALUES)))
def test_any_values_make_a_configuration_or_an_error(values):
    if isinstance(values, dict):
        try:
            build_config(values)
        except InputError as error:
            assert error.field


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_few_lines_cannot_ask_for_much_memory(folder, bomb):
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"train\.yaml.*(too many values|own value|too deeply)"):
            read(folder, BOMBS[bomb].encode())
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bomb", ["lists", "cycle of lists", "flow"])
def test_nor_can_an_override(bomb):
    with pytest.raises(InputError, match="not valid YAML"):
        build_config(json.loads(VALUES), [f"run={BOMBS[bomb]}"])


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_value_is_refused(folder, text):
    with pytest.raises(InputError, match=r"train\.yaml.*not valid YAML"):
        read(folder, text.encode())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["run.dir", "model.checkpoint", "tokenizer.path"])
def test_a_path_that_cannot_be_is_refused_by_its_option(name, path):
    with pytest.raises(InputError, match=name):
        build_config(json.loads(VALUES), [f"{name}={json.dumps(path)}"])


@pytest.mark.parametrize("path", PATHS[1:])
def test_a_configuration_cannot_extend_such_a_path(folder, path):
    with pytest.raises(InputError, match="extends"):
        read(folder, f"extends: {json.dumps(path)}".encode())


def test_aliases_are_followed_where_they_are_few(folder):
    config = read(folder, GOOD + b"core: {one: &a 7, other: *a}\n")
    assert config.core == {"one": 7, "other": 7}
