"""What may stand in a line: no secret, and nothing that moves a terminal's cursor or turns its text around.

Names, reason phrases and the like come from the wire. Escaped is every character that is not printable in the sense of
`str.isprintable`: controls, bidirectional and other format characters, line and paragraph separators, lone surrogates.
"""

from __future__ import annotations

import base64
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from structlog.typing import EventDict, WrappedLogger

HIDDEN = "***"
LONGEST = 2000  # characters of a value; what is longer is cut

_SECRET_KEY = re.compile(r"passw|secret|authori[sz]ation|credential|cookie|token$|api_?key", re.IGNORECASE)
# Worth a closer look: a header field with credentials, or a URL that may have them.
_SUSPECT = re.compile(r"uthori[sz]ation|://", re.IGNORECASE)
_HEADER = re.compile(
    r"(authori[sz]ation['\"]?\s*[:=,]\s*['\"]?)(?:(?:basic|bearer|digest)\s+)?[^\s'\"]+", re.IGNORECASE
)
_URL = re.compile(r"(://)[^/\s@]+@")
_SHORT = 4
_SHORT_TEXT = 100
_OWN = frozenset(("timestamp", "level", "logger", "event", "exception"))


class Cleaner:
    """Makes values fit to be written. credentials: (user, password) pairs; no value shows one of these passwords."""

    def __init__(self, credentials: Iterable[tuple[str, str]] = ()) -> None:
        forms: set[str] = set()
        for user, password in credentials:
            forms |= _forms(user, password)
        patterns = [_pattern(form) for form in sorted(forms, key=len, reverse=True)]
        self._secrets = re.compile("|".join(patterns)) if patterns else None
        # The same tags, names and reasons come up again and again.
        self._short = functools.lru_cache(4096)(self.text)

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """A processor for structlog: the line's own fields first, then the values, clean and such as JSON knows.

        A value that has the name of one of the line's own fields gets a "_" behind it.
        """
        cleaned: EventDict = {"timestamp": event.pop("timestamp")} if "timestamp" in event else {}
        cleaned["level"] = method
        cleaned["logger"] = self._short(logger.name)
        cleaned["event"] = self.text(str(event.pop("event")))
        traceback = event.pop("exception", None)
        for key, value in event.items():
            name = key if key not in _OWN else key + "_"
            kind = type(value)
            if kind is int or value is None:
                cleaned[name] = value
            elif kind is str and len(value) <= _SHORT_TEXT and not is_secret(key):
                cleaned[name] = self._short(value)
            else:
                cleaned[name] = self._value(key, value)
        if traceback is not None:
            cleaned["exception"] = self.lines(traceback)
        return cleaned

    def text(self, text: str, longest: int = LONGEST) -> str:
        """`text` without secrets and with what is not printable escaped."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        if _SUSPECT.search(text):
            text = _URL.sub(rf"\1{HIDDEN}@", _HEADER.sub(rf"\1{HIDDEN}", text))
        if len(text) > longest:
            text = f"{text[:longest]}… ({len(text) - longest} more)"
        return text if text.isprintable() else escape(text)

    def lines(self, text: str) -> str:
        """A text of several lines, as a traceback: its line ends stay."""
        return "\n".join(self.text(line) for line in text.split("\n"))

    def _value(self, key: str, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return HIDDEN if is_secret(key) else self.text(value)
        if kind is int or value is None or kind is bool:
            return value
        if is_secret(key):
            return HIDDEN
        if kind is float:
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(name)): HIDDEN if _SECRET_KEY.search(str(name)) else self._value("", item)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self._value("", item) for item in value]
        if isinstance(value, bytes | bytearray | memoryview):
            return self.text(bytes(value).decode("utf-8", "backslashreplace"))
        return self.text(_say(value))


@functools.cache
def is_secret(key: str) -> bool:
    """Whether a value of this name is not to be shown. Names are those in the code: there are not many."""
    return _SECRET_KEY.search(key) is not None


def escape(text: str) -> str:
    """`text` with what is not printable as backslash escapes, as in Python: \\x1b, \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _say(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be written: {type(error).__name__}>"


def _forms(user: str, password: str) -> set[str]:
    """The texts in which a password may come up: plain, quoted by Python or for a URL, and as HTTP's Basic scheme."""
    if not password:
        return set()
    octets = password.encode(errors="surrogatepass")
    basic = {base64.b64encode(f"{user}:{password}".encode(code, "replace")).decode() for code in ("utf-8", "latin-1")}
    quoted = {repr(password)[1:-1], ascii(password)[1:-1], repr(octets)[2:-1], quote(octets, safe=""), quote(octets)}
    return {password, *quoted, *basic}


def _pattern(form: str) -> str:
    """A short password is found as a word only: "a" would hide every other letter."""
    return re.escape(form) if len(form) >= _SHORT else rf"(?<!\w){re.escape(form)}(?!\w)"
