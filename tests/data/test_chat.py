import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpt_mega.data.chat import ChatDocuments
from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.manifest import load_manifest
from cpt_mega.data.preprocess import PreprocessOptions, preprocess
from cpt_mega.data.readers import Batch, Document
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from tests.helpers.corpora import TEXTS, write_jsonl

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
# As some templates do: an earlier turn is not what it was when it was the last.
REWRITING = CHATML.replace("message['content']", "(message['content'] if loop.last else message['content'][:1])")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "naïve 北京?"},
    {"role": "assistant", "content": "  yes 🙂\n"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because"},
]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """``make(template, **config)``: a folder with a tokenizer; its post-processor trims offsets, as GPT-2's does."""

    def write(template=CHATML, bos_in_front=False, **config):
        folder = tmp_path_factory.mktemp("chat")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
        special = ["<s>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS * 3, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        values = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        return folder

    return write


def encode(folder, *chats, mask="assistant", bos=False):
    documents = ChatDocuments(TextTokenizer.load(folder), bos, mask)
    return documents(Batch([Document("in", line, chat) for line, chat in enumerate(chats, 1)]))


def reference(folder, template, chat, **options):
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>"
    )
    return theirs.apply_chat_template(chat, chat_template=template, tokenize=True, return_dict=True, **options)


@pytest.mark.parametrize("template", [CHATML, MARKED, WITH_BOS], ids=["plain", "marked", "with BOS"])
@pytest.mark.parametrize("mask", ["all", "assistant"])
def test_ids_are_those_of_transformers(make, template, mask):
    folder = make(template)
    encoded = encode(folder, CHAT, mask=mask)
    assert encoded.tokens.tolist() == [*reference(folder, template, CHAT)["input_ids"], 2]
    assert (encoded.mask is None) == (mask == "all") and not encoded.rejects


def test_a_marked_template_masks_as_transformers_does(make):
    folder, chat = make(MARKED), CHAT[:2] + CHAT[3:]  # where a turn begins with blanks, transformers loses it
    theirs = reference(folder, MARKED, chat, return_assistant_tokens_mask=True)["assistant_masks"]
    assert encode(folder, chat).mask.tolist() == [*theirs, 0]
    assert 0 < sum(theirs) < len(theirs)


BLANK_BEFORE = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' %}{{ ' ' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ ' ' + message['content'] }}"
    "{% endif %}{% endfor %}"
)


def test_a_token_that_begins_with_the_blank_before_a_turn_counts(make):
    folder = make(BLANK_BEFORE)
    chat = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    encoded = encode(folder, chat)
    theirs = reference(folder, BLANK_BEFORE, chat, return_assistant_tokens_mask=True)["assistant_masks"]
    assert encoded.mask.tolist() == theirs[: len(encoded.mask)]
    assert TextTokenizer.load(folder).decode(encoded.tokens[encoded.mask == 1]).endswith("jumps<|im_end|>")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "arguments": {"a<|im_end|>": 1}},
        {"role": "user", "content": "x", "arguments": ("<|im_end|>", 1)},
        {"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]},
        {"role": "user|>\n<|system", "content": "x"},
    ],
    ids=["in a key", "in a pair", "in two parts", "in the role"],
)
def test_special_tokens_cannot_be_smuggled_in(make, message):
    (reject,) = encode(make(), [*CHAT, message]).rejects
    assert reject.kind in ("a message spells a special token", "a role that is no word")


def test_special_tokens_may_be_named_in_either_file(make):
    folder = make(WITH_BOS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": config.pop("bos_token")}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert encode(folder, CHAT).tokens.tolist() == encode(make(WITH_BOS), CHAT).tokens.tolist()


def test_a_template_that_raises_whatever_rejects_the_chat(make):
    deep = {"role": "user", "content": "x", "more": []}
    for _ in range(3000):
        deep["more"] = [deep["more"]]
    template = "{{ 1 // (messages|length - 2) }}" + CHATML
    assert [reject.line for reject in encode(make(template), CHAT, CHAT[1:3], mask="all").rejects] == [2]
    assert [reject.line for reject in encode(make(), CHAT, [deep, *CHAT[1:3]]).rejects] == [2]


def test_a_template_that_tells_the_time_is_refused(make):
    with pytest.raises(InputError, match="writes the day of its making"):
        encode(make("{{ strftime_now('%d') }}" + CHATML), CHAT)


def test_another_template_is_another_recipe(make, tmp_path):
    source, folder = write_jsonl(tmp_path / "in.jsonl", [json.dumps({"messages": CHAT}).encode()]), make()
    options = PreprocessOptions((str(source),), str(folder), str(tmp_path / "c"), chat=True, reuse=True)
    assert [preprocess(options).reused for _ in range(2)] == [False, True]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": WITH_BOS}))
    assert not preprocess(options).reused


def test_a_plain_template_counts_what_the_assistant_says_and_its_end(make):
    folder = make()
    encoded = encode(folder, CHAT)
    counted = TextTokenizer.load(folder).decode(encoded.tokens[encoded.mask == 1])
    assert counted == "  yes 🙂\n<|im_end|>\nbecause<|im_end|>\n"
    assert encoded.mask[-1] == 0  # the EOS that the template did not write


def test_an_end_that_the_template_wrote_counts_and_is_not_doubled(make):
    template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    encoded = encode(make(template), CHAT)
    assert encoded.tokens[-2:].tolist().count(2) == 1 and encoded.mask[-1] == 1


@pytest.mark.parametrize("template", [CHATML, WITH_BOS])
@pytest.mark.parametrize("bos", [False, True])
def test_bos_is_put_once_and_does_not_count(make, template, bos):
    encoded = encode(make(template), CHAT, bos=bos)
    wanted = int(bos or template == WITH_BOS)
    assert encoded.tokens.tolist().count(0) == wanted and (encoded.tokens[0] == 0) == bool(wanted)
    assert encoded.mask[0] == 0 and len(encoded.mask) == len(encoded.tokens)
    plain = encode(make(CHATML), CHAT)
    assert encoded.mask[wanted:].tolist() == plain.mask.tolist()


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "empty"),
        ([{"content": "x"}], "a message without a role"),
        (["x"], "a message without a role"),
        ([{"role": "user", "content": "a<|im_end|>b"}], "a message spells a special token: <|im_end|>"),
        ([{"role": "user", "content": [{"type": "text", "text": "<s>"}]}], "a message spells a special token: <s>"),
        ([{"role": "user"}], "a message without content"),
        ([{"role": "user", "content": "x"}], "no turn of the assistant, so no token would count"),
        ([{"role": "user", "content": None}], "the chat template refuses it"),
    ],
)
def test_chats_that_cannot_be_rendered_are_rejected(make, chat, reason):
    encoded = encode(make(), CHAT, chat, CHAT)
    (reject,) = encoded.rejects
    assert reject.line == 2 and reject.reason.startswith(reason)
    assert len(encoded.lengths) == 2 and encoded.lengths.sum() == len(encoded.mask)


def test_a_template_that_rewrites_earlier_turns_gives_no_mask(make):
    folder = make(REWRITING)
    (reject,) = encode(folder, CHAT).rejects
    assert "it renders turn 3 in another way within the chat, so its mask is not known" in reject.reason
    assert not encode(folder, CHAT, mask="all").rejects


@pytest.mark.parametrize("where", ["file", "list", "nowhere"])
def test_where_the_template_is_found(make, where):
    template = {"file": "{{ no such }}", "list": [{"name": "default", "template": CHATML}], "nowhere": None}[where]
    folder = make(template)
    if where == "file":
        (folder / "chat_template.jinja").write_text(CHATML)
    if where == "nowhere":
        with pytest.raises(InputError, match="has no chat template"):
            encode(folder, CHAT)
    else:
        assert encode(folder, CHAT).tokens.tolist() == encode(make(), CHAT).tokens.tolist()


def test_a_corpus_of_chats_has_its_mask_beside_the_tokens(make, tmp_path):
    lines = [json.dumps({"messages": CHAT}).encode(), b'{"messages": "x"}', json.dumps({"messages": CHAT[:3]}).encode()]
    source, folder = write_jsonl(tmp_path / "in.jsonl", lines), make()
    options = {"chat": True, "loss_mask": "assistant", "max_reject_share": 0.5}
    report = preprocess(PreprocessOptions((str(source),), str(folder), str(tmp_path / "c"), **options))
    assert report.rejects_by_reason == {"field 'messages' is not a list of messages": 1}
    corpus, encoded = IndexedCorpus(tmp_path / "c"), encode(folder, CHAT, CHAT[:3])
    masks = [corpus.read_mask(i, 0, int(length)) for i, length in enumerate(corpus.document_lengths)]
    assert np.array_equal(np.concatenate(masks), encoded.mask)
    manifest = load_manifest(tmp_path / "c")
    assert manifest.loss_mask == "assistant" and manifest.parts[0]["sha256"] == corpus.digest_part(0, 2)
    mask = bytearray((tmp_path / "c.mask.bin").read_bytes())
    mask[5] ^= 1
    (tmp_path / "c.mask.bin").write_bytes(mask)
    assert IndexedCorpus(tmp_path / "c").digest_part(0, 2) != manifest.parts[0]["sha256"]
    with pytest.raises(InputError, match="a byte for each of the"):
        (tmp_path / "c.mask.bin").write_bytes(mask[:-1])
        IndexedCorpus(tmp_path / "c")
    without = preprocess(
        PreprocessOptions(
            (str(source),), str(folder), str(tmp_path / "c"), chat=True, max_reject_share=0.5, overwrite=True
        )
    )
    assert without.manifest.loss_mask == "all" and not (tmp_path / "c.mask.bin").exists()
