"""`fractal-rm serve`: step scores over HTTP."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from fractal_rm.cli.checks import check_models, load_reward_model
from fractal_rm.cli.parser import parse
from fractal_rm.serving.limits import Limits


@dataclass
class ServeArguments:
    """Arguments of `fractal-rm serve`."""

    model: str = field(metadata={"help": "Step reward model: the folder that `fractal-rm train` wrote, or a hub id."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on; 0.0.0.0 for all, which lets other machines use the server."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0: any that is free."})
    batch_size: int = field(default=32, metadata={"help": "Most responses in a forward pass, of any requests."})
    wait: float = field(
        default=0.005, metadata={"help": "Seconds that a response waits for others to share a forward pass with."}
    )
    ends: list[str] | None = field(
        default=None,
        metadata={
            "help": "OpenRLHF: texts to take off the end of a response, such as the policy's end-of-text token; those "
            "of the reward model's own tokenizer are taken off anyway."
        },
    )


def serve(argv: Sequence[str]) -> None:
    """Answer requests until somebody interrupts."""
    arguments, limits = parse("serve", [ServeArguments, Limits], argv)
    if arguments.batch_size < 1 or not 0 <= arguments.wait < limits.seconds:
        raise ValueError(
            f"`batch_size` is {arguments.batch_size} and `wait` is {arguments.wait}. "
            "Give a batch size of 1 or more and a wait from 0 to less than `seconds`."
        )
    check_models(arguments.model)
    try:
        from fractal_rm.serving.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ImportError(f"The server needs {error.name}. Install it: `pip install 'fractal-rm[serve]'`.") from error
    reward_model = load_reward_model(arguments.model, arguments.batch_size)
    with contextlib.suppress(KeyboardInterrupt):  # how a server is ended
        serve(
            reward_model,
            name=arguments.model,
            host=arguments.host,
            port=arguments.port,
            limits=limits,
            wait=arguments.wait,
            ends=arguments.ends or (),
        )
