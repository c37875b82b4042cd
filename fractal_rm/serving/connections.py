"""Connections of the scoring server: their number, and the time that one may take to send a request."""

import asyncio
import json
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fractal_rm.serving.limits import Limits

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

# Files that a server needs in addition to its connections: libraries, weights, logs.
_SPARE_FILES = 64
# Connections that asyncio accepts before it looks at any of them. Without a free file it logs a traceback for each, so
# they have to fit into the spare ones, together with connections that are being closed.
_BACKLOG = 16


def server_config(app: Any, limits: Limits) -> uvicorn.Config:
    """Settings of uvicorn that close idle connections and refuse those beyond the limit."""
    most = limits.max_connections
    if resource is not None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = most if files == resource.RLIM_INFINITY else max(min(most, files - _SPARE_FILES), 1)
    answer = json.dumps({"detail": f"{most} connections are open, which is the limit. Try again later."}).encode()
    refusal = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    refusal += b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer)

    class Timed(H11Protocol):
        """A connection whose request must begin in time."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connections: Any = self.connections
            waiting = [one for one in connections if one.timer is not None]
            if len(connections) <= most:
                self._watch()
            elif waiting:  # close the connection that has been idle longest
                first = min(waiting, key=lambda one: one.timer.when())
                first._stop()
                first.transport.abort()
                self._watch()
            else:
                transport.write(refusal)
                transport.close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Run the timer while no request is being answered: from the first byte, or the end of the last request."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self.timer is None and not self.transport.is_closing():
                self.timer = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def _stop(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    patience = int(limits.seconds) + 1
    return uvicorn.Config(app, http=Timed, log_level="warning", backlog=_BACKLOG, timeout_graceful_shutdown=patience)
