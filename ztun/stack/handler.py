"""What a connection tells whoever it works for."""

from __future__ import annotations

from typing import Protocol

from ztun.stack.state import Closed


class Handler(Protocol):
    """What a connection tells its application."""

    def established(self, now: float) -> None:
        """The client answered the SYN-ACK."""
        ...

    def data(self, payload: memoryview, now: float) -> int:
        """In-order bytes. Returns how many of them it keeps; those count against the window until `consumed`.

        A view may be held on to only when something was kept of it.
        """
        ...

    def eof(self, now: float) -> None:
        """The client sent FIN."""
        ...

    def writable(self, now: float) -> None:
        """Data was acknowledged or the window opened: `room` may have grown."""
        ...

    def closed(self, how: Closed, now: float) -> None:
        """The connection is gone. Called once, last."""
        ...
