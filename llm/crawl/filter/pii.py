"""Masks e-mail addresses and public IP addresses."""

from __future__ import annotations

import ipaddress
import re

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import PiiRule

# Parts have bounded lengths (RFC 5321), so that a search takes time in proportion to the text. What comes
# before a match is looked at after its first character: a search that begins with one of few characters is fast.
ATOM = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~-"
DOMAIN = r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,63}\b"
EMAIL_ENDS = re.compile(rf"@(?<=[{ATOM}]@){DOMAIN[1:]}")
EMAIL = re.compile(rf"\b[{ATOM}][.{ATOM}]{{0,63}}{DOMAIN}")
IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![\w:])")  # 2000::/3: what is routed


def mask(page: Page, config: PiiRule) -> str:
    """Mask what is found. No text is removed: returns ""."""
    text = page.text
    if EMAIL_ENDS.search(text):
        text, found = EMAIL.subn(lambda _: config.email, text)
        if found:
            page.counts.count("masked", "email", found)
    for kind, pattern, instead, sign in (("ipv4", IPV4, config.ipv4, "."), ("ipv6", IPV6, config.ipv6, ":")):
        if sign in text:
            text = _mask_public(page, kind, pattern, instead, text)
    page.change(text)
    return ""


def _mask_public(page: Page, kind: str, pattern: re.Pattern[str], instead: str, text: str) -> str:
    def masked(match: re.Match[str]) -> str:
        try:
            public = ipaddress.ip_address(match[0]).is_global
        except ValueError:
            return match[0]
        if public:
            page.counts.count("masked", kind)
        return instead if public else match[0]

    return pattern.sub(masked, text)
