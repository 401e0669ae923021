"""Chats to tokens: the tokenizer's own template renders them, its own library encodes them, and a mask says which count.

Here special tokens are what the template writes. A message that spells one out would speak in the template's voice, so
such a chat is rejected.

Which tokens are the assistant's is known in one of two ways: the template says so itself (``{% generation %}`` blocks, as
transformers reads them), or each of the assistant's turns is what rendering adds to the chat before it. The second needs a
template that renders a chat turn by turn; one that rewrites earlier turns gives rejects, never a wrong mask.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from cpt_mega.data.encode import EncodedBatch, check_ids
from cpt_mega.data.indexed import token_dtype
from cpt_mega.data.manifest import ALL, ASSISTANT
from cpt_mega.data.readers import Batch, Document
from cpt_mega.data.rejects import EMPTY, Reject
from cpt_mega.data.tokenizer import HF_FILE, TOKENIZER_CONFIGS, TextTokenizer, named_specials, read_config
from cpt_mega.errors import InputError
from cpt_mega.lineage import text_digest

TEMPLATE_FILE = "chat_template.jinja"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLE = re.compile(r"[\w-]+")


class ChatDocuments:
    """Encodes lists of messages.

    Args:
        tokenizer: whose template and ids they are.
        bos: whether BOS begins every document; one that the template wrote is not doubled.
        loss_mask: which tokens count as targets, one of ``manifest.MASKS``. Under ``assistant`` BOS does not, nor an EOS
            that the template did not write.

    Raises InputError when the tokenizer has no chat template, or is not a ``tokenizer.json``.
    """

    def __init__(self, tokenizer: TextTokenizer, bos: bool, loss_mask: str):
        if tokenizer.path.name != HF_FILE:
            raise InputError("--chat", str(tokenizer.path), f"chats need {HF_FILE} with a chat template beside it")
        self.tokenizer, self.bos, self.loss_mask = tokenizer, bos, loss_mask
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.template, self.special_tokens = _load_template(tokenizer)
        spec = json.loads(tokenizer.path.read_text(encoding="utf-8"))
        # Truncation would cut chats without a word; a post-processor moves the places that tokens are said to begin at.
        plain = spec | {"truncation": None, "padding": None, "post_processor": None}
        self.encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
        special = [tokenizers.AddedToken(token, special=True, normalized=False) for token in tokenizer.specials]
        self.encoder.add_special_tokens(special)
        self._spelt = re.compile("|".join(map(re.escape, sorted(tokenizer.specials, key=len, reverse=True))) or "(?!)")

    def __call__(self, batch: Batch) -> EncodedBatch:
        """See DocumentEncoder."""
        ids, masks, kept, rejects, text_bytes = [], [], [], [], 0
        for item in batch.items:
            done = item if isinstance(item, Reject) else self._encode(item)
            if isinstance(done, Reject):
                rejects.append(done)
                continue
            kept.append(item)
            ids.append(done[0])
            masks.append(done[1])
            text_bytes += done[2]
        tokens = np.concatenate([np.empty(0, np.int64), *ids])
        check_ids(tokens, self.tokenizer.vocab_size)
        mask = np.concatenate([np.empty(0, np.uint8), *masks]) if self.loss_mask == ASSISTANT else None
        lengths = np.array([len(each) for each in ids], np.int64)
        tokens = tokens.astype(self.dtype)
        return EncodedBatch(tokens, lengths, mask, kept, text_bytes, rejects, batch.lines, batch.input_bytes)

    def render(self, messages: list, add_generation_prompt: bool = False) -> str:
        """The text of a chat, and what asks for a reply to it.

        Raises ValueError with a reason, and what the template raises as one.
        """
        problem = self.problem(messages)
        if problem:
            raise ValueError(problem)
        try:
            return self._text(messages, add_generation_prompt)
        except Exception as error:  # a template is a program: it raises what it likes
            raise ValueError(f"the chat template refuses it: {error!r}") from error

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, BOS as in documents and no EOS."""
        bos = self.tokenizer.bos_id
        found = [encoded.ids for encoded in self.encoder.encode_batch(list(texts), add_special_tokens=False)]
        return [[bos, *ids] if self.bos and ids[:1] != [bos] else ids for ids in found]

    def problem(self, messages: list) -> str | None:
        """Why messages are no chat that may be rendered, as a sentence; None when they are."""
        if not messages:
            return EMPTY
        for message in messages:
            if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
                return "a message without a role"
            if not _ROLE.fullmatch(message["role"]):
                return "a role that is no word"
            if "content" not in message and "tool_calls" not in message:
                return "a message without content"
            found = self._spelt.search("\n".join([*_strings(message), _joined_parts(message)]))
            if found:
                return f"a message spells a special token: {found[0]}"
        return None

    def _encode(self, chat: Document) -> tuple[np.ndarray, np.ndarray, int] | Reject:
        """Ids, mask and bytes of text."""
        try:
            problem = self.problem(chat.content)
        except RecursionError:
            problem = "messages within messages without end"
        if problem:
            return chat.rejected(problem)
        try:
            text, spans = self._render(chat.content)
        except Exception as error:  # a template is a program: it raises what it likes
            return chat.rejected(f"the chat template refuses it: {error!r}")
        if self.loss_mask == ASSISTANT and not spans:
            return chat.rejected("no turn of the assistant, so no token would count")
        encoded = self.encoder.encode(text, add_special_tokens=False)
        stored = self.tokenizer.document_ids(encoded.ids, self.bos)
        if not stored:
            return chat.rejected(EMPTY)
        mask = self._stored_mask(encoded.ids, _within(encoded.offsets, spans), len(stored))
        return np.array(stored, np.int64), mask, len(text.encode())

    def _stored_mask(self, ids: list[int], mask: np.ndarray, stored: int) -> np.ndarray:
        """The mask of a document as ``document_ids`` stores it: what was put around the text does not count."""
        start, end = self.tokenizer.text_range(ids)
        result = np.zeros(stored, np.uint8)
        front = stored - 1 - (end - start)
        result[front:-1] = mask[start:end]
        result[-1] = mask[end] if end < len(ids) else 0
        return result

    def _render(self, messages: list) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and the ranges of its characters that are the assistant's.

        Raises ValueError when the template does not render the chat turn by turn, and what the template raises.
        """
        if self.loss_mask == ALL:
            return self._text(messages), []
        if _MARKED.search(self.template):
            texts, spans = self._renderer(
                [messages], chat_template=self.template, return_assistant_tokens_mask=True, **self.special_tokens
            )
            return texts[0], [tuple(span) for span in spans[0]]
        return self._text(messages), self._turns(messages)

    def _turns(self, messages: list) -> list[tuple[int, int]]:
        whole, spans = self._text(messages), []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:index], add_generation_prompt=True)
            through = self._text(messages[: index + 1])
            if not (through.startswith(before) and whole.startswith(through)):
                raise ValueError(
                    f"it renders turn {index + 1} in another way within the chat, so its mask is not known"
                )
            spans.append((len(before), len(through)))
        return spans

    def _text(self, messages: list, add_generation_prompt: bool = False) -> str:
        texts, _ = self._renderer(
            [messages],
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )
        return texts[0]

    @functools.cached_property
    def _renderer(self):
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template


def has_template(tokenizer: TextTokenizer) -> bool:
    """Whether chats can be rendered."""
    if tokenizer.path.name != HF_FILE:
        return False
    try:
        _load_template(tokenizer)
    except InputError:
        return False
    return True


def template_digest(tokenizer: TextTokenizer) -> str:
    """SHA-256 of what makes text of messages: the template, and the special tokens that it may name.

    Raises InputError when there is no template, or one whose text depends on the day.
    """
    template, special_tokens = _load_template(tokenizer)
    return text_digest(json.dumps([template, sorted(special_tokens.items())]))


def _load_template(tokenizer: TextTokenizer) -> tuple[str, dict[str, str]]:
    """The chat template, and the special tokens that it may name."""
    folder = tokenizer.path.parent
    config = read_config(folder / TOKENIZER_CONFIGS[0])
    template = config.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    if not isinstance(template, str):
        fix = f"has no chat template; put one into {TEMPLATE_FILE} beside it, or render the chats and give text"
        raise InputError("--chat", str(tokenizer.path), fix)
    if "strftime_now" in template:
        fix = "writes the day of its making into every chat; put a date into a copy of it"
        raise InputError("--chat", f"the chat template of {tokenizer.path}", fix)
    return template, named_specials(folder)


def _joined_parts(message: dict) -> str:
    """The text of a message's parts one behind the other, as templates join them."""
    parts = message.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _strings(value: object) -> Iterator[str]:
    """Every string within a message, where a template may take text from: keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _within(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """1 for each token that has a letter within a span: one that begins with the blank before a turn is the turn's first.

    Tokens that are parts of one letter have its place.
    """
    if not spans or not offsets:
        return np.zeros(len(offsets), np.uint8)
    begins, ends = np.array(offsets).T
    firsts, lasts = np.array(spans).T
    at = np.searchsorted(firsts, ends, side="left") - 1  # the last span that begins before the token ends
    return ((at >= 0) & (begins < lasts[np.maximum(at, 0)])).astype(np.uint8)
