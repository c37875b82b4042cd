"""The scoring server over loopback: a real server, a real client, and requests that nobody should send."""

import asyncio
import base64
import gzip
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from support.documents import script
from support.models import byte_tokenizer, reward_model, sums
from support.serving import running, serve_and_ask
from support.stand_ins import save_reward_model

from fractal_rm.cli.main import main
from fractal_rm.cli.serve import listen
from fractal_rm.data import patterns
from fractal_rm.data.prompts import RenderedPrompt
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import FractalReward, StepRewardModel
from fractal_rm.scorers.inputs import prompt_text
from fractal_rm.serving.access import Access, Gate, is_loopback
from fractal_rm.serving.client import ScoringClient
from fractal_rm.serving.connections import server_config
from fractal_rm.serving.limits import Limits, count_values
from fractal_rm.serving.protocol import OpenRLHFRequest, PromptedResponse, read_openrlhf

PROMPTS = ["2+3*4?\n", "¿Cuánto es 7-4?\n", "3\u00d72 = ?\n"]
RESPONSES = ["3*4=12.\n2+12=14.", "7\u22124 = 3 \U0001f642\nasí que 3.", "三乘二\n= 6."]
SENTENCE = re.compile(r"\A[^\n]+\.\Z")


def make_model(**settings: Any) -> StepRewardModel:
    return reward_model("token", "gpt2", aggregation="product", **settings)


def slowed(model: StepRewardModel, seconds: float) -> list[int]:
    """Make every forward take longer; returns a list that grows by the responses of each."""
    sizes: list[int] = []

    def wait(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["input_ids"]))
        time.sleep(seconds)

    model.scorer.register_forward_pre_hook(wait, with_kwargs=True)
    return sizes


@pytest.fixture(scope="module")
def model() -> StepRewardModel:
    return make_model()


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    limits = Limits(max_responses=300, max_characters=20_000, max_body_bytes=50_000, max_queued=300)
    with running(model, limits=limits) as address:
        yield address


def post(url: str, body: Any, path: str = "/score", kind: str = "application/json", **options: Any) -> tuple[int, Any]:
    """Status and JSON of a request; a body that is no bytes is written as JSON."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        data = body if isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": kind}, **options)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def refusal(url: str, body: Any, path: str = "/score", **options: Any) -> tuple[int, str]:
    """Status and sentence of a request that is refused."""
    status, said = post(url, body, path, **options)
    assert list(said) == ["detail"], said
    assert SENTENCE.match(said["detail"])
    return status, said["detail"]


# Scores -----------------------------------------------------------------------------------------------------------


def test_a_served_model_scores_as_a_local_one(url, model):
    client = ScoringClient(url)
    scored = client.score(PROMPTS, RESPONSES)
    for ours, theirs in zip(scored, model.score(PROMPTS, RESPONSES), strict=True):
        assert ours.spans == theirs.spans
        assert [step.text for step in ours.steps] == [step.text for step in theirs.steps]
        assert ours.step_scores == pytest.approx(theirs.step_scores, abs=1e-6)
        assert (ours.response, ours.truncated_steps, ours.error) == (theirs.response, 0, None)
    assert client.rewards(PROMPTS, RESPONSES) == pytest.approx([result.score for result in scored])
    assert len({round(result.score, 6) for result in scored}) == 3


def test_steps_that_are_given_are_scored_as_given(url, model):
    client, steps, spans = ScoringClient(url), [["3*4=12.", "2+12=14."]], [[(0, 3), (4, 16)]]
    assert client.score(PROMPTS[:1], steps)[0].spans == [(0, 7), (8, 16)]
    assert client.score(PROMPTS[:1], steps)[0].response == RESPONSES[0]
    assert client.score(PROMPTS[:1], RESPONSES[:1], spans=spans)[0].spans == spans[0]
    assert len(client.score(PROMPTS[:2], RESPONSES[:2], spans=[None, [(0, 5)]])[0].steps) == 2
    assert client.score([], []) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"joint": " ## "},
        {"segmentation": Segmentation("sentences")},
        {"segmentation": Segmentation("separator", separator="<step>")},
    ],
)
def test_steps_are_joined_by_the_server_as_in_training(settings):
    model = make_model(**settings)
    steps = [["3*4=12.", "2+12=14."], ["7-4=3."]]
    with running(model) as url:
        scored = ScoringClient(url).score(PROMPTS[:2], steps)
    local = model.score(PROMPTS[:2], steps)
    assert [one.response for one in scored] == [one.response for one in local]
    assert "\n" not in scored[0].response
    for one, other in zip(scored, local, strict=True):
        assert [one.response[start:end] for start, end in one.spans] == [step.text for step in other.steps]
        assert one.step_scores == pytest.approx(other.step_scores, abs=1e-6)


def test_a_bad_row_does_not_spoil_the_others_and_is_named(url, model):
    chat = [{"role": "user", "content": "2+2?"}]
    prompts = [PROMPTS[0], PROMPTS[0], chat, [], PROMPTS[0], PROMPTS[0]]
    responses = [RESPONSES[0], "  \n", RESPONSES[0], RESPONSES[0], "x", "\ud800"]
    spans = [None, None, None, None, [[0, 9]], None]
    status, answer = post(url, {"prompts": prompts, "responses": responses, "spans": spans})
    assert status == 200
    good, *bad = answer["results"]
    expected = model.score(PROMPTS[:1], RESPONSES[:1])[0]
    assert (good["error"], good["score"]) == (None, pytest.approx(expected.score, abs=1e-6))
    for number, (row, told) in enumerate(
        zip(bad, ("is empty", "no chat template", "without", "leave", "surrogate"), strict=True), 1
    ):
        assert (row["score"], row["steps"]) == (None, [])
        assert row["error"].startswith(f"row {number}: ")
        assert told in row["error"]


def test_steps_beyond_the_longest_input_are_counted():
    with running(make_model(max_length=20)) as url:
        (found,) = ScoringClient(url).score(["2+2?\n"], ["2+2=4.\n4+4=8.\n8+8=16."])
    assert len(found.steps) + found.truncated_steps == 3
    assert found.truncated_steps > 0


def test_concurrent_requests_share_forward_passes_and_keep_their_own_scores():
    model = make_model()
    rows = [(row["prompt"], "\n".join(row["steps"])) for row in sums(24)]
    expected = [model.score([prompt], [response])[0].score for prompt, response in rows]
    sizes = slowed(model, 0.02)
    with running(model, wait=0.05) as url, ThreadPoolExecutor(24) as pool:
        client = ScoringClient(url)
        found = list(pool.map(lambda row: client.rewards([row[0]], [row[1]])[0], rows))
    assert found == pytest.approx(expected, abs=1e-6)
    assert sum(sizes) == 24
    assert len(sizes) < 24 / 2


def test_a_request_that_is_larger_than_a_batch_is_scored_in_several(model):
    rows = sums(80)
    prompts, steps = [row["prompt"] for row in rows], [row["steps"] for row in rows]
    small = StepRewardModel(model.scorer, model.processor, model.settings, batch_size=7)
    with running(small) as url:
        found = ScoringClient(url).score(prompts, steps)
    expected = model.score(prompts, steps)
    assert [result.score for result in found] == pytest.approx([result.score for result in expected], abs=1e-6)


# Requests that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 422, "Field required"),
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, "The body is not UTF-8 (byte 0); write it in UTF-8."),
        (b"[" * 20_000, 400, "JSON"),
        (b"[]", 422, "dictionary"),
        (b"null", 422, "dictionary"),
        ({"prompts": ["a"], "responses": ["b", "c"]}, 422, "1 prompts, 2 responses: give as many"),
        ({"prompts": ["a"], "responses": ["b"], "spans": []}, 422, "0 spans"),
        ({"prompts": ["a"], "responses": ["b"], "steps": [["b"]]}, 422, "one of `responses` and `steps`"),
        ({"prompts": ["a"]}, 422, "one of `responses` and `steps`"),
        ({"prompts": ["a"], "steps": [["b"]], "spans": [None]}, 422, "`spans` belong to `responses`"),
        ({"prompts": ["a", "b"], "responses": ["b", 5]}, 422, "`responses[1]"),
        ({"prompts": ["a", "b"], "responses": ["b", ["c"]]}, 422, "`responses`: entry 1 is a list of steps; send"),
        ({"prompts": ["a", "b"], "steps": [["c"], "b"]}, 422, "`steps`: entry 1 is a text; send texts as `responses`"),
        ({"prompts": ["a"], "responses": ["b"], "threshold": 1}, 422, "`threshold`"),
        ({"prompts": [[{"content": "a"}]], "responses": ["b"]}, 422, "`prompts[0]"),
        ({"prompts": ["a"], "responses": ["b"], "rendered": "no"}, 422, "`rendered`"),
        ({"prompts": ["a"], "responses": ["b"], "spans": [[["0", 1]]]}, 422, "`spans[0]"),
        ({"prompts": ["a"], "responses": ["b"], "\ud800": 1}, 422, "unicode"),
    ],
)
def test_a_malformed_request_is_refused_with_one_sentence(url, body, status, told):
    found, sentence = refusal(url, body)
    assert found == status
    assert told in sentence
    assert ScoringClient(url).rewards(PROMPTS, RESPONSES)  # and the server goes on


def test_a_request_that_is_too_large_is_refused(url):
    status, sentence = refusal(url, {"prompts": ["a"] * 301, "responses": ["b"] * 301})
    assert (status, "301 responses are more than 300" in sentence) == (413, True)
    status, sentence = refusal(url, {"prompts": ["a"], "responses": ["b" * 20_000]})
    assert (status, "20,001 characters are more than 20,000" in sentence) == (413, True)
    status, sentence = refusal(url, {"prompts": [""], "steps": [["b" * 5_000] * 5]})
    assert (status, "25,000 characters" in sentence) == (413, True)
    with pytest.raises(ValueError, match=r"refused the request \(413\): 20,001 characters"):
        ScoringClient(url).score(["a"], ["b" * 20_000])


@pytest.mark.parametrize("length", [50_001, 350_000, 10_000_000])
def test_a_body_that_is_too_long_is_refused_whether_or_not_its_length_is_stated(url, length):
    assert refusal(url, b" " * min(length, 350_000)) == (
        413,
        "The body is longer than 50,000 bytes. Send fewer responses at a time.",
    )
    if length < 400_000:
        chunks = iter([b" " * (length // 5)] * 4 + [b" " * (length - 4 * (length // 5))])
        assert refusal(url, chunks, encode_chunked=True)[0] == 413
    else:  # so long that it is not even read to its end
        with pytest.raises((AssertionError, OSError)):
            assert post(url, b" " * length)[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(model):
    with running(model, limits=Limits(seconds=0.3)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            said = connection.makefile("rb").read()
    assert said.startswith(b"HTTP/1.1 408")
    assert b"longer than 0.3 seconds to arrive" in said


def test_a_body_without_its_type_is_refused_with_the_header_to_send(url):
    asked = {"prompts": ["a"], "responses": ["b"]}
    status, sentence = refusal(url, asked, kind="application/x-www-form-urlencoded")  # as curl -d
    assert status == 422
    assert sentence.endswith("Send it with the header `Content-Type: application/json`.")
    assert "Input should be" in refusal(url, ["a"])[1]


def test_other_paths_and_methods_are_refused(url):
    assert refusal(url, {}, "/scores") == (404, "There is no /scores here. /openapi.json says what there is.")
    assert refusal(url, {}, "/health") == (405, "/health takes no POST. /openapi.json says what it takes.")


HEAD = b"Host: localhost\r\nConnection: close\r\n"
HEALTH, SCORE = b"GET /health HTTP/1.1\r\n", b"POST /score HTTP/1.1\r\n"
CHUNKED, LENGTH = b"Transfer-Encoding: chunked\r\n", b"Content-Length: "
INVALID, FOREIGN, PAGE = "This is not a valid HTTP request.", "calls the server by a name", "a page of another server"


def asked(url: str, sent: bytes) -> tuple[int, str]:
    """Status and sentence of what is not a usual request."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    said = json.loads(body or b'{"detail": "."}')
    return int(head.split()[1]), said.get("detail", "scored")


def body_of(text: bytes, *, kind: bytes = b"application/json", path: bytes = b"/score") -> bytes:
    head = SCORE.replace(b"/score", path) + HEAD + b"Content-Type: " + kind + b"\r\n"
    return head + LENGTH + b"%d\r\n\r\n" % len(text) + text


GOOD_BODY = b'{"prompts": ["a"], "responses": ["1+1=2."]}'


@pytest.mark.parametrize(
    ("sent", "status", "told"),
    [
        (SCORE + HEAD + CHUNKED + LENGTH + b"5\r\n\r\n0\r\n\r\n", 400, "both Content-Length and Transfer-Encoding"),
        (SCORE + HEAD + LENGTH + b"9" * 5000 + b"\r\n\r\n", 400, INVALID),
        (SCORE + HEAD + LENGTH + b"-1\r\n\r\n", 400, INVALID),
        (SCORE + HEAD + LENGTH + b"1\r\n" + LENGTH + b"2\r\n\r\n", 400, INVALID),
        (SCORE + HEAD + CHUNKED + b"\r\nzz\r\n", 400, INVALID),
        (SCORE + HEAD + CHUNKED + b"\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 100, 413, "longer than 50,000"),
        (b"\x16\x03\x01\x00\xff\r\n\r\n", 400, INVALID),
        (b"GET [x HTTP/1.1\r\n" + HEAD + b"\r\n", 404, "There is no [x here."),
        (b"GET /a%0d%0ab%1b HTTP/1.1\r\n" + HEAD + b"\r\n", 404, "There is no /ab here."),
        (b"GET /health/ HTTP/1.1\r\n" + HEAD + b"\r\n", 404, "There is no /health/ here."),
        (b"X" * 500 + b" /health HTTP/1.1\r\n" + HEAD + b"\r\n", 405, f"/health takes no {'X' * 80}. "),
        (HEALTH + b"Host: [localhost]\r\n\r\n", 403, FOREIGN),
        (b"GET /x HTTP/1.1\r\nHost: ]localhost[\r\n\r\n", 403, FOREIGN),
        (HEALTH + b"Host: localhost:\xb2\r\n\r\n", 403, FOREIGN),
        (HEALTH + HEAD + b"Origin: null\r\n\r\n", 403, PAGE),
        (HEALTH + HEAD + b"Origin: http://evil.example\r\n\r\n", 403, PAGE),
        (HEALTH + HEAD + b"Origin: http://localhost:3000\r\n\r\n", 200, "scored"),
        (HEALTH + HEAD.replace(b"close", b"Upgrade, close") + b"Upgrade: websocket\r\n\r\n", 200, "scored"),
        (body_of(gzip.compress(GOOD_BODY)), 400, "The body is not JSON in UTF-8."),
        (body_of(b'{"prompts": ["b"], ' + GOOD_BODY[1:]), 400, "The body has the name 'prompts' twice"),
        (body_of(GOOD_BODY + b"x"), 400, "The body is invalid JSON (Extra data at column 44)"),
        (body_of(b'{"query": ["\\ud800"], "prompts": ["a"]}', path=b"/openrlhf"), 422, "does not begin with"),
        (body_of(GOOD_BODY, kind=b"application/json; charset=utf-16"), 200, "scored"),
    ],
)
def test_what_nobody_should_send_gets_a_sentence_and_leaves_no_word_in_the_log(url, capfd, sent, status, told):
    found, sentence = asked(url, sent)
    assert (found, told in sentence) == (status, True), (found, sentence)
    assert capfd.readouterr().err == ""


def test_an_answer_that_nobody_reads_is_given_up():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 30_000_000})

    config = server_config(app, Limits(seconds=0.15, header_seconds=0.15))
    config.lifespan = "off"
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        with ExitStack() as opened:
            for close in (b"", b"Connection: close\r\n"):
                client = opened.enter_context(socket.create_connection(listening.getsockname(), timeout=10))
                client.sendall(HEALTH + b"Host: localhost\r\n" + close + b"\r\n")
                assert client.recv(1)
            until = time.monotonic() + 8
            while server.server_state.connections and time.monotonic() < until:
                time.sleep(0.02)
            left = len(server.server_state.connections)
        server.should_exit = True
        thread.join(20)
    assert left == 0


def test_a_request_that_is_cut_off_by_the_end_of_the_server_is_told():
    said: list[Any] = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def keep(message: Any) -> None:
        said.append(message)

    async def end() -> None:
        scope = {"type": "http", "headers": [(b"host", b"localhost")]}
        task = asyncio.create_task(Gate(never, Access())(scope, never, keep))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(end())
    assert said[0]["status"] == 503
    assert b"The server is stopping." in said[1]["body"]


# Limits of time and number ----------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_given_up_and_its_rows_are_not_scored():
    model = make_model()
    model.batch_size = 1
    sizes = slowed(model, 0.25)
    with running(model, limits=Limits(seconds=0.4)) as url:
        status, sentence = refusal(url, {"prompts": ["a"] * 20, "responses": ["1+1=2."] * 20})
        assert (status, "longer than 0.4 seconds" in sentence) == (504, True)
        begun = len(sizes)
        client = ScoringClient(url, retries=3, pause=0.3)
        assert len(client.rewards(["a"], ["1+1=2."])) == 1
    assert begun <= 3
    assert len(sizes) <= 5  # not the other rows


def test_a_request_beyond_the_queue_is_refused_and_a_client_tries_again():
    model = make_model()
    slowed(model, 0.3)
    limits = Limits(max_responses=2, max_queued=2)
    model.batch_size = 1
    with running(model, limits=limits, wait=0.0) as url, ThreadPoolExecutor(4) as pool:
        client = ScoringClient(url, retries=8, pause=0.2)
        first = [pool.submit(client.rewards, ["a"], ["1+1=2."]) for _ in range(3)]
        time.sleep(0.15)
        status, sentence = refusal(url, {"prompts": ["a"] * 2, "responses": ["b"] * 2})
        assert (status, "Too many responses are waiting" in sentence) == (503, True)
        assert len(client.rewards(["a"] * 2, ["1+1=2."] * 2)) == 2
        assert [len(future.result()) for future in first] == [1, 1, 1]


def test_a_request_that_has_begun_is_answered_when_the_server_ends():
    model = make_model()
    sizes = slowed(model, 0.5)
    with ThreadPoolExecutor(1) as pool:
        with running(model) as url:
            found = pool.submit(ScoringClient(url, retries=0).rewards, ["a"], ["1+1=2."])
            while not sizes:
                time.sleep(0.01)
        assert 0 < found.result()[0] < 1
    with pytest.raises(ConnectionError, match="gave no answer in 1 tries"):
        ScoringClient(url, retries=0).health()


# Strangers --------------------------------------------------------------------------------------------------------


def head(url: str, *lines: str) -> int:
    """Status of a request for /health with these headers."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join(["GET /health HTTP/1.1", *lines, "Connection: close", "", ""]).encode())
        return int(connection.makefile("rb").readline().split()[1])


def test_a_page_that_calls_the_server_by_its_own_name_is_refused(url):
    for known in ("localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST."):
        assert head(url, f"Host: {known}") == 200
    for foreign in ("evil.example", "localhost.evil.example", "10.0.0.1", "127.0.0.1.nip.io:8000", ""):
        assert head(url, f"Host: {foreign}") == 403
    assert head(url, "Host: localhost", "Host: evil.example") in (400, 403)


def test_a_request_without_the_token_is_refused_before_its_body_is_read(model):
    token = "0123456789abcdef"
    with running(model, access=Access(token=token)) as url:
        assert head(url, "Host: localhost") == 401
        for wrong in ("Bearer x", f"Bearer {token}x", f"Basic {token}", "Basic !", token, "Bearer"):
            assert head(url, "Host: localhost", f"Authorization: {wrong}") == 401
        basic = base64.b64encode(f"any:{token}".encode()).decode()
        for right in (f"Bearer {token}", f"bearer {token}", f"Basic {basic}"):
            assert head(url, "Host: localhost", f"Authorization: {right}") == 200
        assert ScoringClient(url.replace("//", f"//any:{token}@")).rewards(PROMPTS[:1], RESPONSES[:1])
        with pytest.raises(ValueError, match=r"refused the request \(401\): The token is missing or wrong"):
            ScoringClient(url).health()


def test_other_machines_need_a_token(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "which other machines reach, without a token. Give `token_file`" in capsys.readouterr().err
    (tmp_path / "token").write_text("short")
    assert main(["serve", "--model", str(tmp_path), "--token_file", str(tmp_path / "token")]) == 2
    assert "holds no token. Write one line of 16 to 1,024 ASCII characters" in capsys.readouterr().err
    assert Access("0.0.0.0", token="x" * 16).knows("192.168.0.7:8000")
    assert not Access("0.0.0.0", token="x" * 16).knows("evil.example")
    assert Access("0.0.0.0", ["gpu-1"], token="x" * 16).knows("GPU-1:8000")


def test_headers_that_do_not_arrive_are_given_up_and_others_are_served(model):
    limits = Limits(header_seconds=0.5, max_connections=8)
    with running(model, limits=limits) as url, ExitStack() as opened:
        host, port = url.removeprefix("http://").split(":")

        def connect(sent: bytes) -> socket.socket:
            connection = opened.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(sent)
            return connection

        slow = [connect(b"GET /health HTTP/1.1\r\nHost: ") for _ in range(4)] + [connect(b"") for _ in range(3)]
        # One that was served and then says no more than a beginning.
        again = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in again.recv(4096)
        again.sendall(b"GET /he")
        begun = time.monotonic()
        for connection in (*slow, again):
            with suppress(ConnectionResetError):
                connection.makefile("rb").read()  # ends when the server ends the connection
        assert time.monotonic() - begun < 8
        assert ScoringClient(url).health()["status"] == "ok"


def test_a_connection_that_says_nothing_makes_room_and_one_at_work_does_not(model):
    with running(model, limits=Limits(max_connections=2)) as url, ExitStack() as opened:
        host, port = url.removeprefix("http://").split(":")

        def connect(sent: bytes) -> Any:
            connection = opened.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(sent)
            return connection.makefile("rb")

        get, rest = b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"
        silent, slow = connect(b""), connect(get)
        assert b"200" in connect(get + rest).readline()
        with suppress(ConnectionResetError):
            assert silent.read() == b""
        body = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        for _ in range(2):
            assert b"100" in connect(body).readline()  # at work
        assert b"2 connections are open" in connect(b"").read()
        with suppress(ConnectionResetError):
            assert slow.read() == b""


def test_all_bodies_together_are_limited(model):
    limits = Limits(max_body_bytes=60_000, max_total_bytes=100_000, seconds=5)
    with running(model, limits=limits) as url, ExitStack() as opened:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(2):
            connection = opened.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000\r\n\r\n" + b" " * 49_000
            )
        time.sleep(0.3)
        body = {"prompts": ["a" * 9000], "responses": ["b"]}
        status, sentence = refusal(url, body)
        assert (status, "Other requests hold too many bytes" in sentence) == (503, True)
        opened.close()  # and what is given up is free again
        long = b" " * 50_000 + json.dumps({"prompts": PROMPTS[:1], "responses": RESPONSES[:1]}).encode()
        until = time.monotonic() + 5
        while (found := post(url, long)[0]) != 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert found == 200


def test_values_are_counted_before_they_are_parsed(model):
    chat = [{"role": "user", "content": "x"}]
    assert count_values(json.dumps({"prompts": [chat * 5]}).encode(), 10**6) == 1 + 20 + 3 + 14
    tricks = [r'"\\"', r'"\\\""', r'"[{,\""', r'"\u0022,"']
    for trick in tricks:
        counted = count_values(f"[{trick},{trick},[],{{}}]".encode(), 10**6)
        assert counted == 2 + 3 + 3, trick
    with running(model, limits=Limits(max_values=1000)) as url:
        status, sentence = refusal(url, {"prompts": [chat * 200], "responses": ["a"]})
        assert (status, "values are more than 1,000. Send fewer" in sentence) == (413, True)
        status, sentence = refusal(url, {"prompts": ["a"], "responses": ["a"], "spans": [[[0, 1]] * 600]})
        assert status == 413
        status, sentence = refusal(url, json.dumps({"prompts": ["a"], "responses": ["b"]}).encode("utf-16"))
        assert (status, sentence) == (400, "The body is not JSON in UTF-8.")


def test_a_model_whose_pattern_never_ends_leaves_the_server_alive(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    patterns.compiled.cache_clear()
    slow = reward_model("likelihood", "llama", segmentation=Segmentation("pattern", pattern="(a|a)*$"))
    with running(slow) as url, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, url, {"prompts": ["1"], "responses": ["a" * 60 + "!"]})
        time.sleep(0.1)
        assert ScoringClient(url, timeout=5).health()["status"] == "ok"
        status, answer = asked.result()
    assert status == 200
    assert "takes longer than 0.3 s" in answer["results"][0]["error"]


@pytest.mark.parametrize("answer", [{}, [], {"results": 3}, {"results": []}, {"results": [{"score": 1}]}])
def test_a_client_of_another_server_says_so(monkeypatch, answer):
    client = ScoringClient("http://localhost:1")
    monkeypatch.setattr(client, "_ask", lambda *asked: answer)
    with pytest.raises(ValueError, match=r"answered something other than a result for each response\. Give"):
        client.rewards(["a"], ["b"])


# The client -------------------------------------------------------------------------------------------------------


def test_a_client_without_a_server_says_so():
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"http://127.0.0.1:{port}/score gave no answer in 2 tries .*refused"):
        ScoringClient(f"http://127.0.0.1:{port}", retries=1, pause=0.01).rewards(["a"], ["b"])
    with pytest.raises(ValueError, match="starts with http"):
        ScoringClient("localhost:8000")


def test_a_client_does_not_wait_for_ever():
    with listen("127.0.0.1", 0) as silent:
        client = ScoringClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1, retries=1, pause=0.01)
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match="timed out"):
            client.rewards(["a"], ["b"])
    assert time.monotonic() - begun < 5


def test_many_responses_go_in_several_requests(url):
    found = ScoringClient(url).rewards(["a"] * 700, ["1+1=2."] * 699 + [""])
    assert found[:-1] == pytest.approx([found[0]] * 699)
    assert found[-1] is None
    with pytest.raises(ValueError, match="1 prompts came with 2 responses"):
        ScoringClient(url).rewards(["a"], ["b", "c"])


def test_a_client_sends_less_at_a_time_where_the_server_takes_no_more(url, model):
    prompts, responses = ["p" * 150] * 200, [f"{i}+1={i + 1}.\nSo {i + 1}." for i in range(200)]  # > 20,000 characters
    assert refusal(url, {"prompts": prompts, "responses": responses})[0] == 413
    expected = [result.score for result in model.score(prompts, responses)]
    assert ScoringClient(url).rewards(prompts, responses) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"refused the request \(413\)"):
        ScoringClient(url).rewards(["p" * 20_001], ["a"])


def test_a_message_counts_with_all_that_a_template_may_show():
    message = {"role": "user", "content": "", "reasoning_content": "x" * 1000}
    assert PromptedResponse([message], "a").characters > 1000


def test_many_end_tokens_are_taken_off_at_once():
    request = OpenRLHFRequest(query=["p4." + "</s>" * 100_000], prompts=["p"])
    (row,) = read_openrlhf(request, ["</s>"])
    assert (str(row.prompt), row.response) == ("p", "4.")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.2", True), ("::1", True), ("localhost", True), ("::1f", False), ("localhost.example.com", False)],
)
def test_only_addresses_of_this_machine_are_loopback(host, expected):
    assert is_loopback(host) is expected


def test_the_client_needs_the_standard_library_only():
    code = "import sys; from fractal_rm.serving.client import ScoringClient; ScoringClient('http://x'); "
    code += "print(sorted({'torch', 'fastapi', 'pydantic', 'uvicorn', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Other trainers ---------------------------------------------------------------------------------------------------


def test_a_client_is_a_trl_reward_function(url, model):
    ours, local = ScoringClient(url), FractalReward(model)
    completions = [*RESPONSES[:2], ""]
    expected = local(PROMPTS, completions)
    found = ours(prompts=PROMPTS, completions=completions, completion_ids=[[1]] * 3, answer=["14"] * 3)
    assert ours.__name__ == local.__name__
    assert (found[2], expected[2]) == (None, None)
    assert found[:2] == pytest.approx(expected[:2], abs=1e-6)
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert ours(prompts=PROMPTS, completions=chats) == found
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2}}}]}]  # no content
    told = [*call, {"role": "tool", "content": 5}]
    odd = [call, [], told]
    expected = local(PROMPTS, odd)
    assert (expected[0] is None, expected[1:]) == (False, [None, None])
    assert ours(PROMPTS, odd) == [pytest.approx(expected[0], abs=1e-6), None, None]
    said = [one.error for one in ours.score(PROMPTS, odd)]
    assert said[0] is None
    assert "the response is empty" in said[1]
    assert said[2] == model.score(PROMPTS, odd)[2].error


def test_openrlhf_gets_a_reward_and_a_score_for_each_query(url, model):
    pad, end = (model.tokenizer.pad_token, model.tokenizer.eos_token)
    queries = [
        f"{PROMPTS[0]}{RESPONSES[0]}{end}{pad}{pad}",
        f"<s>{PROMPTS[1]}{RESPONSES[1]}",
        PROMPTS[0],
    ]
    body = {"query": queries, "prompts": [*PROMPTS[:2], PROMPTS[0]], "labels": ["14", None, 3]}
    status, answer = post(url, body, "/openrlhf")
    expected = [result.score for result in model.score(PROMPTS[:2], RESPONSES[:2])]
    assert status == 200
    assert answer["rewards"] == pytest.approx([*expected, 0.0], abs=1e-6)
    assert answer["scores"] == answer["rewards"]
    assert answer["extra_logs"] == {"unscored": [0.0, 0.0, 1.0]}
    status, sentence = refusal(url, {"query": queries}, "/openrlhf")
    assert (status, "`prompts`: Field required" in sentence) == (422, True)
    assert refusal(url, {"query": queries, "prompts": ["a"]}, "/openrlhf")[0] == 422
    assert refusal(url, {"query": ["a" * 20_001], "prompts": ["a"]}, "/openrlhf")[0] == 413


@pytest.mark.parametrize(
    "case",
    [json.loads(line) for line in (Path(__file__).parent / "corpus" / "openrlhf.jsonl").read_text().splitlines()],
)
def test_openrlhf_queries_are_found_behind_what_decoding_changed(case):
    request = OpenRLHFRequest(query=[case["query"]], prompts=[case["prompt"]])
    if case["response"] is None:
        with pytest.raises(ValueError, match=r"`query\[0\]` does not begin with `prompts\[0\]`"):
            read_openrlhf(request, ["</s>"])
        return
    (row,) = read_openrlhf(request, ["</s>"])
    assert (str(row.prompt), row.response.strip()) == (case["prompt"], case["response"])


def test_openrlhf_is_stopped_by_what_would_be_the_worst_reward(url):
    status, sentence = refusal(url, {"query": ["a cut prompt: 4"], "prompts": ["not a cut prompt: "]}, "/openrlhf")
    assert (status, "`query[0]` does not begin with `prompts[0]`" in sentence) == (422, True)
    small = make_model(max_length=4)
    with running(small) as address:
        body = {"query": [f"{PROMPTS[0]}{RESPONSES[0]}"], "prompts": PROMPTS[:1]}
        status, sentence = refusal(address, body, "/openrlhf")
        assert (status, "None of 1 responses could be scored. First: the prompt and the first" in sentence) == (
            422,
            True,
        )
        body = {"query": PROMPTS[:1], "prompts": PROMPTS[:1]}  # an empty response: the policy wrote nothing
        assert post(address, body, "/openrlhf")[1]["extra_logs"] == {"unscored": [1.0]}


def test_prompts_that_a_template_wrote_are_sent_as_such():
    tokenizer = byte_tokenizer(chat=True, bos=True)
    model = reward_model("token", "llama", tokenizer, chat=True)
    chat = [{"role": "user", "content": "2+3*4?"}]
    rendered = RenderedPrompt(prompt_text(chat, tokenizer, "{prompt}"))
    with running(model) as url:
        expected = model.score([chat], RESPONSES[:1])[0].score
        assert ScoringClient(url).score([rendered], RESPONSES[:1])[0].score == pytest.approx(expected, abs=1e-6)


def test_openrlhf_prompts_are_taken_as_the_policy_sees_them():
    tokenizer = byte_tokenizer(chat=True, bos=True)
    model = reward_model("token", "llama", tokenizer, chat=True)
    chat = [{"role": "user", "content": "2+3*4?"}]
    rendered = prompt_text(chat, tokenizer, "{prompt}")
    expected = model.score([chat], RESPONSES[:1])[0].score
    body = {"query": [f"{rendered}{RESPONSES[0]}<|im_end|>"], "prompts": [rendered], "labels": [None]}
    with running(model, ends=["<|im_end|>"]) as url:
        assert post(url, body, "/openrlhf")[1]["rewards"] == pytest.approx([expected], abs=1e-6)
        assert ScoringClient(url).rewards([chat], RESPONSES[:1]) == pytest.approx([expected], abs=1e-6)
        assert ScoringClient(url).rewards([str(rendered)], RESPONSES[:1]) == [None]  # a text is not a chat
    texts = reward_model("token", "llama", byte_tokenizer(), chat=False, prompt_template="Q: {prompt}\n")
    body = {"query": [f"Q: 2+3*4?\n{RESPONSES[0]}"], "prompts": ["Q: 2+3*4?\n"]}
    with running(texts) as url:
        expected = texts.score(["2+3*4?"], RESPONSES[:1])[0].score
        assert post(url, body, "/openrlhf")[1]["rewards"] == pytest.approx([expected], abs=1e-6)


def test_verl_calls_a_function_that_asks_the_server(url, model, monkeypatch):
    verl = script(Path(__file__).resolve().parent.parent / "recipes" / "remote_reward" / "verl_reward.py")
    call = {"data_source": "openai/gsm8k", "solution_str": RESPONSES[0], "ground_truth": "14"}
    monkeypatch.delenv("FRACTAL_RM_URL", raising=False)
    with pytest.raises(ValueError, match="FRACTAL_RM_URL is not set"):
        verl.compute_score(**call, extra_info={"prompt": PROMPTS[0]})
    monkeypatch.setenv("FRACTAL_RM_URL", url)
    expected = pytest.approx(model.score(PROMPTS[:1], RESPONSES[:1])[0].score, abs=1e-6)
    assert verl.compute_score(**call, extra_info={"prompt": PROMPTS[0], "index": 3}) == expected
    assert verl.compute_score(**call, extra_info={"question": PROMPTS[0]}, sandbox=None) == expected
    assert verl.compute_score(**call | {"solution_str": ""}, extra_info={"prompt": PROMPTS[0]}) == 0.0
    with pytest.raises(ValueError, match="`extra_info` holds no `prompt`"):
        verl.compute_score(**call)


# The command ------------------------------------------------------------------------------------------------------


def test_health_and_schema_describe_the_server(url):
    health = ScoringClient(url).health()
    assert (health["status"], health["model"], health["scorer"], health["aggregation"]) == (
        "ok",
        "rm",
        "token",
        "product",
    )
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request("GET", "/openapi.json")
    schema = json.loads(connection.getresponse().read())
    connection.close()
    assert {"/score", "/openrlhf", "/health"} == set(schema["paths"])
    assert {"400", "401", "403", "413", "422", "503", "504"} <= set(schema["paths"]["/score"]["post"]["responses"])
    assert {"text", "start", "end", "score"} == set(schema["components"]["schemas"]["ScoredStep"]["properties"])


def test_the_command_serves_until_it_is_interrupted(tmp_path, capsys):
    folder = save_reward_model(tmp_path / "rm", scorer="token", chat=True)
    chat = [{"role": "user", "content": "2+3*4?"}]
    port, found = serve_and_ask(
        ["--model", folder], lambda client: [client.health()["model"], *client.rewards([chat], RESPONSES[:1])]
    )
    expected = StepRewardModel.from_pretrained(folder).score([chat], RESPONSES[:1])[0].score
    assert found == ["rm", pytest.approx(expected, abs=1e-6)]
    said = capsys.readouterr().out
    assert f"scores at http://127.0.0.1:{port}/score" in said
    assert said.endswith("\nStopped, after the requests in progress.\n")


def test_a_port_that_is_taken_is_one_sentence(tmp_path, capsys):
    folder = save_reward_model(tmp_path / "rm", scorer="token")
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        capsys.readouterr()
        assert main(["serve", "--model", folder, "--port", port]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fractal-rm: Cannot listen on 127.0.0.1:{port} (")
    assert "in use" in said
    assert main(["serve", "--model", folder, "--max_queued", "5"]) == 2
    assert "less than the 1024 responses that one request may hold" in capsys.readouterr().err
    assert main(["serve", "--model", folder, "--wait", "-1"]) == 2
    assert "`wait` is -1.0" in capsys.readouterr().err
