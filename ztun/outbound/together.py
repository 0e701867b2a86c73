"""Whether a SOCKS5 proxy takes greeting, authentication and request in one go.

RFC 1928 has the client wait for the method before it asks. Where the method is known beforehand that costs a round trip
for nothing, and proxy and client a wake-up each. Most servers read one message after the other and do not mind; some
throw away what they did not expect yet. So a proxy is asked once, with a request that connects to nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from ztun.ports import Dialling

_PATIENCE = 3.0  # seconds for connecting and both answers; one who throws the request away would never answer it
_RELUCTANCE = 30.0  # seconds between two questions: a destination that does not answer looks like a doubt


class Together:
    """known: True, False, or None as long as nobody knows; only True makes use of it.

    begin: asks the proxy, and says later whether it answered the request, None when it did not even take the greeting;
    changed: called when `known` becomes another.
    """

    def __init__(self, begin: Callable[[Callable[[bool | None], None]], Dialling], changed: Callable[[], None]) -> None:
        self.known: bool | None = None
        self._begin = begin
        self._changed = changed
        self._dialling: Dialling | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = math.inf  # nobody is asked of his own accord before `ask` was called
        self._closed = False

    def may(self) -> bool:
        """Whether to make use of it, now. Asks again after a while when the proxy was not to be reached."""
        if self.known is None and time.monotonic() >= self._not_before:
            self.ask()
        return self.known is True

    def ask(self) -> None:
        """Find out, unless that is under way."""
        if self._timer is not None or self._closed:
            return
        loop = asyncio.get_running_loop()
        self._not_before = loop.time() + _RELUCTANCE
        self._timer = loop.call_later(_PATIENCE, self._give_up)
        self._dialling = self._begin(self._answered)

    def doubt(self) -> None:
        """It did not answer a request that came with the greeting: that may have been the reason."""
        if asyncio.get_running_loop().time() >= self._not_before:
            self._learn(None)
            self.ask()

    def close(self) -> None:
        """Ask no more."""
        self._closed = True
        self._end()

    def _give_up(self) -> None:
        self._end()
        self._learn(False)

    def _answered(self, known: bool | None) -> None:
        self._end()
        self._learn(known)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dialling, self._dialling = self._dialling, None
        if dialling is not None:
            dialling.cancel()

    def _learn(self, known: bool | None) -> None:
        if known is not self.known:
            self.known = known
            self._changed()
