"""Loads the tokenizer.json on standard input and encodes a text with it, in little time and memory.

A program of its own: what it is ended by (its limits, an abort, a full stack) does not end the trainer. Errors of
Python, and panics, are no matter here: whoever loads the tokenizer meets them too.
"""

import resource
import sys

from tokenizers import Tokenizer

SECONDS, BYTES = 2, 3 << 30  # of the processor, and one more for each 2 MiB of the file; of addresses
MOST_TOKENS = 100  # for a character
WORDS = ("aaaa" * 50, "!" * 200, "0" * 200, " " * 200, "\n" * 200, "Ab, c.\n\u00e9\u4e2d\U0001f600", "a" * 30 + "\0")


def main() -> int:
    raw = sys.stdin.buffer.read()
    seconds = SECONDS + (len(raw) >> 21)
    for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    try:
        text, inner = "".join(WORDS), Tokenizer.from_buffer(raw)
        inner.to_str()
        ids = [i for part in (text, *WORDS) for i in inner.encode(part, add_special_tokens=False).ids]
        return int(len(ids) > 2 * len(text) * MOST_TOKENS)
    except MemoryError:
        return 1
    except BaseException:  # noqa: BLE001
        return 0


if __name__ == "__main__":
    sys.exit(main())
