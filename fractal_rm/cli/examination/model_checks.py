"""`fractal-rm doctor` on the user's own models and rows: from the tokenizer to the plan of a run."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fractal_rm.cli.checks import check_models, hide_loading_bars, load_reward_model
from fractal_rm.cli.examination.findings import Examination, Finding
from fractal_rm.cli.options.arguments import DataArguments
from fractal_rm.cli.plan import GIGABYTE, PlanArguments, is_size, read_gpu, read_run, stage_hours, verdict
from fractal_rm.credit.placement import (
    REPLACEMENT,
    completion_text,
    place_step_rewards,
    step_end_tokens,
    token_end_characters,
)
from fractal_rm.data.bag import Bag
from fractal_rm.data.prompts import Conversation, Prompt, is_chat
from fractal_rm.data.readers import naming, read_bags
from fractal_rm.data.segmentation import Segmentation, gaps, warn_of_uncut_responses
from fractal_rm.data.shapes import standard_row
from fractal_rm.ppo.checks import check_chat_template, check_prompt_lengths
from fractal_rm.ppo.plan import GPUS
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.model_setup import make_trainable
from fractal_rm.scorers.checkpoint import is_causal, load_tokenizer, make_inputs
from fractal_rm.scorers.published import PublishedSettings, find_reading
from fractal_rm.scorers.settings import FractalSettings

# Rows to check without `limit`; responses to score, and prefixes of each.
_ROWS, _SCORED, _PREFIXES = 256, 8, 8
# Maximum difference of logits, relative to 1 plus their size: rounding of float32, and of half precision.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Rows with a response have one of these columns; `gpu` names this machine's card so.
_RESPONSES = {"completion", "response", "steps", "completions", "chosen", "rejected"}
THIS = "this"


@dataclass
class DoctorArguments(PlanArguments):
    """Arguments of `fractal-rm doctor`: models, and the options that a plan depends on."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Step reward model, or the language model to train one from; with `reward_model`, the policy. A "
            "folder or hub id. Without it, versions and device are checked."
        },
    )
    reward_model: str = field(
        default="policy",
        metadata={"help": "Step reward model of the policy: folder or hub id; `policy`: `model` is it; `none`: none."},
    )
    published: str | None = field(
        default=None,
        metadata={"help": "Format of the reward model, if it is a published one whose files do not tell."},
    )
    gpu: str = field(
        default=THIS,
        metadata={"help": f"Memory such as 24GB, or a card: {', '.join(GPUS)}; `{THIS}`: that of this machine."},
    )


class Patients(NamedTuple):
    """The models to check."""

    reward: StepRewardModel | None
    tokenizer: PreTrainedTokenizerBase | None  # of the policy; None with a sentence encoder
    config: Any  # of the policy


class Rows(NamedTuple):
    """Prompts, and the responses to them if there are any."""

    prompts: list[Prompt]
    bags: list[Bag]


def check_arguments(arguments: DoctorArguments, data: DataArguments) -> None:
    """Raise ValueError if there are rows but no model to check them with."""
    given = data.train_file or data.dataset_name or data.dataset_format or arguments.reward_model != "policy"
    if given and arguments.model is None:
        raise ValueError("Rows and a reward model are checked together with a `model`. Give one.")


def examine(examination: Examination, arguments: DoctorArguments, data: DataArguments) -> None:
    """Run the checks of models and rows; none without a model."""
    if arguments.model is None:
        return
    patients = examination.check("models", load_patients, arguments)
    if patients is not None:
        rows = examination.check("rows", read_rows, data, patients)
        if rows is not None:
            _examine_rows(examination, patients, rows)
    examination.check("plan", check_plan, arguments)


def _examine_rows(examination: Examination, patients: Patients, rows: Rows) -> None:
    reward, policy, _ = patients
    examination.check("prompts", check_prompts, patients, rows.prompts)
    if not rows.bags:
        return
    segmentation = Segmentation() if reward is None else reward.segmentation
    examination.check("segmentation", check_segmentation, rows.bags, segmentation)
    own = None if reward is None else reward.tokenizer
    if own is not None and own is not policy:
        examination.check("tokenizer", check_round_trip, rows.bags, own, "the reward model")
    if policy is not None:
        whose = "the model" if own is policy else "the policy"
        examination.check("tokenizer", check_round_trip, rows.bags, policy, whose)
        examination.check("placement", check_placement, rows.bags, policy, segmentation)
    if reward is not None:
        examination.check("one pass", check_one_pass, rows.bags, reward)


# Models and rows ------------------------------------------------------------------------------------------------------


def load_patients(arguments: DoctorArguments) -> Finding:
    """Load the reward model, and the tokenizer and configuration of the policy.

    Raises OSError if a folder is missing, ValueError if a model is damaged or of the wrong kind.
    """
    model, named = str(arguments.model), arguments.reward_model
    is_policy = named not in ("policy", "none") and not is_size(named)
    check_models(model, named if is_policy else None)
    hide_loading_bars()
    if not (is_policy or named == "policy"):
        return Finding(f"{model} has a tokenizer.", Patients(None, load_tokenizer(model), _config(model)))
    reward, what = load_scoring(named if is_policy else model, arguments.published)
    if not is_policy:
        config = None if reward.tokenizer is None else reward.scorer.base.config
        return Finding(what, Patients(reward, reward.tokenizer, config))
    return Finding(f"{what} {model} has a tokenizer.", Patients(reward, load_tokenizer(model), _config(model)))


def load_scoring(path: str, published: str | None) -> tuple[StepRewardModel, str]:
    """A reward model, or what `fractal-rm train` would start from by default, and a sentence that says which of the
    two.

    Raises ValueError if the model cannot be used.
    """
    known = PreTrainedConfig.get_config_dict(path)[0]
    if "fractal" in known or find_reading(path, known, published) is not None:
        return load_reward_model(path, published=published), f"{path} is a step reward model and loads."
    kind = "likelihood" if is_causal(_config(path)) else "token"
    settings = FractalSettings(scorer=kind)
    # Nothing is trained: the configuration only determines how a model is loaded.
    config = FractalConfig("unused", use_cpu=True, bf16=False)
    scorer, processor, settings = make_trainable(path, config, settings, None, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = StepRewardModel(scorer.to(device).eval(), processor, settings)
    return model, f"{path} loads as the start of a step reward model (scorer {kind})."


def _config(path: str) -> Any:
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def read_rows(data: DataArguments, patients: Patients) -> Finding:
    """Read rows as `train` does or, if they hold only prompts, as `ppo` does; errors name the row."""
    found = replace(data, limit=data.limit or _ROWS).read("train")
    if found is None:
        return Finding(
            "No rows are given, so how the models read them is not checked. Give `train_file` or `dataset_name`.",
            status="warn",
        )
    rows, source = found
    settings = FractalSettings() if patients.reward is None else patients.reward.settings
    if data.dataset_format is None:
        with naming(source, 1):
            answered = _RESPONSES & standard_row(rows[0], data.columns).keys()
        if not answered:
            prompts = [row.get("prompt") for row in data.prompts(rows, source)]
            says = f"{source}: {len(prompts)} prompts without responses; steps are checked where there are responses."
            return Finding(says, Rows(prompts, []), "warn")
        options = {"columns": data.columns, "num_grades": settings.num_grades}
        rows = read_bags(rows, settings.segmentation, source=source, require_label=False, **options)
    steps = sum(len(bag.step_spans) for bag in rows)
    return Finding(f"{source}: {len(rows)} responses, {steps} steps.", Rows([bag.prompt for bag in rows], list(rows)))


# Checks ---------------------------------------------------------------------------------------------------------------


def check_prompts(patients: Patients, prompts: Sequence[Prompt]) -> Finding:
    """Check that reward model and policy can read the prompts; a ValueError counts the others and explains the
    first."""
    reward, tokenizer, config = patients
    if reward is not None:
        reward.check_readable(prompts, which="The reward model")
    if tokenizer is not None and not (reward is not None and isinstance(reward.settings, PublishedSettings)):
        if any(map(is_chat, prompts)):
            check_chat_template("the policy", tokenizer)
        check_prompt_lengths(config, lambda: tokenizer, Dataset.from_dict({"prompt": list(prompts)}))
    return Finding(f"All {len(prompts)} can be read.")


def check_segmentation(bags: Sequence[Bag], segmentation: Segmentation) -> Finding:
    """Check that steps and gaps reproduce each response (ValueError), and that the model cuts the same steps
    (warning)."""
    for number, bag in enumerate(bags, 1):
        between = gaps(bag.response, bag.step_spans)
        if "".join(chain.from_iterable(zip_longest(between, bag.steps, fillvalue=""))) != bag.response:
            raise ValueError(f"Response {number}: its steps do not give back its text. Restore its columns.")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_uncut_responses([(bag.response, bag.step_spans) for bag in bags], segmentation)
    if told:
        return Finding(str(told[0].message), status="warn")
    if segmentation.method == "given":
        return Finding("Steps are given; they and their gaps give back each response.")
    other = [number for number, bag in enumerate(bags, 1) if segmentation(bag.response) != list(bag.step_spans)]
    if other:
        return Finding(
            f"{len(other)} of {len(bags)} responses (first: number {other[0]}) have other steps than "
            f"`segmentation={segmentation.method}` cuts, by which completions are cut. Choose the segmentation that "
            "cuts as the rows do.",
            status="warn",
        )
    return Finding(f"Steps and gaps give back each response; `{segmentation.method}` cuts the same steps.")


def check_round_trip(bags: Sequence[Bag], tokenizer: Any, whose: str) -> Finding:
    """Check that encoding and decoding preserve each response; a tokenizer that loses text may lose a minus sign."""
    changed = []
    for number, bag in enumerate(bags, 1):
        text = completion_text(_ids(bag.response, tokenizer), tokenizer)
        if text != bag.response:
            changed.append((number, str(bag.response), text))
    if not changed:
        return Finding(f"Encoding and decoding with the tokenizer of {whose} changes no response.")
    number, before, after = changed[0]
    pairs = zip(before, after, strict=False)
    place = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
    return Finding(
        f"Encoding and decoding with the tokenizer of {whose} changes {len(changed)} of {len(bags)} responses (first: "
        f"number {number}, at character {place}: {before[place : place + 12]!r} becomes "
        f"{after[place : place + 12]!r}). No score can depend on what is lost: use another tokenizer if it matters.",
        status="warn",
    )


def check_placement(bags: Sequence[Bag], tokenizer: Any, segmentation: Segmentation) -> Finding:
    """Check that the reward of every step lands on the policy's token that completes the step.

    Placement counts characters; this check counts them independently, by decoding all tokens up to that one and up to
    the one before it. A ValueError names the first step whose reward lies elsewhere, or nowhere.
    """
    steps, shared, pieces = 0, 0, {}
    for number, bag in enumerate(bags, 1):
        ids = _ids(bag.response, tokenizer)
        text = completion_text(ids, tokenizer)
        is_own = segmentation.method == "given" or isinstance(bag.response, Conversation)
        if is_own and text != bag.response:
            continue  # these steps belong to another text
        spans = bag.step_spans if is_own else segmentation(text)
        ends = step_end_tokens(token_end_characters(ids, tokenizer, pieces), spans)
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        placed = place_step_rewards([[1.0] * len(ends)], [ends], mask)
        for step, ((_, stop), token) in enumerate(zip(spans, ends, strict=True), 1):
            if token is None or not _length(ids[:token], tokenizer) < stop <= _length(ids[: token + 1], tokenizer):
                where = "on no token" if token is None else f"on token {token + 1}, which does not complete the step"
                raise ValueError(
                    f"Response {number}: the reward of step {step} is placed {where}. Such steps would be paid for "
                    "nothing: use another tokenizer, and please report it."
                )
        total = placed.rewards.sum().item()
        if total != len(spans):
            raise ValueError(f"Response {number}: {len(spans)} rewards of 1 come to {total:g} on tokens. Report it.")
        steps, shared = steps + len(spans), shared + len(spans) - len(set(ends))
    also = f"; {shared} share a token with another step, where their rewards add up" if shared else ""
    return Finding(f"The rewards of {steps} steps lie on the tokens that complete the steps{also}.")


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def _length(ids: Sequence[int], tokenizer: Any) -> int:
    """Number of complete characters in an unfinished text."""
    return len(completion_text(ids, tokenizer, endings=()).rstrip(REPLACEMENT))


@torch.no_grad()
def check_one_pass(bags: Sequence[Bag], reward: StepRewardModel) -> Finding:
    """Check that one pass over a response gives the logits of its prefixes: no step may see later ones.

    A ValueError names the step that differs most, or a response that cannot be scored.
    """
    if reward.tokenizer is None or not is_causal(reward.scorer.base.config):
        return Finding("Does not apply: this model reads a complete response before it scores any step.")
    chosen = [bag for bag in bags if not isinstance(bag.response, Conversation)][:_SCORED]
    if not chosen:
        return Finding("Not checked: all responses are conversations.")
    inputs = make_inputs(reward.processor, reward.settings)
    encoded = inputs.encode(chosen)
    most = f"`max_length` ({reward.settings.max_length} tokens)"
    empty = next((number for number, one in enumerate(encoded, 1) if not one.kept_steps), None)
    if empty is not None:
        raise ValueError(f"Response {empty}: prompt and first step exceed {most}. Drop such rows, or train with more.")
    whole = _logits(reward, inputs.pad(encoded))
    apart: dict[tuple[int, int], float] = {}
    for row, (bag, one) in enumerate(zip(chosen, encoded, strict=True)):
        for step in range(min(one.kept_steps, _PREFIXES)):
            prefix = bag.response[: bag.step_spans[step][1]]
            part = Bag(bag.prompt, prefix, bag.step_spans[: step + 1], label=None)
            alone = _logits(reward, inputs.pad(inputs.encode([part])))[0, step]
            apart[row, step] = ((whole[row, step] - alone).abs() / (1 + alone.abs())).max().item()
    row, step = max(apart, key=lambda place: (math.isnan(apart[place]), apart[place]))
    worst = apart[row, step]
    if not worst <= _TOLERANCE.get(next(reward.scorer.parameters()).dtype, _TOLERANCE[torch.float32]):
        raise ValueError(
            f"Response {row + 1}: step {step + 1} scores differently in one pass and as the end of its prefix (logits "
            f"differ by {worst:.1e} of their size). The model looks ahead, or attention ignores the mask: load it with "
            "`attn_implementation='eager'` and compare."
        )
    cut = sum(one.kept_steps < one.num_steps for one in encoded)
    if cut:
        says = f"{cut} of {len(encoded)} responses exceed {most}, so their last steps have no score. Train with more."
        return Finding(says, status="warn")
    return Finding(f"{len(apart)} steps score as the ends of their prefixes do (logits within {worst:.1e}).")


def _logits(reward: StepRewardModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(reward.scorer.parameters()).device
    return reward.scorer(**{name: tensor.to(device) for name, tensor in batch.items()})


def check_plan(arguments: DoctorArguments) -> Finding:
    """Memory and hours on the GPU, as `fractal-rm plan` computes them; raises ValueError if a named GPU is too
    small."""
    if arguments.gpu == THIS and not torch.cuda.is_available():
        return Finding("There is no GPU here to plan a run for. Give `gpu`, such as 24GB.", status="warn")
    name = arguments.gpu
    if name == THIS:
        card = torch.cuda.get_device_properties(0)
        known = [one for one in GPUS if one.split("-")[0] in card.name]
        name = known[-1] if known else f"{card.total_memory / GIGABYTE:.0f}GB"
    gpu = read_gpu(name, arguments.teraflops)
    try:
        run = read_run(arguments)
    except ValueError as error:  # a model that the formulas do not cover
        return Finding(str(error), status="warn")
    says = verdict(arguments, run, gpu)
    hours = sum(stage_hours(arguments, run, gpu).values())
    lengths = f"prompts of {arguments.prompt_length} and completions of {arguments.max_completion_length} tokens"
    if not says.startswith("Fits"):
        large = says.partition("; ")[0]
        raise ValueError(f"{large} on {name}, with {lengths}. `fractal-rm plan` says what would help.")
    return Finding(f"{says} About {hours:.1f} hours on {name}, with {lengths}: see `fractal-rm plan`.")
