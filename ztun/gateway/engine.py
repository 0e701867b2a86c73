"""The read loop: packets from the device into the stack, what the stack says back to the device, timers on time."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from typing import Final

import structlog

from ztun.gateway.shortage import Shortage
from ztun.ports import PacketDevice, Poller
from ztun.stack import BufferPool, Stack
from ztun.stack.timers import NEVER

log = structlog.get_logger("ztun.engine")

# Packets read before others in the event loop get their turn: at most 4 MiB of payload, some milliseconds.
_BATCH: Final = 64
# A read that fails for want of memory, or since the device is just being set down: tried again after so many seconds,
# then after twice as many. Everything else means that the device is gone.
_PASSING: Final = frozenset({errno.EIO, errno.ENOBUFS, errno.ENOMEM, errno.EINTR})
_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 1.0
_NO_BUFFER: Final = memoryview(bytearray())
# Seconds of silence after which the poller's pulse comes before a word to a client. It comes after each wait as well,
# but a process can stand still anywhere, and go on with what it was about to say.
_PULSE_INTERVAL: Final = 0.1
_TRIM_INTERVAL: Final = 5.0  # seconds between looks at how many buffers were not needed


class Engine:
    """Drives one stack on one device. Everybody who makes the stack say something calls `send` afterwards."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, poller: Poller, device: PacketDevice, stack: Stack, pool: BufferPool
    ) -> None:
        self.loop = loop
        self.poller = poller
        self.pool = pool
        self.stack = stack
        self.now: Callable[[], float] = time.monotonic  # what the loops of asyncio count, too
        self.read = 0
        self.written = 0
        self.refused = 0  # writes that the kernel did not take
        self.read_errors = 0  # reads that failed, and were tried again
        self.errors = 0
        self.shortage = Shortage(loop, stack.memory)
        self.device_lost: Callable[[OSError], None] | None = None  # told when nothing can be read any more
        self._device = device
        self._timers = stack.timers
        self._buffer = pool.get()
        self.scratch = pool.get()  # to read into; who keeps it puts another one here
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._pulse_at = 0.0
        self._trimmer: asyncio.TimerHandle | None = None
        self._pause = _PAUSE
        self._reader: asyncio.TimerHandle | None = None  # set while reading waits

    def start(self) -> None:
        self.poller.watch_level(self._device.fileno(), self._readable)
        self._trim()

    def read_again(self) -> None:
        """After `device_lost`: there is another device in its place."""
        self.poller.watch_level(self._device.fileno(), self._readable)

    def stop(self) -> None:
        """Stop reading and say what is left to say."""
        self.poller.unwatch(self._device.fileno())
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        self.shortage.stop()
        self.send()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._trimmer is not None:
            self._trimmer.cancel()
            self._trimmer = None

    def send(self) -> None:
        """Hand everything in the stack's outbox to the device, and look at the clock of the stack again."""
        outbox = self.stack.outbox
        if outbox:
            now = self.now()
            if now >= self._pulse_at:
                self._pulse_at = now + _PULSE_INTERVAL
                self.poller.pulse()
            write = self._device.send
            for packet in outbox:
                if not write(packet):
                    self.refused += 1
            self.written += len(outbox)
            outbox.clear()
        when = self._timers.earliest
        if when < self._timer_at:
            self._arm(when)

    def _readable(self, mask: int) -> None:
        now = time.monotonic()
        stack, buffer = self.stack, self._buffer
        recv_into = self._device.recv_into
        for _ in range(_BATCH):
            try:
                length = recv_into(buffer)
            except OSError as error:
                if error.errno in _PASSING:
                    self._read_later()
                else:
                    self._lose_device(error)
                break
            if not length:
                break
            self.read += 1
            try:
                kept = stack.receive(buffer[:length], now)
            except Exception as error:
                self._failed(error)
                kept = True  # nobody knows who still looks at it
            if kept:
                # None of the others either may be read into, should there be no memory for another one.
                self._buffer = _NO_BUFFER
                try:
                    buffer = self._buffer = self.pool.get()
                except MemoryError:
                    self.shortage.came()
                    self._read_later()
                    break
        self._flush(now)

    def _flush(self, now: float) -> None:
        try:
            self.stack.flush(now)
        except Exception as error:
            self._failed(error)
        self.send()

    def _read_later(self) -> None:
        """Its descriptor is readable still, and would be all the time."""
        self.read_errors += 1
        self.poller.unwatch(self._device.fileno())
        self._reader = self.loop.call_later(self._pause, self._read_on)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _read_on(self) -> None:
        self._reader = None
        read = self.read
        if not self._buffer:
            try:
                self._buffer = self.pool.get()
            except MemoryError:
                self._read_later()
                return
        self.read_again()
        self._readable(0)
        if self.read > read:
            self._pause = _PAUSE

    def _trim(self) -> None:
        self.pool.trim()
        self._trimmer = self.loop.call_later(_TRIM_INTERVAL, self._trim)

    def _lose_device(self, error: OSError) -> None:
        """Somebody removed the interface; its descriptor would be readable for ever."""
        self.poller.unwatch(self._device.fileno())
        if self.device_lost is not None:
            self.device_lost(error)

    def _failed(self, error: Exception) -> None:
        """A defect of ours must cost one packet, not the gateway."""
        if isinstance(error, MemoryError):
            self.shortage.came()
            self.stack.drop("memory-limit")
            return
        self.errors += 1
        self.stack.drop("internal-error")
        if self.errors & (self.errors - 1) == 0:  # at 1, 2, 4, 8 …
            log.exception("a packet could not be processed", times=self.errors)

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.loop.call_at(when, self._timer_due)

    def _timer_due(self) -> None:
        self._timer = None
        self._timer_at = NEVER
        now = time.monotonic()
        try:
            self.stack.handle_timer(now)
        except Exception as error:
            self._failed(error)
        self._flush(now)
