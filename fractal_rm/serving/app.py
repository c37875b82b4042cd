"""The scoring server as an ASGI application."""

import asyncio
import logging
import queue
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException

from fractal_rm import __version__
from fractal_rm.data.bag import StepScores
from fractal_rm.files import parse_json
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.serving.access import Access, Gate
from fractal_rm.serving.batching import Batcher
from fractal_rm.serving.connections import server_config
from fractal_rm.serving.limits import BodyLimit, Limits, sentence_body
from fractal_rm.serving.protocol import (
    Health,
    OpenRLHFAnswer,
    OpenRLHFRequest,
    PromptedResponse,
    Refusal,
    ScoreAnswer,
    ScoreRequest,
    read_openrlhf,
    read_request,
    score_responses,
    write_openrlhf,
    write_results,
)

logger = logging.getLogger(__name__)

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "Not HTTP, or the body is not JSON in UTF-8 with each name once"},
    401: {"model": Refusal, "description": "The token is missing or wrong"},
    403: {"model": Refusal, "description": "The `Host` or `Origin` header names another server"},
    408: {"model": Refusal, "description": "The body took too long to arrive"},
    413: {"model": Refusal, "description": "Too long a body, too many responses, characters or values"},
    422: {"model": Refusal, "description": "The JSON does not follow the schema"},
    503: {"model": Refusal, "description": "Too many responses are waiting, or too many bytes or connections are open"},
    504: {"model": Refusal, "description": "Scoring took too long"},
}


# Characters of a path or method in a message.
_SHOWN = 80
# What a JSON schema cannot say.
_RULES = (
    "Rules in addition to the schema. `/score`: give exactly one of `responses` and `steps`; `prompts`, `responses`, "
    "`steps` and `spans` have one entry for each response; `spans` belong to `responses`. `/openrlhf`: as many `query` "
    "as `prompts`, and each query begins with its prompt. Bodies are JSON objects in UTF-8 with each name once, not "
    "compressed, within the server's limits."
)


def make_app(
    reward_model: StepRewardModel,
    *,
    name: str,
    limits: Limits | None = None,
    wait: float = 0.005,
    ends: Sequence[str] = (),
    access: Access | None = None,
) -> FastAPI:
    """A server for a step reward model.

    Args:
        reward_model: The model; its `batch_size` is the most responses in a forward pass.
        name: Its name in `/health`; of a path, the last part.
        limits: Limits of a request.
        wait: Seconds that a response waits for others to share its forward pass.
        access: Which requests are answered; None: those that call the server by a name of this machine.
        ends: Texts to strip from the end of OpenRLHF's responses, in addition to the tokenizer's special tokens.
    """
    limits = limits or Limits()
    tokenizer = reward_model.tokenizer
    ends = [*ends, *(tokenizer.all_special_tokens if tokenizer is not None else [])]
    name = Path(name).name if Path(name).exists() else name

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = Batcher(
            lambda given: score_responses(reward_model, given),
            batch_size=reward_model.batch_size,
            wait=wait,
            max_queued=limits.max_queued,
        )
        app.state.batcher = batcher
        yield
        await asyncio.to_thread(batcher.close)

    # The pages that show the schema would load scripts from other sites.
    app = FastAPI(
        title="fractal-rm",
        description=_RULES,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.router.route_class = _StrictRoute
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Gate, access=access or Access())  # the outermost: before a body is read
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(StarletteHTTPException, _refuse)

    async def scores_of(given: list[PromptedResponse]) -> list[StepScores | Exception]:
        _check_size(given, limits)
        return await _score(app.state.batcher, given, limits.seconds)

    @app.get("/health")
    async def health() -> Health:
        """Which model answers."""
        settings = reward_model.settings
        return Health(
            model=name,
            scorer=settings.scorer,
            aggregation=settings.aggregation,
            threshold=settings.threshold,
            version=__version__,
        )

    @app.post("/score", responses=_REFUSALS)
    async def score(request: ScoreRequest) -> ScoreAnswer:
        """Score every step of every response. A response that cannot be scored does not stop the others."""
        given = read_request(request)
        return ScoreAnswer(results=write_results(given, await scores_of(given)))

    @app.post("/openrlhf", responses=_REFUSALS)
    async def openrlhf(request: OpenRLHFRequest) -> OpenRLHFAnswer:
        """Response scores in the format that OpenRLHF expects of its `remote_rm_url`."""
        try:
            given = read_openrlhf(request, ends)
            return write_openrlhf(given, await scores_of(given))
        except ValueError as error:  # must stop the caller instead of becoming the worst reward
            raise HTTPException(422, str(error)) from error

    return app


class _StrictRequest(Request):
    """A request whose body is read as JSON files are: no name twice in an object, and a sentence if it is not JSON."""

    async def json(self) -> Any:
        try:
            return parse_json(await self.body(), "The body")
        except ValueError as error:
            raise HTTPException(400, str(error)) from None


class _StrictRoute(APIRoute):
    """A route that reads [`_StrictRequest`]."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def run(app: FastAPI, listening: socket.socket, limits: Limits) -> None:
    """Answer requests until the process is told to end; those in progress get `limits.seconds`."""
    uvicorn.Server(server_config(app, limits)).run(sockets=[listening])


def _check_size(given: Sequence[PromptedResponse], limits: Limits) -> None:
    if len(given) > limits.max_responses:
        raise HTTPException(
            413, f"{len(given):,} responses are more than {limits.max_responses:,}. Send fewer at a time."
        )
    characters = sum(one.characters for one in given)
    if characters > limits.max_characters:
        most = f"{limits.max_characters:,}"
        raise HTTPException(413, f"{characters:,} characters are more than {most}. Send fewer responses at a time.")


async def _score(batcher: Batcher, given: Sequence[PromptedResponse], seconds: float) -> list[StepScores | Exception]:
    """Scores of responses, or why there are none, in order."""
    try:
        futures = batcher.submit(given)
    except queue.Full:
        sentence = "Too many responses are waiting. Try again in a second, or send fewer at a time."
        raise HTTPException(503, sentence, headers={"Retry-After": "1"}) from None
    try:
        async with asyncio.timeout(seconds):
            results = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    except TimeoutError:
        sentence = f"Scoring took longer than {seconds:g} seconds. Send fewer responses at a time, or try again later."
        raise HTTPException(504, sentence) from None
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, ValueError | TypeError):
            logger.error("A response could not be scored.", exc_info=result)
    return results  # type: ignore[return-value]


async def _refuse(request: Request, error: Exception) -> Response:
    """Refuse with one sentence; replaces the framework's own texts."""
    assert isinstance(error, StarletteHTTPException)
    # As it was sent, not `request.url`, which cannot be made of every target; what is not printed is left out.
    path = "".join(filter(str.isprintable, request.scope["path"]))[:_SHOWN]
    sentences = {
        404: f"There is no {path} here. /openapi.json says what there is.",
        405: f"{path} takes no {request.method[:_SHOWN]}. /openapi.json says what it takes.",
    }
    sentence = sentences.get(error.status_code, error.detail)
    return _said(error.status_code, sentence, error.headers)


async def _refuse_invalid(request: Request, error: Exception) -> Response:
    """Refuse with one sentence about the first error, without repeating what was sent."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    if found["loc"] == ("body",) and found["type"] == "model_attributes_type" and not _says_json(request):
        sentence = "The body was not read as JSON. Send it with the header `Content-Type: application/json`."
        return _said(422, sentence)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"][1:]).lstrip(".")
    told = found["msg"].removeprefix("Value error, ").rstrip(".")
    sentence = f"{f'`{place}`' if place else 'The request'}: {told}. The schema is at /openapi.json."
    return _said(422, sentence)


def _said(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal in one sentence, of any characters: what was sent may hold half of a surrogate pair."""
    return Response(sentence_body(sentence), status, headers, media_type="application/json")


def _says_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "")
