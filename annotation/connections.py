"""Connections that send nothing, or too slowly, are closed; uvicorn by itself does so only between two requests."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_SECONDS, WRITE_SECONDS = 20.0, 60.0
"""Seconds after which a request must be whole, and seconds for which a reader may leave an answer unread."""
BUSY, MOST = 400, 600
"""Number of connections above which requests are answered with 503, and above which new connections are closed."""
LIMITS: dict[str, Any] = {
    "limit_concurrency": BUSY, "timeout_keep_alive": 5, "timeout_graceful_shutdown": 5,
    "h11_max_incomplete_event_size": 1 << 14,
}  # fmt: skip
"""Settings of uvicorn: at most 16 KiB of headers."""


class Impatient(H11Protocol):
    """uvicorn's HTTP protocol with limits on the time that a request and a reader take."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        if len(self.connections) > MOST:
            transport.abort()
        else:
            self._late = self.loop.call_later(READ_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Read bytes; a request that is whole by now loses its time limit, and one that has just begun gets one."""
        super().data_received(data)
        whole = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if whole and self._late:
            self._late.cancel()
            self._late = None
        elif not whole and not self._late:
            self._late = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """Start the time limit of the reader, who has stopped reading."""
        super().pause_writing()
        self._unread = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the time limit of the reader, who reads again."""
        super().resume_writing()
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both time limits."""
        for timer in (self._late, self._unread):
            if timer:
                timer.cancel()
        super().connection_lost(exc)
