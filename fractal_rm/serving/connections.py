"""Connections of the scoring server: their number, and the time that one may take to send a request."""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fractal_rm.serving.limits import Limits, sentence_body

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
    too_many = _answer(
        b"503 Service Unavailable\r\nretry-after: 1",
        f"{most} connections are open, which is the limit. Try again later.",
    )
    invalid = _answer(b"400 Bad Request", "This is not a valid HTTP request. Send HTTP/1.1 with headers below 64 KB.")

    class Timed(H11Protocol):
        """A connection whose request must begin in time, and whose answer must be taken in time."""

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
                transport.write(too_many)
                transport.close()

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except ValueError:  # a length of thousands of digits
                self.send_400_response("")
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(invalid)
            self.transport.close()

        def _should_upgrade(self) -> bool:
            return False  # only HTTP is spoken; uvicorn would log each request for something else

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Run the timer while no request is being answered: from the first byte, or the end of the last request."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self.timer is None:
                is_sending = self.transport.get_write_buffer_size() > 0  # also after it is closed
                seconds = limits.seconds if is_sending else limits.header_seconds
                self.timer = self.loop.call_later(seconds, self.transport.abort)

        def _stop(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    patience = int(limits.seconds) + 1
    return uvicorn.Config(
        app,
        http=Timed,
        ws="none",
        proxy_headers=False,  # nothing here asks who the client is
        log_level="error",  # a warning for each invalid request would fill the disk
        backlog=_BACKLOG,
        timeout_graceful_shutdown=patience,
    )


def _answer(status: bytes, sentence: str) -> bytes:
    """An answer outside of the application, after which the connection ends; `status` may bring headers."""
    body = sentence_body(sentence)
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body
