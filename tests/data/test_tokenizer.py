import json
import subprocess
import sys

import pytest
import sentencepiece

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.lineage import file_digest
from tests.helpers.corpora import TEXTS, write_bpe_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("spm") / "tokenizer.model")


def train_sentencepiece(path, **options):
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20),
            model_writer=stream,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
    return path


def test_hf_folder(tokenizer_folder):
    tokenizer = TextTokenizer.load(tokenizer_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 1, False)
    assert tokenizer.digest == file_digest(tokenizer_folder / "tokenizer.json")
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS
    assert max(map(max, tokenizer.encode_batch(TEXTS))) < tokenizer.vocab_size <= 400


@pytest.mark.parametrize("adds_bos", [False, True])
def test_ids_and_bos_habit_are_those_of_transformers(tmp_path, adds_bos):
    transformers = pytest.importorskip("transformers")
    folder = write_bpe_tokenizer(tmp_path / "t", adds_bos=adds_bos)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), TextTokenizer.load(folder)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert ours.adds_bos == adds_bos == (theirs.encode("x")[0] == theirs.bos_token_id)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_truncation_stored_in_the_file_cuts_nothing(tmp_path, tokenizer_folder):
    import tokenizers

    stored = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    stored.enable_truncation(2)
    stored.enable_padding(length=64)
    stored.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert TextTokenizer.load(tmp_path).encode_batch(TEXTS) == TextTokenizer.load(tokenizer_folder).encode_batch(TEXTS)


@pytest.mark.parametrize("eos", [1, [1, 0]])
def test_eos_may_stand_in_the_models_config(tmp_path, eos):
    folder = write_bpe_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos, "bos_token_id": 0}))
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, 0)


def test_special_tokens_map_is_read(tmp_path):
    folder = write_bpe_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    assert TextTokenizer.load(folder).eos_id == 1


def test_without_eos_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="end-of-sequence.*eos_token"):
        TextTokenizer.load(write_bpe_tokenizer(tmp_path / "t", eos=False))


def test_an_eos_outside_the_vocabulary_is_refused(tmp_path):
    folder = write_bpe_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(InputError, match="<nowhere>"):
        TextTokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(InputError, match="tokenizer"):
        TextTokenizer.load(tmp_path)


def test_a_damaged_config_is_refused(tmp_path):
    folder = write_bpe_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        TextTokenizer.load(folder)


def test_an_absent_tokenizer_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="tokenizer.json or tokenizer.model"):
            TextTokenizer.load(path)


def test_sentencepiece(sentencepiece_model):
    tokenizer = TextTokenizer.load(sentencepiece_model)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 300)
    assert tokenizer.adds_bos is False
    assert tokenizer.digest == file_digest(sentencepiece_model)
    assert tokenizer.decode(tokenizer.encode_batch([TEXTS[1]])[0]) == TEXTS[1]
    assert tokenizer.encode_batch([]) == []
    assert TextTokenizer.load(sentencepiece_model.parent).digest == tokenizer.digest


def test_sentencepiece_takes_its_bos_habit_from_the_config(tmp_path):
    model = train_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert TextTokenizer.load(model).adds_bos is True


def test_sentencepiece_without_eos_is_refused(tmp_path):
    with pytest.raises(InputError, match="end-of-sequence"):
        TextTokenizer.load(train_sentencepiece(tmp_path / "m.model", eos_id=-1))


@pytest.mark.parametrize(
    ("ids", "bos", "expected"),
    [
        ([5, 6], None, [5, 6, 1]),
        ([5, 6], True, [0, 5, 6, 1]),
        ([5, 6, 1], True, [0, 5, 6, 1]),
        ([5, 1, 6, 1, 1], False, [5, 1, 6, 1]),
        ([0, 5], True, [0, 5, 1]),
        ([0, 5], False, [0, 5, 1]),
        ([], True, []),
        ([1], True, []),
        ([0, 1], True, []),
    ],
)
def test_a_document_ends_in_one_eos(tokenizer_folder, ids, bos, expected):
    assert TextTokenizer.load(tokenizer_folder).document_ids(ids, bos) == expected


def test_bos_follows_the_tokenizer_by_default(tmp_path):
    tokenizer = TextTokenizer.load(write_bpe_tokenizer(tmp_path / "t", adds_bos=True))
    assert tokenizer.document_ids([5]) == [0, 5, 1]


def test_the_data_room_imports_no_framework():
    code = (
        "import sys, pkgutil, importlib, cpt_mega.data as room\n"
        "for module in pkgutil.iter_modules(room.__path__):\n"
        "    importlib.import_module(f'cpt_mega.data.{module.name}')\n"
        "print(*{'torch', 'transformers', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
