import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.chats import ChatTexts, messages_of
from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import ChoiceItem, read_chats, read_choices
from cpt_mega.gates.probes.choice import Choice
from cpt_mega.gates.requests import Likelihood
from tests.gates.test_suite import opened
from tests.helpers.corpora import write_bpe_tokenizer
from tests.helpers.suites import SUITE, write_suite

ITEMS = Path(__file__).resolve().parents[2] / "configs" / "gates" / "items"
CHATML = (
    "{% for m in messages %}{{ '<|eos|>' + m.role + '\n' + m.content + '<|eos|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|eos|>assistant\n' }}{% endif %}"
)
# As Llama 2 has it: a blank before a reply, BOS before each question, and no turn of the system's.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|bos|>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' <|eos|>' }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
# As Qwen 3 has it: a reply begins with thoughts, be they none, which a prompt leaves to the model.
THINKING = CHATML.replace(
    "'\n' + m.content", "'\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content"
)
# Passes over roles that it does not know, without a word.
SILENT = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
# Asks for thoughts, which the turns before have lost.
REASONING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
ALTERNATING = INSTRUCT.replace(
    "{% if m.role == 'user' %}",
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}{% if m.role == 'user' %}",
)
DATED = "{{ strftime_now('%Y') }}" + CHATML
REWRITING = CHATML.replace("+ m.content", "+ (m.content if m.role != 'assistant' else '~' + m.content[1:])")


@pytest.fixture
def make(tmp_path):
    """``make(template)``: a tokenizer with it."""

    def write(template, **options):
        folder = write_bpe_tokenizer(tmp_path / "tokenizer", **options)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return TextTokenizer.load(folder)

    return write


def pairs(tokenizer, question, *replies, shown=()):
    return ChatTexts(tokenizer).pairs(shown, question, replies or ["No."])


def asked(tokenizer, question, shown=()):
    ((before, reply),) = pairs(tokenizer, question, shown=shown)
    return before, reply


@pytest.mark.parametrize(
    ("question", "messages", "begun"),
    [
        ("Why?", [("user", "Why?")], ""),
        ("User: a\nAssistant:", [("user", "a")], ""),
        (
            "System: s\nUser: a\nb: c\nAssistant: yes\nUser: d\nAssistant: It is",
            [("system", "s"), ("user", "a\nb: c"), ("assistant", "yes"), ("user", "d")],
            "It is",
        ),
        ("What does Assistant: mean?", [("user", "What does Assistant: mean?")], ""),
        ("A dialogue.\nUser: a\nAssistant:", [("system", "A dialogue."), ("user", "a")], ""),
    ],
)
def test_a_dialogue_is_known_by_its_turns(question, messages, begun):
    found, start = messages_of(question)
    assert [(message["role"], message["content"]) for message in found] == messages and start == begun


@pytest.mark.parametrize("question", ["Assistant: I think", "Assistant: Hi.\nUser: Why?\nAssistant:"])
def test_a_dialogue_that_begins_with_the_assistant_is_refused(question):
    with pytest.raises(ValueError, match="user speak first"):
        messages_of(question)


IN_CHATML = "<|eos|>user\nWhy?<|eos|>\n<|eos|>assistant\n"


@pytest.mark.parametrize(
    ("template", "question", "before", "scored"),
    [
        (CHATML, "Why?", IN_CHATML, "No."),
        (CHATML, "User: Why?\nAssistant: That is", IN_CHATML + "That is", " No."),
        (INSTRUCT, "Why?", "<|bos|>[INST] Why? [/INST]", " No."),
        (INSTRUCT, "User: Why?\nAssistant: That is", "<|bos|>[INST] Why? [/INST] That is", " No."),
        (INSTRUCT, "System: Be.\nUser: Why?\nAssistant:", "<|bos|>[INST] Be.\n\nWhy? [/INST]", " No."),
        (SILENT, "System: Be.\nUser: Why?\nAssistant:", IN_CHATML.replace("Why?", "Be.\n\nWhy?"), "No."),
        (THINKING, "Why?", IN_CHATML + "<think>\n\n</think>\n\n", "No."),
        (REASONING, "Why?", IN_CHATML, "No."),
    ],
    ids=["chatml", "begun", "blank", "blank begun", "no system", "silent on systems", "thoughts", "asks for thoughts"],
)
def test_a_reply_stands_where_the_template_puts_a_turn(make, template, question, before, scored):
    assert asked(make(template), question) == (before, scored)


def test_all_replies_stand_at_one_place_whatever_they_are(make):
    """Also those that the template's own words hold."""
    replies = [">", "think", "in", " n ", "assistant"]
    found = pairs(make(THINKING), "Why?", *replies)
    assert {before for before, _ in found} == {IN_CHATML + "<think>\n\n</think>\n\n"}
    assert [reply for _, reply in found] == [reply.strip() for reply in replies]


def test_examples_are_earlier_turns(make):
    shown = [("A?", "b"), ("System: Be.\nUser: C?\nAssistant: It is", "d")]
    before, _ = asked(make(INSTRUCT), "Why?", shown)
    turns = ["A? [/INST] b", "Be.\n\nC? [/INST] It is d", "Why? [/INST]"]
    assert before == " <|eos|>".join(f"<|bos|>[INST] {turn}" for turn in turns)


@pytest.mark.parametrize("template", [CHATML, INSTRUCT], ids=["chatml", "blank"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_tokens_are_those_of_transformers(make, tmp_path, template, adds_bos):
    """Of the whole chat, as far as the reply goes; what is scored is the reply, with the blank before it."""
    tokenizer = make(template, adds_bos=adds_bos)
    item = ChoiceItem("a", "What is over the dog?", ("the quick fox", "nothing", "7", "!?"), 0)
    probe = Choice("p", "safety", [item], Encoder(tokenizer), "reply", chats=ChatTexts(tokenizer))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    for choice, request in zip(item.choices, probe.requests, strict=True):
        chat = [{"role": "user", "content": item.question}, {"role": "assistant", "content": choice}]
        ids = theirs.apply_chat_template(chat, chat_template=template, return_dict=False)
        front = [tokenizer.bos_id] if adds_bos and ids[0] != tokenizer.bos_id else []
        assert [*front, *ids][: len(request.tokens)] == request.tokens.tolist()
        blank = " " * (template == INSTRUCT)
        assert tokenizer.decode(request.tokens[request.first :].tolist()) == blank + choice


def test_an_item_is_as_long_as_what_is_scored_of_it(make):
    item = ChoiceItem("a", "Why?", ("yes\n\n\n\n\n\n\n\n", "no"), 0)
    probe = Choice("p", "safety", [item], Encoder(make(CHATML)), "reply", "acc_norm", chats=ChatTexts(make(CHATML)))
    (found,) = probe.items([Likelihood(-3.0, False, 1), Likelihood(-1.9, False, 1)])
    assert found.values["acc_norm"] == 0.0  # -3.0 / 3 is less than -1.9 / 2


def test_an_item_that_spells_a_special_token_is_put_in_words(make):
    tokenizer = make(CHATML)
    items = [ChoiceItem("a", "Why?", ("yes", "no"), 0), ChoiceItem("b", "Say <|eos|>!", ("yes", "no"), 0)]
    probe = Choice("p", "safety", items, Encoder(tokenizer), "reply", chats=ChatTexts(tokenizer))
    texts = [tokenizer.decode(request.tokens.tolist()) for request in probe.requests]
    assert texts[0].endswith("<|eos|>assistant\nyes") and texts[2].endswith("User: Say <|eos|>!\nAssistant: yes")
    assert probe.in_words == 1


@pytest.mark.parametrize(
    ("template", "question", "shown", "message"),
    [
        (CHATML, "Assistant: I think", [], "user speak first"),
        (CHATML, "Why?", [ChoiceItem("s", "Say <|eos|>", ("a", "b"), 0)], "example that is shown"),
        (REWRITING, "Why?", [], "leaves out what the assistant says"),
    ],
)
def test_what_cannot_be_rendered_is_refused_with_the_item(make, template, question, shown, message):
    tokenizer = make(template)
    items, chats = [ChoiceItem("a", question, ("yes", "no"), 0)], ChatTexts(tokenizer)
    with pytest.raises(InputError, match=f"suite probe p = 'a': .*{message}.*chat: false"):
        Choice("p", "safety", items, Encoder(tokenizer), "reply", shown=shown, chats=chats)


@pytest.mark.parametrize(
    "template", [CHATML, INSTRUCT, ALTERNATING, THINKING], ids=["chatml", "blank", "alternating", "thoughts"]
)
def test_every_shipped_item_can_be_rendered(make, template):
    chats = ChatTexts(make(template))
    for name in ("behaviour", "safety"):
        for item in read_choices(ITEMS / f"{name}.jsonl"):
            found = chats.pairs((), item.question, item.choices)
            assert found is not None and len({before for before, _ in found}) == 1, item.id
    assert all(chats.prompt(item.messages) for item in read_chats(ITEMS / "chat.jsonl"))


PROBE = "  said: {bucket: safety, kind: choice, items: choices.jsonl, style: reply%s}\n"


@pytest.mark.parametrize(("option", "is_chat"), [("", True), (", chat: true", True), (", chat: false", False)])
def test_a_suite_takes_the_template_where_there_is_one(make, tmp_path, option, is_chat):
    tokenizer = make(CHATML)
    suite = opened(write_suite(tmp_path, SUITE + PROBE % option), tokenizer)
    text = tokenizer.decode(next(probe for probe in suite.probes if probe.name == "said").requests[0].tokens.tolist())
    assert text.startswith("<|eos|>user\nWhat is 0?" if is_chat else "User: What is 0?\nAssistant:")


@pytest.mark.parametrize(
    ("template", "why"), [(DATED, "writes the day"), (REWRITING, "cannot be used"), (None, "no chat template")]
)
def test_without_a_template_that_can_be_used_replies_are_asked_in_words_and_that_is_said(make, tmp_path, template, why):
    tokenizer = make(template)
    suite = opened(write_suite(tmp_path, SUITE + PROBE % ""), tokenizer)
    (frame,) = suite.frames
    assert frame.startswith("said: 9 items in words") and why in frame
    with pytest.raises(InputError, match=f"suite probe said chat = True: .*{why}.*leave chat out"):
        opened(write_suite(tmp_path, SUITE + PROBE % ", chat: true"), tokenizer)


def test_another_template_is_another_digest_and_so_is_another_special_token(make, tmp_path):
    path = write_suite(tmp_path, SUITE + PROBE % "")
    digests = [opened(path, make(template)).digests for template in (CHATML, INSTRUCT, CHATML)]
    assert digests[0] == digests[2] and digests[0]["said"] != digests[1]["said"]
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    vocabulary = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    word = next(token for token in vocabulary if len(token) == 2 and token.isascii() and token.isalpha())
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sep_token": word}))
    again = opened(path, TextTokenizer.load(tmp_path / "tokenizer")).digests
    assert again["said"] != digests[0]["said"]


def test_a_chat_is_for_replies_alone(make, tmp_path):
    with pytest.raises(InputError, match="suite probe said chat = True: .*style: reply alone"):
        opened(write_suite(tmp_path, SUITE + PROBE.replace("style: reply%s", "chat: true")), make(CHATML))
