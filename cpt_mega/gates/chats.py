"""What a user says and an assistant replies: as the tokenizer's own chat template renders it, which is what a chat model has
seen; or in words, as a dialogue."""

import re
from collections.abc import Sequence

from cpt_mega.data.chat import ChatDocuments
from cpt_mega.data.manifest import ALL
from cpt_mega.data.tokenizer import TextTokenizer

ASSISTANT = "Assistant:"  # where a question names it, it is a dialogue, and may begin the reply
_TURN = re.compile(r"^(System|User|Assistant):[ \t]*", re.MULTILINE)
_REPLY = "\ufdd0\ufdd1\ufdd0"  # stands in no text and in no template


class ChatTexts:
    """Renders chats, and encodes them with the special tokens that the template writes. One for all probes of a suite.

    Raises InputError when there is no chat template, or one that cannot be used.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._chats = ChatDocuments(tokenizer, tokenizer.adds_bos, ALL)
        self.specials = sorted(tokenizer.specials)

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """Token ids of a chat as a model is asked to go on with it. Raises ValueError with a reason."""
        asks = messages[-1]["role"] != "assistant"
        return self.encode([self._rendered(messages, add_generation_prompt=asks)])[0]

    def pairs(
        self, shown: Sequence[tuple[str, str]], question: str, replies: Sequence[str]
    ) -> list[tuple[str, str]] | None:
        """For each reply the text up to where it is scored, the same for all of them, and the reply behind it.

        It stands where the template puts a turn of the assistant's, blanks in front of it included; ``shown`` are questions
        and replies before. None when the item spells a special token: in a chat it would speak in the template's voice.

        Raises ValueError when the template does not render such a chat, or an item of ``shown`` spells a special token.
        """
        chat = []
        for asked, answer in shown:
            messages, begun = messages_of(asked)
            chat += [*messages, {"role": "assistant", "content": _joined(begun, answer)}]
        problem = self._chats.problem(chat) if chat else None
        if problem:
            raise ValueError(f"an example that is shown cannot be rendered: {problem}")
        if len({reply.strip() for reply in replies}) < len(replies):
            raise ValueError("two choices differ in blanks alone")
        messages, begun = messages_of(question)
        if self._chats.problem([*messages, {"role": "assistant", "content": "\n".join([begun, *replies])}]):
            return None
        before = self._before_reply([*chat, *messages], begun)
        place = before.rstrip(" ")
        return [(place, before[len(place) :] + " " * bool(begun) + reply.strip()) for reply in replies]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, with BOS as documents have it."""
        return self._chats.encode_texts(texts)

    def _before_reply(self, messages: Sequence[dict], begun: str) -> str:
        """The text of a chat up to the assistant's next words, of which ``begun`` have been said."""
        reply = {"role": "assistant", "content": _joined(begun, _REPLY)}
        before, marks, _ = self._rendered([*messages, reply]).partition(_REPLY)
        if not marks:
            raise ValueError("the chat template renders a reply in other words")
        return before.removesuffix(" ") if begun else before

    def _rendered(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        """The text of a chat; where the template knows no turn of the system's, it begins the user's after it."""
        try:
            return self._whole(messages, add_generation_prompt)
        except ValueError:
            if all(message["role"] != "system" for message in messages):
                raise
        return self._whole(_told_by_user(messages), add_generation_prompt)

    def _whole(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        """Raises ValueError where the template leaves out what a message says: some pass over roles that they do not know."""
        text = self._chats.render(list(messages), add_generation_prompt)
        for message in messages:
            said = message.get("content")
            if isinstance(said, str) and said.strip() not in text:
                raise ValueError(f"the chat template leaves out what the {message['role']} says")
        return text


def messages_of(question: str) -> tuple[list[dict], str]:
    """A question as messages, and the beginning of the reply that it ends with, if any.

    What stands before a dialogue is the system's.

    Raises ValueError for a dialogue in which nobody has said anything before the assistant.
    """
    first, *turns = _TURN.split(question)
    if ASSISTANT not in question or not turns:
        return [{"role": "user", "content": question}], ""
    said = [("system", first.strip())] if first.strip() else []
    said += [(role.lower(), text.strip()) for role, text in zip(turns[::2], turns[1::2], strict=True)]
    begun = said.pop()[1] if said[-1][0] == "assistant" else ""
    if not said or said[0][0] == "assistant":
        raise ValueError("the dialogue begins with the assistant; let the user speak first")
    return [{"role": role, "content": text} for role, text in said], begun


def in_words(messages: Sequence[dict]) -> str:
    """A chat as the lines of a dialogue, for a model without a template."""
    return "\n".join([*(f"{message['role'].capitalize()}: {message['content']}" for message in messages), ASSISTANT])


def question_in_words(question: str) -> str:
    """What a user says as a dialogue; one that is one already stays as it is."""
    return question if ASSISTANT in question else in_words([{"role": "user", "content": question}])


def _joined(begun: str, reply: str) -> str:
    return f"{begun} {reply.strip()}" if begun else reply.strip()


def _told_by_user(messages: Sequence[dict]) -> list[dict]:
    told, found = [], []
    for message in messages:
        if message["role"] == "system":
            told.append(message["content"])
        else:
            found.append({**message, "content": "\n\n".join([*told, message["content"]])})
            told = []
    return found
