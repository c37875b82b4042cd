"""Access to a scoring server: by a token, and by the server name in the request."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fractal_rm.serving.limits import Application, Receive, Scope, Send, refuse

# A shorter token can be guessed, and a longer text is probably another file.
_TOKEN_LENGTHS = range(16, 1025)
# A `Host` header: a name or an IPv4 address, or an IPv6 address in brackets, and perhaps a port.
_HOST = re.compile(r"(?:([^][:/?#@\s]+)|\[([0-9a-fA-F:.]+)\])(?::[0-9]*)?")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def read_token(file: str) -> str:
    """The token in a file, its only line.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no token.
    """
    token = Path(file).read_bytes().strip()
    if len(token) not in _TOKEN_LENGTHS or not token.isascii() or len(token.split()) > 1:
        raise ValueError(
            f"{file} holds no token. Write one line of {_TOKEN_LENGTHS[0]} to {_TOKEN_LENGTHS[-1]:,} ASCII characters "
            "without spaces, such as `openssl rand -hex 32` prints."
        )
    return token.decode()


@dataclass(frozen=True)
class Access:
    """What a request must send.

    Args:
        host: Address that the server listens on.
        names: Further server names that requests may send, such as a machine's or a proxy's.
        token: What requests must send as `Authorization: Bearer TOKEN`, or as the password of Basic authorization;
            None: nothing.

    Raises:
        ValueError: If other machines reach the address and there is no token.
    """

    host: str = "127.0.0.1"
    names: Collection[str] = ()
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"`host` is {self.host}, which other machines reach, without a token. Give `token_file`, a file with "
                "a secret of your own, or listen on 127.0.0.1."
            )

    def knows(self, host: str) -> bool:
        """Whether a `Host` header names this server.

        A foreign web page can reach a server on this machine by a name that it resolves to this machine, so names must
        be known. If other machines can reach the server, any address is accepted.
        """
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().rstrip(".")
        if name in {"localhost", self.host.lower(), *(one.lower() for one in self.names)}:
            return True
        if not is_loopback(self.host) and name == socket.gethostname().lower():
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:  # a name
            return False
        return address.is_loopback or not is_loopback(self.host)

    def allows(self, authorization: bytes) -> bool:
        """Whether an `Authorization` header has the token; comparing takes the same time for any wrong one."""
        if self.token is None:
            return True
        kind, _, given = authorization.partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        elif kind.lower() != b"bearer":
            given = b""
        return hmac.compare_digest(given.strip(), self.token.encode())


class Gate:
    """ASGI middleware that refuses requests without access before their body is read."""

    def __init__(self, app: Application, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = scope["headers"]
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:  # a proxy may see another end of the body
            sentence = "The request has both Content-Length and Transfer-Encoding. Send one of them."
            return await refuse(send, 400, sentence)
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self.access.knows(hosts[0]):
            sentence = "The request calls the server by a name that it does not know. Name it by `--names`."
            return await refuse(send, 403, sentence)
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if any(not self.access.knows(origin.partition("://")[2]) for origin in origins):
            sentence = "The request comes from a page of another server. Name that server by `--names`."
            return await refuse(send, 403, sentence)
        given = [value for name, value in headers if name == b"authorization"]
        if not self.access.allows(given[0] if len(given) == 1 else b""):
            sentence = "The token is missing or wrong. Send it as `Authorization: Bearer TOKEN`."
            return await refuse(send, 401, sentence, (b"www-authenticate", b"Bearer"))
        try:
            return await self.app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and its patience too
            with suppress(RuntimeError):  # an answer that has begun
                await refuse(send, 503, "The server is stopping. Try again later.", (b"retry-after", b"1"))
