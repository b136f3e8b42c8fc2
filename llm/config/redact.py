"""Leaves secrets out of a config that is printed, kept or sent: text under keys that name one, and parts of URLs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"
# Not tokens and tokenizer. Only in sections whose keys Ingot does not know: data.text_key is no secret.
_SECRET = re.compile(r"token(?!s|iz)|key|secret|passw", re.IGNORECASE)
# user:password@, of which a user alone may be a token, and the query, which may be a signature.
_URL = re.compile(r"(?<=://)[^/\s]+(?=@)|(?<=\?)[^\s#]+")


def hide(text: str) -> str:
    """The text, in which URLs have neither a user nor a query."""
    return _URL.sub(HIDDEN, text) if "://" in text else text


def redacted(value: Any, *, is_open: bool = False, secret: bool = False) -> Any:
    """A config as nested dicts of JSON types, without its secrets. is_open: of the deepspeed section."""
    if isinstance(value, dict):
        return {
            hide(key): redacted(
                item, is_open=is_open or key == "deepspeed", secret=secret or (is_open and bool(_SECRET.search(key)))
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted(item, is_open=is_open, secret=secret) for item in value]
    if secret and type(value) in (str, int):
        return HIDDEN
    return hide(value) if isinstance(value, str) else value


def hidden_keys(mapping: Mapping[str, Any]) -> list[str]:
    """The dotted keys whose values `redacted` has changed."""
    found, waiting = list[str](), [("", mapping)]
    while waiting:
        prefix, inner = waiting.pop()
        for key, value in inner.items():
            waiting += [(f"{prefix}{key}.", value)] if isinstance(value, dict) else []
            values = value if isinstance(value, list) else [value]
            if HIDDEN in f"{key}" or any(isinstance(item, str) and HIDDEN in item for item in values):
                found.append(f"{prefix}{key}")
    return found
