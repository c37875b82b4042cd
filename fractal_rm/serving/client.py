"""A client of the scoring server: a reward function for any trainer, wherever the reward model runs.

`rewards` needs Python's standard library only, so that it works in the environment of another trainer.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fractal_rm.data.prompts import RenderedPrompt, is_messages

if TYPE_CHECKING:
    from fractal_rm.data.bag import Span, StepScores
    from fractal_rm.data.prompts import Prompt

# Responses per request: more than a forward pass holds; fewer if the server accepts fewer.
_AT_A_TIME = 256
# The server exists and may answer later: it is busy, restarting behind a proxy, or took too long.
_TRY_AGAIN = (502, 503, 504)


class _TooLargeError(ValueError):
    """The server rejects a request of this size."""


class ScoringClient:
    """Scores responses with a server that `fractal-rm serve` started.

    An instance is also a TRL reward function, instead of `FractalReward`:

        GRPOTrainer(..., reward_funcs=[ScoringClient("http://localhost:8000")])

    Args:
        url: Address of the server, without `/score`. Give its token, if any, as the password in the address:
            `http://any:TOKEN@host:8000`.
        timeout: Seconds to wait for a reply of the server.
        retries: Number of further tries if it cannot be reached or is busy.
        pause: Seconds before the first further try; each later one waits twice as long.
    """

    def __init__(self, url: str, *, timeout: float = 90.0, retries: int = 4, pause: float = 0.5) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The server's address is {url!r}. Give one that starts with http:// or https://.")
        scheme, _, rest = url.rstrip("/").partition("://")
        given, _, place = rest.rpartition("@")  # the token is sent, and no message shows it
        token = urllib.parse.unquote(given.partition(":")[2])
        self.url, self.timeout, self.retries, self.pause = f"{scheme}://{place}", timeout, retries, pause
        self.__name__ = "fractal_reward"
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def health(self) -> dict[str, Any]:
        """Which model answers: `model`, `scorer`, `aggregation`, `threshold`, `version`."""
        return self._ask("/health")

    def score(
        self,
        prompts: "Sequence[Prompt]",
        responses: Sequence[str | Sequence[str] | Sequence[Mapping[str, Any]]],
        *,
        spans: "Sequence[Sequence[Span] | None] | None" = None,
    ) -> "list[StepScores]":
        """As `StepRewardModel.score`: scores of every step of every response.

        Raises:
            ValueError: If the server refuses the request, with its sentence.
            ConnectionError: If there is no answer after all tries.
        """
        from fractal_rm.data.bag import Step, StepScores
        from fractal_rm.data.prompts import read_completion

        scored = []
        for given, found in zip(responses, self._results(prompts, responses, spans), strict=True):
            text = given if isinstance(given, str) else found["response"]  # the server joins steps and turns
            if text is None:  # a chat of one message
                text = "" if found["error"] else read_completion(given)
            score = float("nan") if found["score"] is None else found["score"]
            steps = [Step(**step) for step in found["steps"]]
            scored.append(StepScores(text, steps, score, found["truncated_steps"], found["error"]))
        return scored

    def rewards(
        self, prompts: "Sequence[Prompt]", responses: Sequence[str | Sequence[Mapping[str, Any]]]
    ) -> list[float | None]:
        """P(response is good) of each response, a text or a chat; None where it cannot be scored. Raises as `score`."""
        return [found["score"] for found in self._results(prompts, responses, None)]

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        """Score completions (texts, or chats that begin with the assistant) as TRL's trainers call it."""
        return self.rewards(prompts, completions)

    def _results(self, prompts: Any, responses: Any, spans: Any) -> list[dict[str, Any]]:
        if len(prompts) != len(responses):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(responses)} responses. Give one prompt per response."
            )
        if all(isinstance(one, str) or is_messages(one) or not one for one in responses):
            name, responses = "responses", [one or "" for one in responses]  # no message: an empty text
        else:
            name = "steps"
        results = []
        for start in range(0, len(prompts), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            body: dict[str, Any] = {"prompts": list(prompts[part]), name: list(responses[part])}
            if prompts and all(isinstance(prompt, RenderedPrompt) for prompt in prompts):
                body["rendered"] = True
            if spans is not None:
                body["spans"] = list(spans[part])
            results += self._scored(body)
        return results

    def _scored(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Results of a request; one that is too large for the server is halved."""
        try:
            answer = self._ask("/score", body)
        except _TooLargeError:
            half = len(body["prompts"]) // 2
            if not half:
                raise
        else:
            results: Any = answer.get("results") if isinstance(answer, dict) else None
            if not _are_results(results, len(body["prompts"])):
                raise ValueError(
                    f"{self.url}/score answered something other than a result for each response. Give the address of "
                    "`fractal-rm serve`."
                )
            return results
        parts = (
            {name: rows[part] if isinstance(rows, list) else rows for name, rows in body.items()}
            for part in (slice(half), slice(half, None))
        )
        return [result for part in parts for result in self._scored(part)]

    def _ask(self, path: str, body: Any = None) -> Any:
        """The JSON of the server's answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = _sentence(error)
                if error.code not in _TRY_AGAIN:
                    kind = _TooLargeError if error.code == 413 else ValueError
                    raise kind(f"{self.url}{path} refused the request ({error.code}): {reason}") from None
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        raise ConnectionError(
            f"{self.url}{path} gave no answer in {self.retries + 1} tries (last: {reason.rstrip('.')}). "
            "Start `fractal-rm serve` there, or give a longer `timeout`."
        )


def _are_results(given: Any, count: int) -> bool:
    """Whether a server's answer has one complete result per response."""
    keys = {"response", "steps", "score", "truncated_steps", "error"}
    return (
        isinstance(given, list) and len(given) == count and all(isinstance(x, dict) and keys <= x.keys() for x in given)
    )


def _sentence(error: urllib.error.HTTPError) -> str:
    """What the server says about its refusal."""
    with error:
        body = error.read()
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
