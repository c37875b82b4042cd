"""Limits of a server: amounts and times."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from fractal_rm.ranges import check_ranges

# A body that is too long is read and dropped, up to this many times the limit: a client that is still sending when the
# connection closes never sees the reason.
_DRAINED = 8

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Limits of a request; all above 0, and the queue holds at least one request."""

    max_responses: int = field(default=1024, metadata={"help": "Maximum responses per request."})
    max_characters: int = field(
        default=4_000_000, metadata={"help": "Maximum characters in the prompts and responses of a request."}
    )
    max_body_bytes: int = field(default=16_000_000, metadata={"help": "Maximum bytes per request."})
    seconds: float = field(
        default=60.0,
        metadata={"help": "Maximum seconds for a request to arrive, to be scored, and for its answer to be read."},
    )
    max_queued: int = field(
        default=16_384, metadata={"help": "Maximum waiting responses; further requests are refused."}
    )
    max_values: int = field(
        default=200_000,
        metadata={"help": "Maximum values (texts, numbers, lists, objects) per request, counted before parsing."},
    )
    max_total_bytes: int = field(
        default=128_000_000, metadata={"help": "Maximum bytes of all requests that arrive or are answered at one time."}
    )
    max_connections: int = field(
        default=256, metadata={"help": "Maximum connections at one time; fewer if the system allows fewer open files."}
    )
    header_seconds: float = field(
        default=10.0, metadata={"help": "Maximum seconds for the headers of a request to arrive."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_total_bytes < self.max_body_bytes:
            raise ValueError(
                f"`max_total_bytes` is {self.max_total_bytes}, less than the {self.max_body_bytes} bytes that one "
                "request may have. Give more, or lower `max_body_bytes`."
            )
        if self.max_queued < self.max_responses:
            raise ValueError(
                f"`max_queued` is {self.max_queued}, less than the {self.max_responses} responses that one request may "
                "hold. Give more, or lower `max_responses`."
            )


class BodyLimit:
    """ASGI middleware that reads a body first, and refuses one that is too long, too slow or too much.

    Args:
        app: The application that it wraps.
        limits: Maximum length, time and values of a body, and maximum bytes of all bodies.
    """

    def __init__(self, app: Application, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._held = 0  # bytes of the bodies of all requests that have begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body in one piece."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        parts: list[bytes] = []
        try:
            return await self._pass_on(scope, receive, send, parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, parts: list[bytes]) -> None:
        """Read the body into `parts`, check it, and pass it on."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                whole = await self._read(scope, receive, parts)
        except _GoneError:
            return None  # nobody reads an answer
        except TimeoutError:
            sentence = f"The body took longer than {self.limits.seconds:g} seconds to arrive. Send it faster."
            return await refuse(send, 408, sentence)
        except _FullError:
            sentence = "Other requests hold too many bytes. Try again in a second, or send fewer at a time."
            return await refuse(send, 503, sentence, (b"retry-after", b"1"))
        if not whole:
            most = self.limits.max_body_bytes
            return await refuse(send, 413, f"The body is longer than {most:,} bytes. Send fewer responses at a time.")
        body = b"".join(parts)
        if b"\0" in body:  # UTF-16, or binary
            return await refuse(send, 400, "The body is not JSON in UTF-8.")
        values = count_values(body, self.limits.max_values)
        if values > self.limits.max_values:
            sentence = f"{values:,} values are more than {self.limits.max_values:,}. Send fewer responses at a time."
            return await refuse(send, 413, sentence)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> bool:
        """Read the body into `parts`; False if it is too long."""
        most, length, more = self.limits.max_body_bytes, 0, True
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        length_stated = int(stated) if stated.isdigit() else 0
        while more and max(length, length_stated) <= _DRAINED * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            part = message.get("body", b"")
            length += len(part)
            more = message.get("more_body", False)
            if max(length, length_stated) <= most:
                if self._held + len(part) > self.limits.max_total_bytes:
                    raise _FullError
                self._held += len(part)
                parts.append(part)
        return max(length, length_stated) <= most


class _GoneError(Exception):
    """The client has ended the connection."""


class _FullError(Exception):
    """All bodies together would exceed their limit of bytes."""


def count_values(body: bytes, most: int) -> int:
    """Number of values in JSON, without parsing it: texts (including names), commas, lists and objects.

    Args:
        body: The JSON, in UTF-8.
        most: With more texts than this, other values are not counted.

    Example:
        >>> count_values(b'{"a": [1, "x, [y"], "b": {}}', 100)
        8
    """
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # the remaining quotes begin and end texts
    strings = bare.count(b'"') // 2
    if strings > most:
        return strings
    outside = b"".join(bare.split(b'"')[::2])
    return strings + sum(map(outside.count, (b",", b"[", b"{")))


def sentence_body(sentence: str) -> bytes:
    """The body of an answer that is one sentence."""
    return json.dumps({"detail": sentence}).encode()


async def refuse(send: Send, status: int, sentence: str, *more: tuple[bytes, bytes]) -> None:
    """Answer a request with one sentence in JSON and further headers, and close the connection."""
    body = sentence_body(sentence)
    # The rest of the body is not read, so the connection cannot be reused.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *more]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
