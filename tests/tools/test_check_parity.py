"""tools/check_parity.py as a user runs it."""

import json
import shutil

import pytest

from cpt_mega.hf.convert import import_hf
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.hf.reference import PARITY_FILE, read_reference
from tests.helpers.models import tiny_llama


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    tiny_llama(folder / "hf", tokenizer=True, vocab_size=400)
    import_hf(folder / "hf", folder / "import")
    return folder


def _kept(folder):
    return read_reference(folder, read_model_info(folder))


def test_the_table_names_the_next_command_and_the_import_verifies(imported, checkpoint_tool):
    code, out, _ = checkpoint_tool("check_parity.py", imported / "import")
    assert code == 0 and out.endswith(f"next: bash launch/torchrun.sh CONFIG model.checkpoint={imported / 'import'}\n")
    assert "571 tokens predicted" in out and "fp32, eager attention, transformers" in out
    code, out, _ = checkpoint_tool("verify_checkpoint.py", imported / "import")
    assert code == 0
    first = _kept(imported / "import")
    assert checkpoint_tool("check_parity.py", imported / "import")[0] == 0
    assert (_kept(imported / "import").logprobs == first.logprobs).all()


def test_texts_of_ones_own(imported, checkpoint_tool, tmp_path):
    lines = [{"text": "a stitch in time"}, {"ids": [5, 399, 7]}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--texts", tmp_path / "texts.jsonl", "--attention", "sdpa", "--json")
    code, out, _ = checkpoint_tool("check_parity.py", imported / "import", *words)
    report = json.loads(out)
    assert code == 0 and (report["texts"], report["attention"]) == (2, "sdpa")
    kept = _kept(imported / "import")
    assert kept.texts[1].tolist() == [5, 399, 7] and report["tokens"] == len(kept.logprobs)
    assert report["bytes"] == (imported / "import" / PARITY_FILE).stat().st_size


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":1 = '{': a text is"),
        ('{"ids": [1]}', "two tokens or more"),
        ('{"ids": [1, 400]}', "outside the model's vocabulary of 400"),
        (json.dumps({"ids": [1] * 129}), "the model has 128 positions; cut it"),
        ("", "holds no text"),
        (None, "cannot be read"),
    ],
)
def test_texts_that_are_none_are_one_line(imported, checkpoint_tool, tmp_path, line, words):
    if line is not None:
        (tmp_path / "texts.jsonl").write_text(line + "\n")
    code, _, err = checkpoint_tool("check_parity.py", imported / "import", "--texts", tmp_path / "texts.jsonl")
    assert code == 2 and len(err.splitlines()) == 1 and words in err


def test_the_folder_of_origin_may_have_moved(imported, checkpoint_tool, tmp_path):
    shutil.copytree(imported / "import", tmp_path / "import")
    shutil.move(imported / "hf", imported / "moved")
    try:
        code, _, err = checkpoint_tool("check_parity.py", tmp_path / "import")
        assert code == 2 and len(err.splitlines()) == 1
        assert "--hf = 'not given'" in err and "name that folder with --hf" in err
        assert checkpoint_tool("check_parity.py", tmp_path / "import", "--hf", imported / "moved")[0] == 0
    finally:
        shutil.move(imported / "moved", imported / "hf")


def test_a_model_without_a_tokenizer_has_texts_too(tmp_path, checkpoint_tool):
    tiny_llama(tmp_path / "hf", max_position_embeddings=40)
    import_hf(tmp_path / "hf", tmp_path / "import")
    assert checkpoint_tool("check_parity.py", tmp_path / "import")[0] == 0
    assert [len(text) for text in _kept(tmp_path / "import").texts] == [40, 40]


def test_only_an_import_will_do(runs, checkpoint_tool):
    code, _, err = checkpoint_tool("check_parity.py", runs.checkpoints("first")[0])
    assert code == 2 and "is a checkpoint of a run, whose weights have moved" in err
