"""A scoring server in this process: in a thread, or as the command runs it until it is interrupted."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import uvicorn

from fractal_rm.cli.main import main
from fractal_rm.cli.serve import listen
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.serving.app import make_app
from fractal_rm.serving.client import ScoringClient
from fractal_rm.serving.connections import server_config
from fractal_rm.serving.limits import Limits


@contextmanager
def running(model: StepRewardModel, *, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    app = make_app(model, name="rm", limits=limits, **options)
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(server_config(app, limits or Limits(seconds=4)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def serve_and_ask(arguments: Sequence[str], ask: Callable[[ScoringClient], Any]) -> tuple[int, Any]:
    """The port of the server that the command starts, and what was asked of it."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    client = ScoringClient(f"http://127.0.0.1:{port}", retries=12, pause=0.01)

    def ask_and_end() -> Any:
        client.health()  # from here on the server takes signals
        try:
            return ask(client)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_and_end)
        assert main(["serve", *arguments, "--port", str(port)]) == 0
        return port, asked.result()
