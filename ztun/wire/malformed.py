"""What the parsers raise."""

from __future__ import annotations


class MalformedError(Exception):
    """A packet breaks its format. The message is the name of the drop reason."""


class ParameterError(MalformedError):
    """The sender shall hear of it: ICMPv6 Parameter Problem (RFC 4443 section 3.4).

    code: of that message; pointer: offset from the IP header of what is wrong.
    """

    def __init__(self, reason: str, code: int, pointer: int) -> None:
        super().__init__(reason)
        self.code = code
        self.pointer = pointer
