"""Turns the messages of a conversation into tokens, by the chat template of a tokenizer.

A template is Jinja, as Hugging Face keeps it beside tokenizer.json; it runs in a sandbox. Tokens of a template that are
special are those tokens; the same spelling in a message is ordinary text, so that nobody can write another's turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm import files
from llm.data.tokenizer import Tokenizer
from llm.errors import CheckpointError, InputError, require

Message: TypeAlias = dict[str, str]
"""`role`, one of ROLES, and `content`."""
ROLES = ("system", "user", "assistant")
DEFAULT = (
    "{% for message in messages %}### {{ message.role }}\n{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
"""Of a tokenizer that has no template."""
FILES = "chat_template.jinja", "tokenizer_config.json"
LARGEST = 1 << 20  # bytes of a template
REFUSALS = TypeError, ValueError, ArithmeticError, LookupError, AttributeError
"""What Jinja's own filters raise for values that they are not made for."""
MARK = "\ufdd0"  # in front of each character of a message that would spell a special token; no text has it


class _Generation(Extension):
    """The tags with which templates of transformers mark what is generated; they render as what they enclose."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, bos_token: str = "") -> None:
        """template: None for DEFAULT. Raises InputError where it is no Jinja."""
        self.tokenizer, self.template, self.bos_token = tokenizer, template, bos_token
        spellings = sorted((*tokenizer.special, tokenizer.end_token), key=len, reverse=True)
        self._special = re.compile(f"(?<!{MARK})(?:{'|'.join(map(re.escape, spellings))})")
        world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        world.globals["raise_exception"] = _refuse
        world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = world.from_string(template or DEFAULT)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template is no Jinja: {error}") from error

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> Chat:
        """With the template in a folder: of chat_template.jinja or tokenizer_config.json, else DEFAULT.

        Raises InputError where these cannot be read.
        """
        jinja, settings = (folder / name for name in FILES)
        try:
            found: dict[str, Any] = files.read_json(settings.resolve()) if settings.is_file() else {}
            template, bos = found.get("chat_template"), found.get("bos_token") or ""
            if isinstance(template, list):  # several by name
                named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
                template = next(named, {}).get("template")
            if jinja.is_file():
                template = files.read_up_to(jinja, LARGEST).decode("utf-8")
            bos: Any = bos.get("content") if isinstance(bos, dict) else bos
            expected = f"expected text for chat_template and bos_token in {FILES[1]}"
            require(isinstance(template, str | None) and isinstance(bos, str), expected)
            return cls(tokenizer, template, bos)
        except (CheckpointError, InputError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{folder}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write tokenizer_config.json, from which `load` makes the same."""
        settings = {
            "chat_template": self.template or DEFAULT,
            "bos_token": self.bos_token,
            "eos_token": self.tokenizer.end_token,
        }
        files.replace(folder / FILES[1], json.dumps(settings, indent=2).encode())

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the assistant answers. Raises InputError for messages that the template refuses."""
        return self._encode([self._render(messages, prompt=True)])[0]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The tokens, and whether each is part of an answer, its end included: what a model learns.

        An answer is what the template adds to the prompt before it, up to the last special token in it. Raises
        InputError where that is not there, as with a template that changes earlier messages.
        """
        text, parts = "", list[str]()
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, answered = self._render(messages[:i], prompt=True), self._render(messages[: i + 1])
                extends = prompt.startswith(text) and answered.startswith(prompt)
                require(extends, "the chat template changes earlier messages, or what stands before an answer")
                answer = answered[len(prompt) :]
                ends = [match.end() for match in self._special.finditer(answer)]
                answer = answer[: ends[-1]] if ends else answer
                parts += [prompt[len(text) :], answer]
                text = prompt + answer
        encoded = self._encode(parts)
        tokens = [token for part in encoded for token in part]
        return tokens, [i % 2 == 1 for i, part in enumerate(encoded) for _ in part]

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        shown = [message | {"content": self._guarded(message["content"])} for message in messages]
        words = {"bos_token": self.bos_token, "eos_token": self.tokenizer.end_token, "add_generation_prompt": prompt}
        try:
            return self._template.render(messages=shown, **words)
        except (jinja2.TemplateError, *REFUSALS) as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error

    def _guarded(self, content: str) -> str:
        require(MARK not in content, f"a message has the character U+{ord(MARK):04X}, which no text has; remove it")
        return self._special.sub(lambda match: "".join(MARK + character for character in match[0]), content)

    def _encode(self, parts: Sequence[str]) -> list[list[int]]:
        """The tokens of parts of a text that follow one another."""
        special, out = self.tokenizer.special | {self.tokenizer.end_token: self.tokenizer.eod_id}, list[list[int]]()
        begins = True  # whether nothing stands before, so that a tokenizer may put a space there
        for part in parts:
            out.append([])
            at = 0
            for match in [*self._special.finditer(part), None]:
                text = part[at : match.start() if match else None].replace(MARK, "")
                if text:
                    out[-1] += self.tokenizer.encode_batch([text], [begins])[0][0]
                    begins = False
                if match:
                    out[-1].append(special[match[0]])
                    at, begins = match.end(), self.tokenizer.prefixes_all
        return out


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
