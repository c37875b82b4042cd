"""`fractal-rm serve`: step scores over HTTP."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fractal_rm.cli.checks import check_models, load_reward_model
from fractal_rm.cli.options.arguments import RewardModelArguments
from fractal_rm.cli.options.parser import parse
from fractal_rm.ranges import check_ranges
from fractal_rm.serving.access import Access, read_token
from fractal_rm.serving.limits import Limits


@dataclass(kw_only=True)
class ServeArguments(RewardModelArguments):
    """Arguments of `fractal-rm serve`."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on. 0.0.0.0 lets other machines use the server."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0: any free port."})
    batch_size: int = field(default=32, metadata={"help": "Maximum responses per forward pass, over all requests."})
    wait: float = field(
        default=0.005, metadata={"help": "Seconds that a response waits for others to share its forward pass."}
    )
    token_file: str | None = field(
        default=None,
        metadata={
            "help": "File whose only line is the token that requests must send (`Authorization: Bearer TOKEN`); "
            "required if other machines can reach `host`."
        },
    )
    names: list[str] | None = field(
        default=None,
        metadata={"help": "Further names of the server that requests may send in `Host`, such as a proxy's."},
    )
    ends: list[str] | None = field(
        default=None,
        metadata={
            "help": "OpenRLHF: texts to strip from the end of a response, such as the policy's end-of-text token. "
            "Special tokens of the reward model's tokenizer are always stripped."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)


def serve(argv: Sequence[str]) -> None:
    """Answer requests until interrupted, then finish those in progress."""
    arguments, limits = parse("serve", [ServeArguments, Limits], argv)
    if not arguments.wait < limits.seconds:
        raise ValueError(f"`wait` is {arguments.wait}. Give less than the {limits.seconds:g} `seconds` of a request.")
    token = None if arguments.token_file is None else read_token(arguments.token_file)
    access = Access(arguments.host, arguments.names or (), token)
    check_models(arguments.model)
    try:
        from fractal_rm.serving.app import make_app, run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ImportError(f"The server needs {error.name}. Install it: `pip install 'fractal-rm[serve]'`.") from error
    name, host = arguments.model, arguments.host
    reward_model = load_reward_model(name, arguments.batch_size, arguments.published)
    app = make_app(
        reward_model, name=name, limits=limits, wait=arguments.wait, ends=arguments.ends or (), access=access
    )
    with _until_ctrl_c(), listen(host, arguments.port) as listening:  # the usual way to stop a server
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} scores at http://{shown}:{listening.getsockname()[1]}/score; Ctrl-C ends it.", flush=True)
        run(app, listening, limits)
    print("Stopped, after the requests in progress.")


@contextlib.contextmanager
def _until_ctrl_c() -> Iterator[None]:
    """Ctrl-C is the usual way to stop a server and not an error; SIGTERM also stops it, with its own exit status."""
    try:
        yield
    except KeyboardInterrupt as end:
        if getattr(end, "number", signal.SIGINT) != signal.SIGINT:
            raise


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free port. Raises OSError if the address or port is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)  # Python adds the address to the system's message
        reason = (os.strerror(number) if number else str(error)).lower()
        raise OSError(f"Cannot listen on {host}:{port} ({reason}). Choose another `host` or `port`.") from error
