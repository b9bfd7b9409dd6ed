"""Connections that say nothing, or too slowly, are closed; uvicorn alone does so between two requests only."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_SECONDS, WRITE_SECONDS = 20.0, 60.0
"""How long a request may take to come, from its connection or its first byte on; and how long nobody may read of an answer."""
BUSY, MOST = 400, 600
"""Connections from which on requests are answered with 503, and from which on nobody is let in."""
LIMITS: dict[str, Any] = {
    "limit_concurrency": BUSY, "timeout_keep_alive": 5, "timeout_graceful_shutdown": 5, "h11_max_incomplete_event_size": 1 << 14,
    "ws": "none",
}  # fmt: skip
"""Settings of uvicorn: headers of 16 KiB at most, and no WebSockets."""


class Impatient(H11Protocol):
    """uvicorn's HTTP with a limit on the time that a request and a reader take."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, but not for ever."""
        super().connection_made(transport)
        if len(self.connections) > MOST:
            transport.abort()
        else:
            self._late = self.loop.call_later(READ_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take what came; a request that is whole has no time limit any more, one that is not keeps the one that it has."""
        super().data_received(data)
        whole = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if whole and self._late:
            self._late.cancel()
            self._late = None
        elif not whole and not self._late:
            self._late = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """Start to count when nobody reads."""
        super().pause_writing()
        self._unread = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop counting when somebody reads on."""
        super().resume_writing()
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget both limits."""
        for timer in (self._late, self._unread):
            if timer:
                timer.cancel()
        super().connection_lost(exc)
