"""One run: an arm trains a policy on a task with a seed, and the policy is measured at fixed numbers of rollouts.

It measures accuracy on held-out problems, the score by the policy's own reward, and the distance from the start.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerState

from fractal_rm.files import made_once, write_atomic
from fractal_rm.hf.checkpoints import resume_or_clear
from fractal_rm.hf.progress import bar_on_terminal
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import FractalReward, StepRewardModel
from fractal_rm.study.arms import Arm, Assets, Options
from fractal_rm.study.rivals import WholeResponseReward
from fractal_rm.tasks.group_sampling import sample_groups
from fractal_rm.tasks.task import Problem, Task, sample_responses, unseen

# Shares of the updates after which a policy is measured.
POINTS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
# Held-out responses for estimating the distance from the base policy.
KL_RESPONSES = 64
# Seed of the samples: every arm and evaluation draws with the same one.
SAMPLING_SEED = 7
BATCH = 256
# Maximum logits in memory at a time: with a large vocabulary, batches hold fewer responses.
_MOST_LOGITS = 2**28

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """The amount of work in a run."""

    rollouts_per_update: int = 64  # completions in an update
    held_out: int = 256  # problems for measuring the policy
    draws: int = 1  # sampled responses per problem
    updates: int | None = None  # policy updates; None: the task's
    points: tuple[float, ...] = POINTS  # shares of the updates at which to measure, in addition to the start


def run_arm(
    arm: Arm, options: Options, assets: Assets, budget: Budget, report: Callable[[Metrics], None], folder: Path
) -> None:
    """Train a policy with an arm's rewards and report its metrics at each evaluation point, including the start.

    `options` are the settings of [`StepPPOConfig`] chosen for the arm. If a stopped run left a checkpoint in `folder`,
    training continues from it.
    """
    task, kind = assets.task, arm.judge
    updates, rollouts = budget.updates or task.updates, budget.rollouts_per_update
    judge = assets.reward_model(kind) if kind else None
    held_out = task.problems("held_out", budget.held_out, assets.seed)
    count = updates * rollouts // assets.ppo["num_generations"]
    problems = unseen(task.problems("train", 2 * count, assets.seed), {problem.prompt for problem in held_out})
    (reference, tokenizer), clock, cost = assets.load_policy(), Clock(folder / "seconds.json"), assets.cost(kind)
    parts = -(-rollouts // assets.micro_batch)
    trainer = make_trainer(
        arm,
        assets.ppo
        | {"max_completion_length": task.max_new_tokens}
        | options
        | {"max_steps": updates, "per_device_train_batch_size": rollouts // parts, "seed": assets.seed}
        | ({"gradient_accumulation_steps": parts, "steps_per_generation": parts} if parts > 1 else {}),
        assets.policy(),
        judge,
        assets.outcome(arm, judge),
        [problem.prompt for problem in problems[:count]],
        folder,
        # A reward model that keeps learning also trains on its original responses.
        responses=assets.bags(kind) if kind and options.get("rm_update_every") else None,
        **assets.trainer_arguments(options),
    )
    steps = sorted({max(round(share * updates), 1) for share in budget.points})

    def evaluate(step: int) -> None:
        with clock.stopped():
            model: Any = trainer.model
            if step:
                # Greedy decoding only in the middle and at the end: it costs as much as sampling.
                greedy = step in (steps[-1] / 2, steps[-1])
                found, texts = measure(model, tokenizer, task, held_out, greedy=greedy, draws=budget.draws)
            else:
                found, texts = measure_start(assets, budget.held_out, budget.draws)
            prompts, some = [problem.prompt for problem in held_out], slice(KL_RESPONSES)
            logprobs = [response_logprobs(m, tokenizer, prompts[some], texts[some]) for m in (model, reference)]
            found |= {
                "rollouts": step // trainer.num_iterations * rollouts,
                "rm_score": mean_score(judge, prompts, texts),
                "kl": (logprobs[0] - logprobs[1]).mean().item(),
                "alarms": trainer.alarms.guards.raised,
                "seconds": clock.seconds,
            }
            found.pop("step_accuracy_greedy", None)
            report(found | cost)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Evaluations(steps, evaluate, clock))
    with bar_on_terminal(trainer, f"{task.name} seed {assets.seed} {arm.name}"):
        trainer.train(resume_from_checkpoint=resume_or_clear(folder))
    if trainer.args.save_strategy != "no":
        trainer.save_model(str(assets.trained(arm)))


def make_trainer(
    arm: Arm,
    options: Options,
    policy: Path,
    judge: StepRewardModel | Path | None,
    outcome: Callable[..., list[float]],
    prompts: Sequence[str],
    folder: Path,
    *,
    responses: Any = None,
    **arguments: Any,
) -> StepPPOTrainer:
    """The trainer of an arm, with its options, the base policy, its judge, and the outcome reward for arms that have
    one.

    `responses` are labelled, for a reward model that keeps learning; `arguments` are further ones of
    [`StepPPOTrainer`].
    """
    functions: list[Any] = [outcome] if arm.outcome else []
    if arm.scores_responses and isinstance(judge, StepRewardModel):
        functions.append(WholeResponseReward(judge) if arm.response_model else FractalReward(judge))
    return StepPPOTrainer(
        model=str(policy),
        reward_model=None if arm.scores_responses else judge,
        reward_funcs=functions or None,
        args=StepPPOConfig(output_dir=str(folder), **options),
        reward_model_dataset=responses,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        **arguments,
    )


class Evaluations(TrainerCallback):
    """Evaluates a policy before training and after the updates `steps`; `clock` is saved with every checkpoint."""

    def __init__(self, steps: Iterable[int], evaluate: Callable[[int], None], clock: "Clock | None" = None) -> None:
        self.steps, self.evaluate, self.clock = frozenset(steps), evaluate, clock

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.evaluate(0)
        elif self.clock is not None:
            self.clock.resume(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.evaluate(state.global_step)
        if self.clock is not None and control.should_save:  # before the checkpoint, which may end the run
            self.clock.save(state.global_step)


class Clock:
    """CPU seconds of training since its first evaluation, without evaluations; stored in `file` if a run is stopped."""

    def __init__(self, file: Path) -> None:
        self.seconds, self.file = 0.0, file
        self._since: float | None = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out the work inside the `with` block."""
        if self._since is not None:
            self.seconds += time.process_time() - self._since
        yield
        self._since = time.process_time()

    def save(self, step: int) -> None:
        """Store the seconds up to the end of a step."""
        with self.stopped():
            write_atomic(self.file, json.dumps(self._kept() | {str(step): self.seconds}))

    def resume(self, step: int) -> None:
        """Continue from the seconds stored at the end of a step."""
        self.seconds, self._since = self._kept()[str(step)], time.process_time()

    def _kept(self) -> dict[str, float]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and log messages; errors are still raised."""
    notes = transformers.utils.logging
    before = notes.get_verbosity(), notes.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notes.set_verbosity(before[0])
        if before[1]:
            notes.enable_progress_bar()
        if not before[2]:
            datasets.enable_progress_bars()


# Measuring a policy --------------------------------------------------------------------------------------------------


def measure(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], *, greedy: bool = True, draws: int = 1
) -> tuple[Metrics, list[str]]:
    """Accuracy on held-out problems, of answers and of steps, and the sampled responses.

    With `greedy`, policies also decode greedily, which doubles the work; otherwise these metrics are None. With several
    `draws` per problem there is no greedy decoding, and `solved` counts the right ones of each problem.

    Returns metrics (names of greedy ones end in `_greedy`), and the first sampled response to each problem.
    """
    found: Metrics = {"accuracy_greedy": None, "step_accuracy_greedy": None}
    prompts = [problem.prompt for problem in problems]
    drawn: list[list[str]] = []
    for suffix in ("_greedy", "") if greedy and draws == 1 else ("",):
        if draws == 1:
            longest, seed = task.max_new_tokens, SAMPLING_SEED
            texts = sample_responses(
                model, tokenizer, prompts, greedy=suffix == "_greedy", max_new_tokens=longest, seed=seed
            )
            drawn = [[text] for text in texts]
        else:
            drawn = _draw(model, tokenizer, prompts, draws, task.max_new_tokens)
        right = [[p.check_answer(text) for text in texts] for p, texts in zip(problems, drawn, strict=True)]
        found[f"accuracy{suffix}"] = mean([mean(of_problem) for of_problem in right])
        if draws > 1:
            found |= {"draws": draws, "solved": [sum(of_problem) for of_problem in right]}
        checked = [p.check_steps(text) for p, texts in zip(problems, drawn, strict=True) for text in texts]
        steps = [good for flags in checked if flags is not None for good in flags]
        found[f"step_accuracy{suffix}"] = mean(steps) if None not in checked else None
    flat = [text for texts in drawn for text in texts]
    found["response_tokens"] = mean([len(ids) for ids in tokenizer(flat)["input_ids"]])
    return found, [texts[0] for texts in drawn]


def _draw(model: Any, tokenizer: Any, prompts: Sequence[str], draws: int, longest: int) -> list[list[str]]:
    """Several responses to each prompt; prompts of similar length share a batch."""
    drawn: list[list[str]] = [[] for _ in prompts]
    order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, BATCH // (2 * draws))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        texts = sample_groups(
            model,
            tokenizer,
            [prompts[i] for i in rows],
            samples=draws,
            max_new_tokens=longest,
            seed=SAMPLING_SEED + start,
        )
        for i, found in zip(rows, texts, strict=True):
            drawn[i] = found
    return drawn


def measure_start(assets: Assets, count: int, draws: int = 1) -> tuple[Metrics, list[str]]:
    """The base policy's metrics on `count` held-out problems and its sampled responses: the start of every arm."""

    def make(folder: Path) -> None:
        problems = assets.task.problems("held_out", count, assets.seed)
        found, texts = measure(*assets.load_policy(), assets.task, problems, draws=draws)
        write_atomic(folder / "start.json", json.dumps({"metrics": found, "texts": texts}))

    folder = made_once(assets.own / (f"start-{count}" if draws == 1 else f"start-{count}-{draws}"), make)
    saved = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    return saved["metrics"], saved["texts"]


def mean_score(judge: StepRewardModel | None, prompts: list[str], texts: list[str]) -> float | None:
    """Mean response score by the policy's own reward; None without a judge."""
    if judge is None:
        return None
    if judge.settings.segmentation.method == "given":
        return mean(WholeResponseReward(judge)(prompts, texts))
    scored = judge.score(prompts, texts, progress=False)
    return mean([result.score for result in scored if result.error is None])


@torch.no_grad()
def response_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Log-probability (B,) in nats of each response directly after its prompt, including the end of text."""
    found = []
    was_training = model.training
    model.eval()
    longest = max(len(a) + len(b) for a, b in zip(prompts, responses, strict=True))  # characters: no fewer than tokens
    size = max(1, min(BATCH, _MOST_LOGITS // (longest * len(tokenizer))))
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        heads, tails = (tokenizer(list(texts[rows]))["input_ids"] for texts in (prompts, responses))
        ids = [torch.tensor([*head, *tail, tokenizer.eos_token_id]) for head, tail in zip(heads, tails, strict=True)]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        starts, ends = torch.tensor([len(head) for head in heads]), torch.tensor([len(row) for row in ids])
        places = torch.arange(batch.size(1))
        mask = (places >= starts[:, None]) & (places < ends[:, None])
        # Padding is on the right, where a causal model does not see it.
        logits = model(input_ids=batch, attention_mask=(places < ends[:, None]).long()).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        found.append(-nll.masked_fill(~mask[:, 1:], 0.0).sum(dim=1))
    model.train(was_training)
    return torch.cat(found)


def mean(values: Sequence[float]) -> float:
    """Mean; 0 without values."""
    return sum(values) / max(len(values), 1)
