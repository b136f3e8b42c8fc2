"""The section `extract` of a corpus's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm.config.sections import check_at_least


@dataclass(frozen=True)
class ExtractConfig:
    """How pages become text."""

    text_key: str = "text"
    """The field of JSON lines and tables that holds the text; `a.b` is field b of field a."""
    url_key: str = "url"
    """Their field that holds the address, where there is one."""
    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """The library that takes the text out of HTML: trafilatura is far slower and leaves out more."""
    main_content: bool = True
    """resiliparse: leave out navigation, headers, footers and advertisements."""
    normalise: Literal["nfc", "ftfy", "none"] = "nfc"
    """Unicode normalisation: NFC, ftfy's repair of wrongly decoded text followed by NFC, or none."""
    max_bytes: int = 16 << 20
    """Pages and texts that have more bytes, once decompressed, are left out and counted as damage."""

    def __post_init__(self) -> None:
        check_at_least(1, "extract.", self, "max_bytes")
