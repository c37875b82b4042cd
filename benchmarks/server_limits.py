"""Does the scoring server keep answering while a client sends unfinished, oversized or endless requests?

The server runs as a process with 256 file descriptors, and is attacked in one way after another. Meanwhile `GET
/health` is requested again and again, each time over a new connection. The rival is the undisturbed server.

    python -m benchmarks.server_limits

Attacks: 300 headers that are never finished; 30 bodies of 15 MB that are never finished; one chat of 14.5 MB, as many
small messages and with as many values as the server takes; a text on which the pattern of the model backtracks
without end. Rows go to `benchmarks/results/server_limits.jsonl`.
"""

import argparse
import http.client
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.places import RESULTS
from benchmarks.common.servers import Server, save_model, serving
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.serving.limits import Limits, count_values

DESCRIPTORS, HEADERS, BODIES = 256, 300, 30
BODY, CHAT = 15_000_000, 14_500_000
# Seconds between two requests, the longest time for an answer, and how long an undisturbed server is measured.
PAUSE, PATIENCE, UNDISTURBED = 0.05, 60.0, 3.0
# Each `a` doubles what Python's `re` tries.
ENDLESS, LINE = "(a|a)*$", "a" * 60 + "!"


class Watch(threading.Thread):
    """Asks for `/health` until it is told to stop.

    Attributes:
        seconds: What each answer took, by its status; None: there was none.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port, self.stopped = port, threading.Event()
        self.seconds: list[tuple[int | None, float]] = []

    def run(self) -> None:
        while not self.stopped.wait(PAUSE):
            self.ask()

    def ask(self) -> None:
        """One question."""
        began, status = time.perf_counter(), None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            status = connection.getresponse().status
        connection.close()
        self.seconds.append((status, time.perf_counter() - began))

    def metrics(self) -> dict[str, Any]:
        """How many questions there were, the share that was answered, and the seconds that answers took."""
        answered = [seconds for status, seconds in self.seconds if status == 200]
        found: dict[str, Any] = {"asked": len(self.seconds), "answered": len(answered) / len(self.seconds)}
        return found | ({"median": median(answered), "longest": max(answered)} if answered else {})


def connect(server: Server, opened: ExitStack, sent: bytes) -> socket.socket:
    """A connection on which something was sent."""
    connection = opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE))
    with suppress(OSError):  # refused meanwhile
        connection.sendall(sent)
    return connection


def answer_of(connection: socket.socket) -> str:
    """The status that a connection ends with; empty: without one."""
    with suppress(OSError):
        return connection.makefile("rb").readline().partition(b" ")[2][:3].decode()
    return ""


def post(server: Server, body: bytes) -> tuple[str, bytes]:
    """Status and answer of `/score`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", "/score", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return str(answer.status), answer.read()


# Attacks: what they do, and the statuses that they get --------------------------------------------------------------


def undisturbed(server: Server) -> Counter[str]:
    """Nothing, for a while."""
    time.sleep(UNDISTURBED)
    return Counter()


def unfinished_headers(server: Server) -> Counter[str]:
    """Headers without an end, until the server has closed all of them."""
    with ExitStack() as opened:
        sent = b"POST /score HTTP/1.1\r\nHost: localhost\r\nX-Unfinished: "
        return Counter(map(answer_of, [connect(server, opened, sent) for _ in range(HEADERS)]))


def unfinished_bodies(server: Server) -> Counter[str]:
    """Bodies of which the last bytes never come: for as long as headers may take, enough to fill the memory."""
    with ExitStack() as opened:
        head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % BODY
        sent = head + b" " * (BODY - 10)
        connections = [connect(server, opened, sent) for _ in range(BODIES)]
        for connection in connections:
            connection.settimeout(Limits().header_seconds / BODIES)
        return Counter(map(answer_of, connections))


def chat(messages: int) -> bytes:
    """A request with one chat of so many messages."""
    said = "x" * (CHAT // messages - 38)
    return json.dumps(
        {"prompts": [[{"role": "user", "content": said}] * messages], "responses": ["a"]}, separators=(",", ":")
    ).encode()


def many_messages(server: Server) -> Counter[str]:
    """A chat of messages of a few characters."""
    return Counter([post(server, chat(CHAT // 60))[0]])


def chat_at_the_limits(server: Server) -> Counter[str]:
    """A chat with as many values as the server takes: all of it is parsed before its characters are counted."""
    most = Limits().max_values
    body = chat(next(count for count in range(most // 7, 0, -10) if count_values(chat(count), most) <= most))
    return Counter([post(server, body)[0]])


def endless_pattern(server: Server) -> Counter[str]:
    """A response on which the pattern of the model never ends."""
    status, answer = post(server, json.dumps({"prompts": ["1"], "responses": [LINE]}).encode())
    return Counter([f"{status} {json.loads(answer)['results'][0]['error']}"])


ATTACKS: dict[str, Callable[[Server], Counter[str]]] = {
    one.__name__: one
    for one in (
        undisturbed, unfinished_headers, unfinished_bodies, many_messages, chat_at_the_limits, endless_pattern
    )
}  # fmt: skip


def measure(results: ResultsFile, name: str, server: Server) -> dict[str, Any]:
    """Attack a server, watch it, and append the row."""
    server.forget_peak()
    before, said, watch, began = server.memory("VmRSS"), server.log_lines(), Watch(server.port), time.perf_counter()
    watch.start()
    got = ATTACKS[name](server)
    seconds = time.perf_counter() - began
    watch.stopped.set()
    watch.join()
    after = Watch(server.port)
    after.ask()
    return results.append(
        benchmark="server_limits",
        arm=name,
        dataset="requests",
        seed=None,
        split="attack",
        metrics=watch.metrics()
        | {
            "memory_growth": server.memory("VmHWM") - before,
            "log_lines": server.log_lines() - said,
            "alive": int(after.seconds[0][0] == 200),
        },
        config={"statuses": dict(got), "descriptors": DESCRIPTORS},
        seconds=seconds,
    )


def main() -> None:
    """Run the benchmark and append its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--results", default=str(RESULTS / "server_limits.jsonl"))
    given = parser.parse_args()
    results = ResultsFile(given.results)
    with tempfile.TemporaryDirectory() as place:
        model = save_model(Path(place) / "model", segmentation=Segmentation("pattern", pattern=ENDLESS))
        with serving(model, Path(place) / "log", DESCRIPTORS) as server:
            post(server, json.dumps({"prompts": ["1"], "responses": ["a"]}).encode())  # what is done once is done
            for name in given.attacks:
                row = measure(results, name, server)
                print(name, row["metrics"], row["config"]["statuses"], flush=True)


if __name__ == "__main__":
    main()
