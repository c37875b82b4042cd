"""Published process reward models, each with a description: where a score is read, from which logits, in which
template.

The description follows the models' published code without running it: no remote code, no class per model. A score is
defined as by the publisher: the probability of the good class or token, or the sigmoid of the value head.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fractal_rm.data.bag import Bag
from fractal_rm.data.prompts import Prompt, RenderedPrompt, is_chat
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.errors import reason
from fractal_rm.objectives.aggregation import Aggregation
from fractal_rm.scorers.base import StepScorer
from fractal_rm.scorers.folder import hub_options
from fractal_rm.scorers.inputs import EncodedBag, TokenInputs
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.scorers.templates import apply_template
from fractal_rm.scorers.token import at_steps, head_class, token_classifier

logger = logging.getLogger(__name__)
# Placeholder for a text while a chat template is rendered; no template or text contains it.
_SLOT = "\ue000{}\ue001"
_Template = Literal["steps", "text", "chat", "turns"]
_Head = Literal["classes", "score", "v_head", "vocabulary"]


@dataclass(frozen=True)
class Published:
    r"""How a published process reward model reads a response.

    Args:
        name: Name in `published=` and `--published`.
        template: `"steps"`: prompt, steps and markers are tokenized one by one; `"text"`: as one text; `"chat"`: the
            marked response is the assistant's message; `"turns"`: each step is a user message, each marker an assistant
            message.
        marker: Text after each step.
        head: Which numbers are read: `"classes"` (a token classifier with two labels), `"score"` (two layers with two
            outputs), `"v_head"` (a value head with one), `"vocabulary"` (the logits of `tokens`).
        tokens: The good and the bad token, for `"vocabulary"`.
        reads_before: Whether the score is read one token before the marker, which it predicts, instead of at the
            marker's last token.
        between: Text between steps in a response. The published code cuts there and drops it; None: it keeps the text.
        blank_steps: Whether the published code marks blank steps too.
        joint: Text between prompt and first step.
        system: System message of a prompt that has none, for `"chat"`.
        aggregation: How step scores become the response's score.
        architectures: Names in `config.json` that identify the model.
        names: Last parts of hub ids, for models whose configuration looks like any language model.
        source: Where the reading is published.
    """

    name: str
    template: _Template
    marker: str
    head: _Head
    source: str
    tokens: tuple[str, str] = ("+", "-")
    reads_before: bool = False
    between: str | None = None
    blank_steps: bool = False
    joint: str = ""
    system: str | None = None
    aggregation: Aggregation = "min"
    architectures: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def segmentation(self) -> Segmentation:
        """How a response is cut: at `between`, or by lines."""
        if self.between in (None, "\n"):
            return Segmentation()
        return Segmentation("separator", separator=self.between)


PUBLISHED = {
    reading.name: reading
    for reading in (
        Published(
            name="trl",
            template="steps",
            marker="\n",
            between="\n",
            head="classes",
            source="`PRMTrainer.tokenize_row` of TRL, whose default `step_separator` is a line break",
        ),
        Published(
            name="qwen-prm",
            template="chat",
            marker="<extra_0>",
            between="\n\n",
            head="score",
            system="Please reason step by step, and put your final answer within \\boxed{}.",
            architectures=("Qwen2ForProcessRewardModel",),
            source="model card of Qwen/Qwen2.5-Math-PRM-7B",
        ),
        Published(
            name="skywork-prm",
            template="steps",
            marker="\n",
            between="\n",
            blank_steps=True,
            joint="\n",
            head="v_head",
            architectures=("Qwen2ForPrmModel",),
            names=("Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "Skywork-o1-Open-PRM-Qwen-2.5-7B"),
            source="SkyworkAI/skywork-o1-prm-inference, `prepare_input` and `PRM_MODEL`",
        ),
        Published(
            name="math-shepherd",
            template="text",
            marker=" \u043a\u0438",
            joint=" ",
            head="vocabulary",
            names=("math-shepherd-mistral-7b-prm",),
            source="model card of peiyi9979/math-shepherd-mistral-7b-prm",
        ),
        Published(
            name="rlhflow",
            template="turns",
            marker="+",
            between="\n\n",
            joint=" ",
            reads_before=True,
            head="vocabulary",
            names=("Llama3.1-8B-PRM-Deepseek-Data", "Llama3.1-8B-PRM-Mistral-Data"),
            source="RLHFlow/RLHF-Reward-Modeling, `math-rm/prm_evaluate.py`",
        ),
    )
}


@dataclass
class PublishedSettings(FractalSettings):
    """Settings of a published model: they include its reading, and are never written to a folder."""

    published: Published = field(default_factory=lambda: PUBLISHED["trl"])


# Names of label 1 that mean a good step.
_GOOD = ("label_1", "1", "good", "correct", "right", "positive", "true", "yes", "+")


def find_reading(path: str | Path, config: dict[str, Any], published: str | Published | None) -> Published | None:
    """The reading of a folder or hub id: the requested one, or the one identified by config and name.

    Args:
        path: Folder or hub id.
        config: Its `config.json`.
        published: A reading or its name, `trl:SEPARATOR` for a `step_separator` other than a line break; None:
            identified from the model.

    Returns:
        The reading; None if none is identified.

    Raises:
        ValueError: If the name is unknown, or the name of label 1 of a token classifier does not mean good.
    """
    if isinstance(published, Published):
        return published
    if published is not None:
        name, colon, separator = published.partition(":")
        if name not in PUBLISHED or (colon and (name != "trl" or not separator)):
            raise ValueError(
                f"Unknown reading {published!r}. `published` is one of {', '.join(PUBLISHED)}, or trl:SEPARATOR."
            )
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        return replace(PUBLISHED[name], marker=separator, between=separator) if separator else PUBLISHED[name]
    architectures = config.get("architectures") or []
    # A snapshot in the hub's cache is in models--owner--name/snapshots/commit.
    parts = {part.rsplit("--", 1)[-1].lower() for part in Path(path).parts}
    parts.add(str(config.get("_name_or_path") or "").rsplit("/", 1)[-1].lower())
    for reading in PUBLISHED.values():
        if set(architectures) & set(reading.architectures) or parts & {name.lower() for name in reading.names}:
            return reading
    labels = {str(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    two = len(labels) in (0, 2)  # transformers omits the default 2
    if two and any(name.endswith("ForTokenClassification") for name in architectures):
        if labels.get("1", "good").lower() not in _GOOD:
            raise ValueError(
                f"{path} is a token classifier with the labels {labels}, and label 1 would be read as good. Give "
                "`published='trl'` if it is a reward model and label 1 is good; otherwise give another model."
            )
        return PUBLISHED["trl"]
    return None


def load_published(
    path: str | Path, reading: Published, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> tuple[StepScorer, FractalSettings]:
    """The scorer of a published model, in evaluation mode, and settings to use it with.

    Args:
        path: Folder or hub id.
        reading: How it is read.
        tokenizer: Its tokenizer.
        kwargs: Passed to `from_pretrained` of the model, such as `dtype`.

    Raises:
        ValueError: If weights of the head or the body are missing, or the tokenizer lacks the marker or the tokens.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub_options(kwargs))
        kind: Any = _model_class(config, reading)
        options = {} if reading.head == "vocabulary" else {"num_labels": 1 if reading.head == "v_head" else 2}
        model, info = kind.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options, **kwargs
        )
    except Exception as error:  # damaged files make libraries raise anything
        raise ValueError(
            f"{path} cannot be loaded as the published model {reading.name} ({reason(error)}). Give a folder with its "
            "configuration and safetensors weights (weights in .bin files are not read: convert them once with "
            "`save_pretrained`), or another `published`."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path}: {len(missing)} weights of the published model {reading.name} are missing and would be random "
            f"(first: {missing[0]}). Give the published folder, or the right `published`."
        )
    ids = [_last_id(token, tokenizer) for token in reading.tokens] if reading.head == "vocabulary" else []
    if reading.head == "vocabulary" and (len(set(ids)) < len(ids) or tokenizer.unk_token_id in ids):
        raise ValueError(f"{path}: its tokenizer lacks the tokens {reading.tokens} of {reading.name}.")
    if reading.template == "chat" and len(tokenizer(reading.marker, add_special_tokens=False)["input_ids"]) != 1:
        raise ValueError(
            f"{path}: its tokenizer has no token {reading.marker}, at which {reading.name} is read. Restore the "
            "published tokenizer files."
        )
    if reading.template in ("chat", "turns") and not tokenizer.chat_template:
        raise ValueError(f"{path}: its tokenizer has no chat template, but {reading.name} needs one.")
    logger.warning(
        "%s is read as the published model %s: %r after each step, steps cut at %r (%s). Give `published` if it is "
        "another.",
        path,
        reading.name,
        reading.marker,
        reading.between or "\n",
        reading.source,
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    settings = PublishedSettings(
        scorer="token",
        aggregation=reading.aggregation,
        segmentation=reading.segmentation,
        max_length=positions,
        published=reading,
    )
    return PublishedScorer(model, ids).eval(), settings


def _model_class(config: Any, reading: Published) -> Any:
    if reading.head == "vocabulary":
        return AutoModelForCausalLM
    if reading.head == "classes":
        known = type(config) in AutoModelForTokenClassification._model_mapping
        return AutoModelForTokenClassification if known else token_classifier(config)
    return head_class(type(config), reading.head, _two_layers if reading.head == "score" else _ValueHead)


def _two_layers(config: Any) -> nn.Module:
    width = config.get_text_config().hidden_size
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.num_labels))


class _ValueHead(nn.Module):
    """One linear layer with the name of TRL's value heads; their dropout is off when they score."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.summary = nn.Linear(config.get_text_config().hidden_size, 1)

    def forward(self, states: Tensor) -> Tensor:
        return self.summary(states.to(self.summary.weight.dtype))


class PublishedScorer(StepScorer):
    """Step logit = the difference of two logits (good minus bad), or the output of a value head.

    Args:
        model: The model.
        token_ids: The good and the bad token, if logits are over the vocabulary; empty: a head's outputs.
    """

    def __init__(self, model: PreTrainedModel, token_ids: Sequence[int] = ()) -> None:
        super().__init__(model)
        self.token_ids = list(token_ids)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S) in float32 from tensors of [`PublishedInputs.pad`]; `step_ends` is where scores are
        read."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.token_ids:
            # The head only gets the states at steps: vocabulary logits at all tokens would fill the memory.
            head: Any = self.base.get_output_embeddings()
            handle = head.register_forward_pre_hook(lambda module, args: (at_steps(args[0], step_ends), *args[1:]))
            try:
                found = self.model(**inputs).logits.float()
            finally:
                handle.remove()
            good, bad = self.token_ids
            return found[..., good] - found[..., bad]
        found = at_steps(self.model(**inputs).logits, step_ends).float()
        return found.squeeze(-1) if found.size(-1) == 1 else found[..., 1] - found[..., 0]


# Text -> tokens -------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A piece of the input; `reads`: a step's score is read at its last token, or before its first."""

    text: str
    is_template: bool  # from the publisher, not from policy or user: its special tokens are intended
    reads: bool = False


@dataclass(frozen=True)
class PublishedInputs(TokenInputs):
    """Converts text to a published model's input, with its template, markers and separators."""

    @property
    def reading(self) -> Published:
        """The description."""
        assert isinstance(self.settings, PublishedSettings)
        return self.settings.published

    def encode(self, bags: Sequence[Bag]) -> list[EncodedBag]:
        """As [`TokenInputs.encode`]; a step ends at the token where its score is read.

        Raises:
            ValueError: If a prompt cannot be put into the published template.
        """
        return [self._encode_bag(bag) for bag in bags]

    def _encode_bag(self, bag: Bag) -> EncodedBag:
        reading, tokenizer = self.reading, self.tokenizer
        pieces = list(_pieces(bag, reading))
        if reading.template == "steps":
            ids, reads = _by_parts(self._parts(bag, pieces), tokenizer)
        elif reading.template == "text":
            ids, reads = _as_text(self._parts(bag, pieces), tokenizer, special=True)
        else:
            ids, reads = _as_text(self._messages(bag, pieces), tokenizer, special=False)
        ends = [first - 1 if reading.reads_before else last for first, last in reads]
        room = len(ids) if self.settings.max_length is None else self.settings.max_length
        # Text after the last score is left out: these models are causal.
        kept = [end for end, (_, last) in zip(ends, reads, strict=True) if max(end, last) < room]
        ids = ids[: (reads[len(kept) - 1][1] + 1 if kept else 0)]
        return EncodedBag(ids, [-1] * len(ids), kept, len(bag.step_spans))

    def _parts(self, bag: Bag, pieces: list[tuple[str, bool]]) -> Iterator[_Part]:
        """The parts of a text without roles: question, then each piece of the response with its marker."""
        bos, is_rendered = str(self.tokenizer.bos_token or ""), isinstance(bag.prompt, RenderedPrompt)
        question = _question(bag.prompt, self.reading)[1]
        if self.reading.template == "steps" and not (is_rendered and question.startswith(bos)):
            yield _Part(bos, True)  # a text gets its BOS from the tokenizer
        yield _Part(question + self.reading.joint, is_rendered)
        for text, is_step in pieces:
            yield _Part(text, False)
            yield _Part(self.reading.marker, True, is_step)

    def _messages(self, bag: Bag, pieces: list[tuple[str, bool]]) -> list[_Part]:
        """The parts of a chat: its template is rendered once with slots, which separate template from text."""
        reading = self.reading
        system, question = _question(bag.prompt, reading)
        texts: list[_Part] = []

        def slot(text: str, *, marker: bool = False, reads: bool = False) -> str:
            texts.append(_Part(text, marker, reads))
            return _SLOT.format(len(texts) - 1)

        messages = [] if system is None else [{"role": "system", "content": slot(system)}]
        if reading.template == "chat":
            messages.append({"role": "user", "content": slot(question)})
            content = "".join(slot(text) + slot(reading.marker, marker=True, reads=step) for text, step in pieces)
            messages.append({"role": "assistant", "content": content})
        else:
            for number, (text, step) in enumerate(pieces):
                text = text if number else question + reading.joint + text
                messages.append({"role": "user", "content": slot(text)})
                messages.append({"role": "assistant", "content": slot(reading.marker, marker=True, reads=step)})
        parts = _filled(self._render(messages), texts)
        plain = [message | {"content": _with_texts(message["content"], texts)} for message in messages]
        expected = self._render(plain)
        if "".join(part.text for part in parts) != expected:  # a template that trims its messages
            parts = _filled(self._render(messages), [part._replace(text=part.text.strip()) for part in texts])
        if "".join(part.text for part in parts) != expected:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path} changes the texts of messages, so the steps of "
                f"{reading.name} cannot be found in it; use the published tokenizer files."
            )
        return parts

    def _render(self, messages: list[dict[str, str]]) -> str:
        return apply_template(self.tokenizer, messages, {})


def _question(prompt: Prompt, reading: Published) -> tuple[str | None, str]:
    """The system message, if any, and the question of a prompt.

    Raises:
        ValueError: If it is a text that a chat template wrote, or a chat of more than one question.
    """
    if isinstance(prompt, RenderedPrompt) and reading.head != "classes":
        raise ValueError(
            f"the prompt was rendered by a chat template, but {reading.name} puts the question into its own template; "
            "give the question as text or as messages."
        )
    if not is_chat(prompt):
        return reading.system, prompt
    given = [message for message in prompt if message["role"] == "system"]
    asked = [message for message in prompt if message["role"] != "system"]
    if len(given) > 1 or len(asked) != 1 or asked[0]["role"] != "user":
        raise ValueError(
            f"the prompt is a chat of {len(prompt)} messages, but {reading.name} reads one question; give one user "
            "message, with or without a system message."
        )
    question = asked[0]["content"]
    if not given or reading.template == "chat":
        return (given[0]["content"] if given else reading.system), question
    # These templates have no roles: a system message becomes part of the question.
    return None, f"{given[0]['content']}\n{question}"


def _pieces(bag: Bag, reading: Published) -> Iterator[tuple[str, bool]]:
    """The texts before the markers, as the published code cuts them, and whether each marker belongs to a step."""
    response, between, spans, start = bag.response, reading.between, bag.step_spans, 0
    for number, (first, end) in enumerate(spans):
        if between is None:  # nothing is removed
            yield response[start:end], True
            start = end
            continue
        *blank, lead = response[start:first].split(between)
        if any(text.strip() for text in blank):  # text that is not a step is kept in place
            blank, lead = [], response[start:first]
        if reading.blank_steps:
            yield from ((text, False) for text in blank)
        is_last = number + 1 == len(spans)
        gap = response[end : len(response) if is_last else spans[number + 1][0]]
        tail, separator, _ = gap.partition(between)
        if tail.strip():
            tail = separator = ""
        elif not separator and not is_last:  # white space that the published code would not cut at
            tail, separator = "", gap
        yield lead + response[first:end] + tail, True
        start = end + len(tail) + len(separator)


def _filled(rendered: str, texts: list[_Part]) -> list[_Part]:
    """A rendered template, cut at its slots, with the texts in them."""
    parts = []
    for number, text in enumerate(texts):
        before, _, rendered = rendered.partition(_SLOT.format(number))
        parts += [_Part(before, True), text]
    return [*parts, _Part(rendered, True)]


def _with_texts(content: str, texts: list[_Part]) -> str:
    for number, text in enumerate(texts):
        content = content.replace(_SLOT.format(number), text.text)
    return content


def _last_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer(text, add_special_tokens=False)["input_ids"][-1])


def _ids(part: _Part, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    options: dict[str, Any] = {} if part.is_template else {"split_special_tokens": True}
    return list(tokenizer(part.text, add_special_tokens=False, **options)["input_ids"]) if part.text else []


_Reads = list[tuple[int, int]]  # first and last token of each marker where a score is read


def _by_parts(parts: Iterator[_Part], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], _Reads]:
    """Tokenize each part separately."""
    ids: list[int] = []
    reads = []
    for part in parts:
        start = len(ids)
        ids += _ids(part, tokenizer)
        if part.reads:
            reads.append((start, len(ids) - 1))
    return ids, reads


def _as_text(
    parts: Iterator[_Part] | list[_Part], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], _Reads]:
    """All parts tokenized as one text, as in the published code; separately if a text spells special tokens."""
    parts = list(parts)
    named = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not tokenizer.is_fast or any(name in part.text for part in parts if not part.is_template for name in named):
        bos: Any = tokenizer.bos_token_id
        prefix = [bos] if special and bos is not None else []
        ids, reads = _by_parts(iter(parts), tokenizer)
        return prefix + ids, [(first + len(prefix), last + len(prefix)) for first, last in reads]
    tokens = tokenizer("".join(part.text for part in parts), add_special_tokens=special, return_offsets_mapping=True)
    offsets, reads, end, token = tokens["offset_mapping"], [], 0, 0
    for part in parts:
        end += len(part.text)
        if part.reads:
            # Use the marker's own characters: a space before it may belong to another part's token.
            first_character, last_character = end - len(part.text.lstrip()), end - 1
            while not offsets[token][0] <= first_character < offsets[token][1]:
                token += 1
            first = token
            while not offsets[token][0] <= last_character < offsets[token][1]:
                token += 1
            while token + 1 < len(offsets) and offsets[token + 1][0] <= last_character < offsets[token + 1][1]:
                token += 1  # the last byte of a multi-token character
            reads.append((first, token))
    return list(tokens["input_ids"]), reads
