import pytest
from transformers import PreTrainedTokenizerFast

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.chats import ChatTexts, messages_of
from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import ChoiceItem
from cpt_mega.gates.probes.choice import Choice
from tests.gates.test_suite import opened
from tests.helpers.corpora import write_bpe_tokenizer
from tests.helpers.suites import SUITE, write_suite

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
REWRITING = CHATML.replace("+ m.content", "+ (m.content if m.role != 'assistant' else '~' + m.content[1:])")


@pytest.fixture
def make(tmp_path):
    """``make(template)``: a tokenizer with it."""

    def write(template, **options):
        folder = write_bpe_tokenizer(tmp_path / "tokenizer", **options)
        (folder / "chat_template.jinja").write_text(template)
        return TextTokenizer.load(folder)

    return write


def pair(tokenizer, question, reply, shown=()):
    return ChatTexts(tokenizer).pair(shown, question, reply)


@pytest.mark.parametrize(
    ("question", "messages", "begun"),
    [
        ("Why?", [("user", "Why?")], ""),
        ("User: a\nAssistant:", [("user", "a")], ""),
        ("System: s\nUser: a\nb: c\nAssistant: yes\nUser: d\nAssistant: It is", "su", "It is"),
        ("What does Assistant: mean?", [("user", "What does Assistant: mean?")], ""),
    ],
)
def test_a_dialogue_is_known_by_its_turns(question, messages, begun):
    if messages == "su":
        messages = [("system", "s"), ("user", "a\nb: c"), ("assistant", "yes"), ("user", "d")]
    found, start = messages_of(question)
    assert [(message["role"], message["content"]) for message in found] == messages and start == begun


@pytest.mark.parametrize(
    ("template", "question", "before", "scored"),
    [
        (CHATML, "Why?", "<|eos|>user\nWhy?<|eos|>\n<|eos|>assistant\n", "No."),
        (CHATML, "User: Why?\nAssistant: That is", "<|eos|>user\nWhy?<|eos|>\n<|eos|>assistant\nThat is", " No."),
        (INSTRUCT, "Why?", "<|bos|>[INST] Why? [/INST] ", "No."),
        (INSTRUCT, "System: Be.\nUser: Why?\nAssistant:", "<|bos|>[INST] Be.\n\nWhy? [/INST] ", "No."),
        (THINKING, "Why?", "<|eos|>user\nWhy?<|eos|>\n<|eos|>assistant\n<think>\n\n</think>\n\n", "No."),
    ],
    ids=["chatml", "begun", "blank", "no place for a system", "thoughts"],
)
def test_a_reply_stands_where_the_template_puts_it(make, template, question, before, scored):
    assert pair(make(template), question, " No. ") == (before, scored)


def test_examples_are_earlier_turns(make):
    before, _ = pair(make(INSTRUCT), "Why?", "No.", [("A?", "b"), ("User: C?\nAssistant: It is", "d")])
    assert (
        before
        == "<|bos|>[INST] A? [/INST] b <|eos|><|bos|>[INST] C? [/INST] It is d <|eos|><|bos|>[INST] Why? [/INST] "
    )


@pytest.mark.parametrize("template", [CHATML, INSTRUCT], ids=["chatml", "blank"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_tokens_are_those_of_transformers(make, tmp_path, template, adds_bos):
    """Of the whole chat, as far as the reply goes; what is scored is the reply."""
    tokenizer = make(template, adds_bos=adds_bos)
    item = ChoiceItem("a", "What is over the dog?", ("the quick fox", "nothing"), 0)
    probe = Choice("p", "safety", [item], Encoder(tokenizer), "reply", chats=ChatTexts(tokenizer))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    for choice, request in zip(item.choices, probe.requests, strict=True):
        chat = [{"role": "user", "content": item.question}, {"role": "assistant", "content": choice}]
        ids = theirs.apply_chat_template(chat, chat_template=template, return_dict=False)
        front = [tokenizer.bos_id] if adds_bos and ids[0] != tokenizer.bos_id else []
        assert [*front, *ids][: len(request.tokens)] == request.tokens.tolist()
        assert tokenizer.decode(request.tokens[request.first :].tolist()).strip() == choice


def test_an_item_that_spells_a_special_token_is_put_without_a_template(make):
    tokenizer = make(CHATML)
    items = [ChoiceItem("a", "Why?", ("yes", "no"), 0), ChoiceItem("b", "Say <|eos|>!", ("yes", "no"), 0)]
    probe = Choice("p", "safety", items, Encoder(tokenizer), "reply", chats=ChatTexts(tokenizer))
    texts = [tokenizer.decode(request.tokens.tolist()) for request in probe.requests]
    assert texts[0].endswith("<|eos|>assistant\nyes") and texts[2].endswith("User: Say <|eos|>!\nAssistant: yes")


def test_a_template_that_renders_no_such_chat_is_refused_with_the_item(make):
    tokenizer = make(REWRITING)
    with pytest.raises(InputError, match="suite probe p = 'a': .*another way.*chat: false"):
        Choice(
            "p",
            "safety",
            [ChoiceItem("a", "Why?", ("yes", "no"), 0)],
            Encoder(tokenizer),
            "reply",
            chats=ChatTexts(tokenizer),
        )


PROBE = "  said: {bucket: safety, kind: choice, items: choices.jsonl, style: reply%s}\n"


@pytest.mark.parametrize(("option", "is_chat"), [("", True), (", chat: true", True), (", chat: false", False)])
def test_a_suite_takes_the_template_where_there_is_one(make, tmp_path, option, is_chat):
    tokenizer = make(CHATML)
    suite = opened(write_suite(tmp_path, SUITE + PROBE % option), tokenizer)
    text = tokenizer.decode(next(probe for probe in suite.probes if probe.name == "said").requests[0].tokens.tolist())
    assert text.startswith("<|eos|>user\nWhat is 0?" if is_chat else "User: What is 0?\nAssistant:")


def test_another_template_is_another_digest(make, tmp_path):
    path = write_suite(tmp_path, SUITE + PROBE % "")
    digests = [opened(path, make(template)).digests["said"] for template in (CHATML, INSTRUCT, CHATML)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("option", "message"), [("style: reply, chat: true", "no chat template"), ("chat: true", "style: reply alone")]
)
def test_what_cannot_be_rendered_is_refused(tmp_path, option, message):
    tokenizer = TextTokenizer.load(write_bpe_tokenizer(tmp_path / "plain"))
    probe = PROBE.replace("style: reply%s", option)
    with pytest.raises(InputError, match=f"suite probe said chat = True: .*{message}"):
        opened(write_suite(tmp_path, SUITE + probe), tokenizer)
