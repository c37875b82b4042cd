"""`fractal-rm serve` in this process, asked from a thread and then interrupted as a person would."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fractal_rm.cli.main import main
from fractal_rm.cli.serve import listen
from fractal_rm.serving.client import ScoringClient


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
