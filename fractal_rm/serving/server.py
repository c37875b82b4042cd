"""`fractal-rm serve`: the process around the application."""

import ipaddress
import os
import socket
from collections.abc import Sequence

import uvicorn

from fractal_rm.reward_model import StepRewardModel
from fractal_rm.serving.app import make_app
from fractal_rm.serving.limits import Limits


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Args:
        host: Address or name of this machine.
        port: Port; 0: any that is free.

    Raises:
        OSError: If the address or port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)  # Python adds the address to what the system says
        reason = (os.strerror(number) if number else str(error)).lower()
        raise OSError(f"{host}:{port} cannot be listened on ({reason}). Choose another `host` or `port`.") from error


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


def serve(
    reward_model: StepRewardModel,
    *,
    name: str,
    host: str,
    port: int,
    limits: Limits,
    wait: float,
    ends: Sequence[str] = (),
) -> None:
    """Answer requests until the process is told to end; those that have begun are answered.

    Args:
        reward_model: The model.
        name: What it is called.
        host: Address to listen on.
        port: Port to listen on; 0: any that is free, which is printed.
        limits: What a request may ask for.
        wait: Seconds that a response waits for others.
        ends: As in [`~fractal_rm.serving.app.make_app`].

    Raises:
        OSError: If the address or port cannot be had.
    """
    app = make_app(reward_model, name=name, limits=limits, wait=wait, ends=ends)
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} scores at http://{shown}:{listening.getsockname()[1]}/score; Ctrl-C ends it.", flush=True)
        if not is_loopback(host):
            print("Whoever can reach this address can use the server: it asks for no password.", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(limits.seconds) + 1)
        uvicorn.Server(config).run(sockets=[listening])
