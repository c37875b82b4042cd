"""A trained step reward model in use: text in, a score for every step out.

rm = StepRewardModel.from_pretrained("rm")
for scored in rm.score(prompts=["2+3*4?\\n"], responses=["3*4=12.\\n2+12=14."]):
    print(scored.score, [(step.text, step.score) for step in scored.steps])
"""

import logging
import math
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self, cast

import huggingface_hub
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.credit.advantages import GROUP_EPSILON
from fractal_rm.credit.placement import completion_text
from fractal_rm.data.bag import Bag, Span, Step, StepScores
from fractal_rm.data.prompts import (
    Conversation,
    Prompt,
    check_learned_kind,
    check_not_blank,
    check_text,
    is_chat,
    is_messages,
    read_completion,
    yields_names,
)
from fractal_rm.data.segmentation import Segmentation, join_steps
from fractal_rm.errors import reason
from fractal_rm.files import write_atomic
from fractal_rm.objectives.aggregation import aggregate
from fractal_rm.objectives.grades import expected_grades, ordinal_max_log_probs
from fractal_rm.scorers.checkpoint import StepScorer, load_scorer, make_inputs, save_scorer
from fractal_rm.scorers.inputs import Processor, prompt_text, with_context
from fractal_rm.scorers.published import Published, PublishedSettings
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

logger = logging.getLogger(__name__)
# The model card of a folder, which the hub shows first.
CARD = "README.md"
# Warn if the product of typical step scores falls below this: ten times the epsilon that GRPO adds to a group's
# standard deviation. (`python -m benchmarks.evidence.long_responses`)
_SMALL_PRODUCT = 10 * GROUP_EPSILON
# Probabilities below the smallest float32 are rounded to 0, whose logarithm is infinite.
_LEAST_PROBABILITY = torch.finfo(torch.float32).tiny
# For fewer batches a progress bar would only flicker.
_BATCHES_WORTH_A_BAR = 20


class StepRewardModel:
    """Scores every step of a response in one forward pass.

    Args:
        scorer: A likelihood, token or embedding scorer.
        processor: The tokenizer it was trained with, or the sentence encoder of an embedding scorer.
        settings: How text becomes tokens and logits become scores.
        batch_size: Responses per forward pass.
    """

    def __init__(
        self, scorer: StepScorer, processor: Processor, settings: FractalSettings, *, batch_size: int = 32
    ) -> None:
        self.scorer, self.processor, self.settings, self.batch_size = scorer, processor, settings, batch_size
        self._inputs = make_inputs(processor, settings)
        self.card: str | None = None  # the model card of the source folder

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 32,
        published: str | Published | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint that [`FractalTrainer`] saved, or a published process reward model.

        Args:
            path: Folder or hub id.
            device: Device to score on; default: a GPU if there is one.
            batch_size: Responses per forward pass.
            published: How a published model is read, if its configuration and name do not identify it: a name in
                [`~fractal_rm.scorers.published.PUBLISHED`], `trl:SEPARATOR`, or a description.
            kwargs: Passed to `from_pretrained` of the model, such as `dtype`.

        Raises:
            ValueError: If the checkpoint is invalid: a different tokenizer, a missing or random head, an unknown
                version.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        scorer, processor, settings = load_scorer(path, device=device, published=published, **kwargs)
        model = cls(scorer.to(device), processor, settings, batch_size=batch_size)
        if (file := Path(path) / CARD).is_file():
            model.card = file.read_text(encoding="utf-8", errors="replace")
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write an ordinary Hugging Face folder with the `fractal` block, and the model card if there is one."""
        save_scorer(path, self.scorer, self.processor, self.settings)
        if self.card is not None:
            write_atomic(Path(path) / CARD, self.card)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the folder that `save_pretrained` writes to the Hugging Face hub.

        Args:
            repo_id: Target: `name` or `organization/name`; created if it does not exist.
            private: Make it private; default: the organization's setting.
            token: Access token; default: the one from `hf auth login`.

        Returns:
            The URL of the commit.

        Raises:
            ConnectionError: If the hub cannot be reached or refuses; the message says what to do.
        """
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError(
                f"{repo_id} was not uploaded: HF_HUB_OFFLINE is set. Unset it when you have a network, or save the "
                "model and upload its folder later with `hf upload`."
            )
        api = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                done = api.upload_folder(repo_id=made, folder_path=folder, commit_message="Upload a reward model")
            except Exception as error:  # the errors of the HTTP library depend on the version of huggingface_hub
                raise ConnectionError(
                    f"{repo_id} was not uploaded ({reason(error)}). Check the name, the network and `hf auth login`, "
                    "or save the model and upload its folder later with `hf upload`."
                ) from error
        return str(done)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer; None for an embedding scorer, which has none."""
        return None if isinstance(self.processor, SentenceEncoder) else self.processor

    @property
    def segmentation(self) -> Segmentation:
        """How this model cuts responses into steps."""
        return self.settings.segmentation

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise ValueError if a prompt is a chat and the model was trained on texts, or vice versa.

        A model that was built in code, or saved by an older version, does not know its training prompts and accepts
        both.
        """
        check_learned_kind(prompts, self.settings.chat)

    def check_readable(
        self, prompts: Sequence[Prompt], *, chat_template_kwargs: Mapping[str, Any] | None = None, which: str
    ) -> None:
        """Render and encode prompts as scoring does, and refuse prompts for which no response could be scored.

        Args:
            prompts: Texts or chats.
            chat_template_kwargs: As for `score`.
            which: Name of this model in messages.

        Raises:
            ValueError: Gives the number of unreadable prompts, the row of the first, and the reason (the chat
                template's own message if it refuses the prompt).
        """
        self.check_prompts(prompts)
        refused = []
        for row, prompt in enumerate(prompts):
            try:
                check_not_blank(prompt)
                bag = self._bag(prompt, "1", [(0, 1)], chat_template_kwargs)
            except (TypeError, ValueError) as error:
                refused.append(f"row {row}: {error}")
                continue
            if self.tokenizer is not None and not (encoded := self._inputs.encode([bag])[0]).kept_steps:
                refused.append(
                    f"row {row}: the prompt has {encoded.length} tokens, but `max_length` of the reward model is "
                    f"{self.settings.max_length}. Drop it, or train a reward model with a larger `max_length`."
                )
        if refused:
            raise ValueError(f"{which} cannot read {len(refused)} of the first {len(prompts)} prompts. {refused[0]}")

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | Sequence[str] | Sequence[Mapping[str, Any]]],
        *,
        spans: Sequence[Sequence[Span] | None] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[StepScores]:
        """Score every step of every response.

        A response that cannot be scored (empty, not text, or its first step does not fit) does not stop the others: its
        result has the reason in `error`, and a warning is logged.

        Args:
            prompts: Texts or chats, one for each response.
            responses: Texts, cut into steps as in training; lists of steps that are already cut; or chats that begin
                with the assistant, whose turns are cut: tool and user messages in between are context.
            spans: Known steps of text responses, such as `step_spans` of a `Bag`; None for a response to be segmented.
            batch_size: Responses per forward pass; default: the model's setting.
            progress: Show a progress bar; default: only for many responses.
            chat_template_kwargs: Arguments of the chat template in addition to the messages; they override the ones
                used in training.

        Returns:
            One [`StepScores`] for each response, in order.

        Raises:
            TypeError: If prompts or responses are one text instead of a list.
            ValueError: If the numbers of prompts and responses differ; the prompts are chats and the model was trained
                on texts (or vice versa) or its tokenizer has no chat template; or the model was trained on given steps
                and gets a text.
        """
        for name, given in (("prompts", prompts), ("responses", responses)):
            if yields_names(given):
                raise TypeError(f"`{name}` is a {type(given).__name__}. Give a list with one entry for each response.")
        prompts, responses = list(prompts), list(responses)
        if len(prompts) != len(responses) or len(prompts) != len(responses if spans is None else spans):
            given = f"{len(prompts)} prompts came with {len(responses)} responses"
            also = "" if spans is None else f" and {len(spans)} lists of spans"
            raise ValueError(f"{given}{also}. Give one prompt per response.")
        self.check_prompts(prompts)
        texts_are_given = any(isinstance(response, str) or is_messages(response) for response in responses)
        if spans is None and self.segmentation.method == "given" and texts_are_given:
            self.segmentation("")  # no text can be cut: one error instead of one per row
        bags: dict[int, Bag] = {}
        errors: dict[int, str] = {}
        texts: list[Any] = ["" if is_messages(response) else response for response in responses]
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                if is_messages(response):
                    texts[i] = read_completion(response)
                bags[i] = self._bag(prompt, texts[i], None if spans is None else spans[i], chat_template_kwargs)
            except (TypeError, ValueError) as error:
                errors[i] = f"row {i}: {error}"
        encoded = self._inputs.encode(list(bags.values()))
        fitting = {i: bag for i, bag in zip(bags, encoded, strict=True) if bag.kept_steps}
        for i in bags.keys() - fitting.keys():
            errors[i] = (
                f"row {i}: the prompt and the first step exceed `max_length` ({self.settings.max_length} tokens)."
            )
        probs = self._forward(fitting, batch_size or self.batch_size, progress)
        results = []
        for i, response in enumerate(texts):
            if i in errors:
                text = response if isinstance(response, str) else bags[i].response if i in bags else ""
                beyond = len(bags[i].step_spans) if i in bags else 0
                empty = not beyond and spans is None and bool(text) and self._is_without_steps(text)
                results.append(StepScores(text, truncated_steps=beyond, error=errors[i], empty=empty))
                continue
            step_probs, bag_prob = probs[i]
            # Steps that did not fit have no probability.
            steps = [
                Step(text, start, end, score)
                for text, (start, end), score in zip(bags[i].steps, bags[i].step_spans, step_probs, strict=False)
            ]
            text = response if isinstance(response, str) else bags[i].response
            results.append(StepScores(text, steps, bag_prob, fitting[i].num_steps - len(steps)))
        if errors:
            first = errors[min(errors)]
            logger.warning("Not scored: %d of %d responses. First: %s", len(errors), len(results), first)
        truncated = sum(bool(result.steps) and result.truncated_steps > 0 for result in results)
        if truncated:
            logger.warning(
                "%d of %d responses are longer than `max_length`: their last steps are unscored.",
                truncated,
                len(results),
            )
        return results

    def _is_without_steps(self, text: str) -> bool:
        try:
            return self.segmentation.method == "given" or not self.segmentation(text)
        except ValueError:  # a pattern that timed out says nothing about the text
            return False

    def _bag(
        self,
        prompt: Prompt,
        response: str | Sequence[str],
        spans: Sequence[Span] | None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Bag:
        """Cut a response into steps and check it; a chat prompt is rendered by the chat template."""
        if isinstance(response, str):
            if spans is None:
                check_text(response, "the response")
                spans = self.segmentation(response)
        elif isinstance(response, Sequence):
            response, spans = join_steps(response, self.settings.joint or self.segmentation.joint)
        bag, tokenizer = Bag(prompt, cast(str, response), tuple(spans or ()), label=None), self.tokenizer
        if isinstance(self.settings, PublishedSettings):  # its description defines how messages are read
            if isinstance(bag.response, Conversation):
                raise ValueError("the response has several turns, but published reward models read one; give one turn.")
            return bag
        if not is_chat(bag.prompt) or tokenizer is None or not tokenizer.chat_template:
            return bag
        options = {**self.settings.chat_template_kwargs, **(chat_template_kwargs or {})}
        template = self.settings.prompt_template
        text = prompt_text(bag.prompt, tokenizer, template, chat_template_kwargs=options, response=bag.response)
        response = with_context(bag.response, tokenizer, chat_template_kwargs=options)
        return replace(bag, prompt=text, response=response)

    @torch.no_grad()
    def _forward(
        self, bags: dict[int, Any], batch_size: int, progress: bool | None
    ) -> dict[int, tuple[list[float], float]]:
        """Step probabilities and response probability of each bag; batches group bags of similar length."""
        order = sorted(bags, key=lambda i: bags[i].length)
        batches: Iterable[list[int]] = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        count = -(-len(order) // batch_size)
        if progress if progress is not None else count >= _BATCHES_WORTH_A_BAR:
            from rich.progress import track

            batches = track(batches, description="Scoring", total=count)
        device = next(self.scorer.parameters()).device
        training = self.scorer.training
        self.scorer.eval()
        results = {}
        for rows in batches:
            batch = {name: x.to(device) for name, x in self._inputs.pad([bags[i] for i in rows]).items()}
            scores, bag_scores = probabilities(self.scorer(**batch), batch["mask"], self.settings)
            for row, (step_scores, bag_score) in enumerate(zip(scores.tolist(), bag_scores.tolist(), strict=True)):
                results[rows[row]] = (step_scores[: bags[rows[row]].kept_steps], bag_score)
        self.scorer.train(training)
        return results


def probabilities(logits: Tensor, mask: Tensor, settings: FractalSettings) -> tuple[Tensor, Tensor]:
    """Scores in [0, 1] from a scorer's logits.

    Args:
        logits: Step logits (B, S), or (B, S, G) for grades.
        mask: True where a step is real (B, S).
        settings: Gives temperature and aggregation.

    Returns:
        Scores of the steps (B, S) and of the responses (B,): P(good), or the expected grade divided by the highest.
    """
    logits = logits / settings.temperature
    if settings.num_grades is not None:
        highest = settings.num_grades - 1
        # Log-probabilities of a distribution are also logits.
        bag_logits = ordinal_max_log_probs(logits, mask).unsqueeze(1)
        return expected_grades(logits) / highest, expected_grades(bag_logits).squeeze(1) / highest
    bag_logits = aggregate(logits, mask, aggregation=settings.aggregation, sharpness=settings.sharpness)
    return logits.sigmoid(), bag_logits.sigmoid()


def _plain(completion: Any) -> str | None:
    """The text of a completion that is text or one assistant message; None for conversations and tool calls."""
    if isinstance(completion, str):
        return completion
    message = completion[0] if is_messages(completion) and len(completion) == 1 else {}
    content = None if message.get("tool_calls") else message.get("content")
    return content if isinstance(content, str) else None


class FractalReward:
    """A step reward model as a TRL reward function: one number for each completion, P(response is good).

        GRPOTrainer(..., reward_funcs=[FractalReward("rm")])

    Completions that are empty or cannot be scored to their end get None, which TRL leaves out. Only the assistant's
    text is scored, in all of its turns; tool and user messages are context.

    TRL's texts lack special tokens, so the completion is decoded from the token ids that TRL passes, with special
    tokens but without padding and ending, as in `StepPPOTrainer`. This needs the policy's tokenizer: the given one, or
    the reward model's own if it decodes the ids as TRL does. A conversation of several messages is read as TRL gives
    it.

    With `aggregation="product"` that probability shrinks with every step: 150 steps that are good with .88 each leave
    5e-9, and the epsilon that GRPO adds to a group's standard deviation is larger than all differences. `scale="log"`
    returns the logarithm, which ranks responses the same way and keeps differences visible at any length.

    Args:
        reward_model: A [`StepRewardModel`], or the path of one.
        scale: `"probability"`, or `"log"`: log P(response is good), at most 0.
        tokenizer: The policy's tokenizer.
        endings: Ids that a finished completion may end with; None: the tokenizer's EOS and padding.

    Raises:
        ValueError: If `scale` is unknown, or `"log"` is used with a model of grades.
    """

    def __init__(
        self,
        reward_model: StepRewardModel | str | Path,
        *,
        scale: Literal["probability", "log"] = "probability",
        tokenizer: PreTrainedTokenizerBase | None = None,
        endings: Collection[int] | None = None,
    ) -> None:
        if scale not in ("probability", "log"):
            raise ValueError(f"Unknown scale {scale!r}. Choose probability or log.")
        if not isinstance(reward_model, StepRewardModel):
            reward_model = StepRewardModel.from_pretrained(reward_model)
        if scale == "log" and reward_model.settings.num_grades is not None:
            raise ValueError(
                "The reward model scores grades, but `scale='log'` needs probabilities. Leave `scale` out."
            )
        self.reward_model, self.scale, self.tokenizer, self.endings = reward_model, scale, tokenizer, endings
        self._has_warned = self._has_told = False
        self.__name__ = "fractal_reward"

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        """Score completions (texts, or chats that begin with the assistant) as TRL's trainers call it."""
        responses = self._as_written(completions, kwargs.get("completion_ids"))
        scored = self.reward_model.score(prompts, responses, progress=False)
        self._check_product([result for result in scored if result.steps])
        return [self._reward(one) if one.judged and not math.isnan(one.score) else None for one in scored]

    def _as_written(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None) -> list[Any]:
        """Completions; plain ones with their special tokens, if a tokenizer can decode the ids."""
        given = [one or "" for one in completions]
        texts = [_plain(completion) for completion in given]
        if completion_ids is None or all(text is None for text in texts):
            return given
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            tokenizer = self.reward_model.tokenizer
            pairs = [(ids, text) for ids, text in zip(completion_ids, texts, strict=True) if text is not None]
            if tokenizer is None or any(
                tokenizer.decode(list(ids), skip_special_tokens=True) != text for ids, text in pairs
            ):
                self._tell_unread_ids()
                return given
        return [
            one if text is None else completion_text(ids, tokenizer, self.endings)
            for one, ids, text in zip(given, completion_ids, texts, strict=True)
        ]

    def _tell_unread_ids(self) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "Special tokens that the policy writes do not reach the reward model, because its tokenizer cannot "
                "decode the policy's token ids. Give the policy's tokenizer: `FractalReward(..., tokenizer=...)`."
            )

    def _reward(self, scored: StepScores) -> float:
        if self.scale == "probability":
            return scored.score
        # A product of hundreds of steps underflows to 0; the sum of logarithms does not.
        is_product = self.reward_model.settings.aggregation == "product"
        factors = scored.step_scores if is_product else [scored.score]
        return math.fsum(math.log(max(factor, _LEAST_PROBABILITY)) for factor in factors)

    def _check_product(self, scored: Sequence[StepScores]) -> None:
        """Warn once if responses have so many steps that the product of typical scores vanishes."""
        if self._has_warned or self.scale == "log" or self.reward_model.settings.aggregation != "product" or not scored:
            return
        steps = median(len(one.steps) for one in scored)
        usual = median(score for one in scored for score in one.step_scores)
        if usual**steps < _SMALL_PRODUCT:
            self._has_warned = True
            logger.warning(
                "Half of the responses have %g or more steps, and half of the steps a score of %.2f or more: their "
                "product, the reward, is about %.1e, too small for group advantages to show differences. Use "
                "`FractalReward(..., scale='log')`, or a reward model with `aggregation='min'`.",
                steps,
                usual,
                usual**steps,
            )
