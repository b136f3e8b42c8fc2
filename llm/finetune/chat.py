"""Instruction tuning: conversations in JSON, `{"messages": [{"role": "user", "content": ...}, ...]}` one a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm.config import RunConfig
from llm.data.chat import ROLES, Chat, Message
from llm.data.corpus.files import list_files
from llm.data.corpus.texts import check_unicode, records
from llm.data.prepare.tokenise import given_tokenizer
from llm.errors import InputError, require
from llm.finetune.examples import Example, Examples
from llm.train.source import Say
from llm.typed import shown


class Conversations(Examples):
    """The conversations of data.source; the chat template is that beside data.tokenizer."""

    def __init__(self, config: RunConfig) -> None:
        """Raises InputError, which names the line, for what is no conversation with an answer that fits a sample."""
        tokens = given_tokenizer(config)
        self.chat = Chat.load(Path(config.data.tokenizer).parent, tokens)
        super().__init__(config, tokens, self._examples(), "conversations")

    @classmethod
    def open(cls, config: RunConfig, say: Say) -> Conversations:
        return cls(config)

    def _examples(self) -> Iterator[tuple[str, Example]]:
        for where, messages in conversations(self.config.data.source):
            try:
                yield where, Example(*self.chat.conversation(messages))
            except InputError as error:
                raise InputError(f"{where}: {error}") from error

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.chat.save(folder)


def conversations(source: str) -> Iterator[tuple[str, list[Message]]]:
    """Each conversation of JSON files, with its place. Raises InputError as `checked`, and as `list_files`."""
    for path in list_files(source)[0]:
        for where, record in records(path, "messages"):
            yield where, checked(record, where)


def checked(record: object, where: str) -> list[Message]:
    """The messages of a record; InputError unless each has a known role and text, and the last is an answer."""
    found = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}: expected an object with `messages`, a list; found {shown(record)}")
    for number, message in enumerate(found, start=1):
        at = f"{where}, message {number}"
        fields = sorted(map(str, message)) if isinstance(message, dict) else type(message).__name__
        require(fields == ["content", "role"], f"{at}: expected `role` and `content` alone; found {fields}")
        role, content = message["role"], message["content"]
        require(role in ROLES, f"{at}: the role is {role!r}; expected {', '.join(ROLES)}")
        require(isinstance(content, str), f"{at}: the content is {type(content).__name__}; expected text")
        check_unicode(content, f"{at}: the content")
        require(role != "assistant" or bool(content.strip()), f"{at}: the answer is empty; leave the conversation out")
    require(
        found[-1]["role"] == "assistant", f"{where}: the last message is of the {found[-1]['role']}: no answer follows"
    )
    return found
