"""DNS messages in a byte stream: two octets of length before each (RFC 1035 section 4.2.2)."""

from __future__ import annotations

from ztun.ports import Buffer

_LENGTH = 2


def frame(message: bytes) -> bytes:
    """The message as it goes into a stream. Raises OverflowError when it is longer than 65535 octets."""
    return len(message).to_bytes(_LENGTH) + message


class FrameReader:
    """Cuts a stream into messages, however it arrives in pieces. Holds at most one incomplete message."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: Buffer) -> list[bytes]:
        """Take what arrived; give the messages that are complete now, in order. A message may be empty."""
        self._held += data
        messages, start = [], 0
        while len(self._held) - start >= _LENGTH:
            end = start + _LENGTH + int.from_bytes(self._held[start : start + _LENGTH])
            if end > len(self._held):
                break
            messages.append(bytes(self._held[start + _LENGTH : end]))
            start = end
        del self._held[:start]
        return messages

    @property
    def is_between_messages(self) -> bool:
        """Whether the stream may end here without having lost anything."""
        return not self._held
