"""What a user says and an assistant replies, as the tokenizer's own chat template renders it: what a chat model has seen."""

import re
from collections.abc import Sequence

from cpt_mega.data.chat import ChatDocuments
from cpt_mega.data.manifest import ALL
from cpt_mega.data.tokenizer import TextTokenizer

ASSISTANT = "Assistant:"  # where a question names it, it is a dialogue, and may begin the reply
_TURN = re.compile(r"^(System|User|Assistant):[ \t]*", re.MULTILINE)


class ChatTexts:
    """Questions and replies as texts in which special tokens are what the template writes.

    Raises InputError when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._chats = ChatDocuments(tokenizer, tokenizer.adds_bos, ALL)

    def pair(self, shown: Sequence[tuple[str, str]], question: str, reply: str) -> tuple[str, str] | None:
        """The text up to where a reply is scored, and the reply behind it; ``shown`` are questions and replies before.

        None when one of them spells a special token: in a chat it would speak in the template's voice.
        Raises ValueError when the template does not render such a chat.
        """
        chat = []
        for asked, answer in shown:
            messages, begun = messages_of(asked)
            chat += [*messages, {"role": "assistant", "content": _joined(begun, answer)}]
        messages, begun = messages_of(question)
        chat += messages
        if self._chats.problem([*chat, {"role": "assistant", "content": _joined(begun, reply)}]):
            return None
        try:
            before, whole = self._chats.replied(chat, _joined(begun, reply))
        except ValueError:  # some templates have no place for a system's turn
            if messages[0]["role"] != "system":
                raise
            before, whole = self._chats.replied(_told_by_user(chat), _joined(begun, reply))
        before += begun
        return before, whole[len(before) :]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, with BOS as documents have it."""
        return self._chats.encode_texts(texts)


def messages_of(question: str) -> tuple[list[dict], str]:
    """A question as messages, and the beginning of the reply that it ends with, if any."""
    first, *turns = _TURN.split(question)
    if ASSISTANT not in question or first.strip():
        return [{"role": "user", "content": question}], ""
    texts = [text.strip() for text in turns[1::2]]
    messages = [{"role": role.lower(), "content": text} for role, text in zip(turns[::2], texts, strict=True)]
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    return messages, begun


def _joined(begun: str, reply: str) -> str:
    return f"{begun} {reply.strip()}" if begun else reply.strip()


def _told_by_user(messages: Sequence[dict]) -> list[dict]:
    """A system's turns as the beginning of the user's after them."""
    told, found = [], []
    for message in messages:
        if message["role"] == "system":
            told.append(message["content"])
        else:
            found.append({**message, "content": "\n\n".join([*told, message["content"]])})
            told = []
    return found + [{"role": "user", "content": "\n\n".join(told)}] * bool(told)
