"""What a server accepts: how much, and for how long."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

# A body that is too long is read to its end, without being kept, up to this many times the limit: a client that still
# sends when the connection closes never sees why.
_DRAINED = 8

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Limits of a request; each above 0, and the queue holds one request at least."""

    max_responses: int = field(default=1024, metadata={"help": "Most responses in a request."})
    max_characters: int = field(
        default=4_000_000, metadata={"help": "Most characters in the prompts and responses of a request."}
    )
    max_body_bytes: int = field(default=16_000_000, metadata={"help": "Longest request."})
    seconds: float = field(
        default=60.0, metadata={"help": "Longest time for a request to arrive, and again to be scored."}
    )
    max_queued: int = field(
        default=16_384, metadata={"help": "Most responses that wait for their turn; requests beyond are refused."}
    )

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: nothing could be scored. Give more than 0.")
        if self.max_queued < self.max_responses:
            raise ValueError(
                f"`max_queued` is {self.max_queued}, less than the {self.max_responses} responses that one request may "
                "hold. Give more, or lower `max_responses`."
            )


class BodyLimit:
    """ASGI middleware that reads a body before anybody else does, and refuses one that is too long or too slow.

    Args:
        app: The application behind it.
        limits: Gives the longest body and the longest time for it to arrive.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body in one piece."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            sentence = f"The body took longer than {self.limits.seconds:g} seconds to arrive. Send it faster."
            return await _refuse(send, 408, sentence)
        if body is None:
            most = self.limits.max_body_bytes
            return await _refuse(send, 413, f"The body is longer than {most:,} bytes. Send fewer responses at a time.")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if it is too long."""
        most, parts, length, more = self.limits.max_body_bytes, [], 0, True
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        length_stated = int(stated) if stated.isdigit() else 0
        while more and max(length, length_stated) <= _DRAINED * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
            if length <= most:
                parts.append(message.get("body", b""))
        return b"".join(parts) if max(length, length_stated) <= most else None


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    # What is left of the body is not read: the connection cannot be used again.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
