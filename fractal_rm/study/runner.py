"""One run: an arm trains a policy on a task with a seed, and the policy is measured at fixed numbers of rollouts."""

import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerState

from fractal_rm.files import made_once, write_atomic
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import Arm, Options
from fractal_rm.study.assets import Assets, load_policy
from fractal_rm.study.rivals import ImplicitRewardModel, WholeResponseReward
from fractal_rm.tasks.task import Problem, Task, sample_responses, unseen

# The same for all arms; the rest is what `arms.py` names.
PPO_SETTINGS: Options = {
    "num_generations": 8,
    "num_iterations": 1,
    "value_learning_rate": 1e-3,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
    "temperature": 1.0,
    "beta": 0.0,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
# Shares of the updates after which a policy is measured.
POINTS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
# Held-out responses from which the distance to the base policy is estimated.
KL_RESPONSES = 64
# Seed of the samples: every arm and evaluation draws with the same one.
SAMPLING_SEED = 7
BATCH = 256

Metrics = dict[str, Any]
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Budget:
    """How much a run does.

    Args:
        rollouts_per_update: Completions in an update.
        held_out: Problems that a policy is measured on.
        updates: Policy updates; None: the task's.
        points: Shares of the updates after which the policy is measured, beside the start.
    """

    rollouts_per_update: int = 64
    held_out: int = 256
    updates: int | None = None
    points: tuple[float, ...] = POINTS


def run_arm(arm: Arm, options: Options, assets: Assets, budget: Budget, report: Callable[[Metrics], None]) -> None:
    """Train a policy with an arm's rewards and report its metrics at each evaluation point, the start included.

    Args:
        arm: Where rewards come from.
        options: Settings of [`StepPPOConfig`] that were chosen for it.
        assets: Policy and reward models.
        budget: How much to do.
        report: Takes the metrics of each point.
    """
    task, kind = assets.task, arm.judge
    updates = budget.updates or task.updates
    judge = assets.reward_model(kind) if kind else None
    held_out = task.problems("held_out", budget.held_out, assets.seed)
    count = updates * budget.rollouts_per_update // PPO_SETTINGS["num_generations"]
    problems = unseen(task.problems("train", 2 * count, assets.seed), {problem.prompt for problem in held_out})
    cost, (reference, tokenizer), clock = assets.cost(kind), load_policy(assets.policy()), Clock()
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        trainer = make_trainer(
            arm,
            PPO_SETTINGS | options | {"max_steps": updates, "per_device_train_batch_size": budget.rollouts_per_update},
            task,
            assets.policy(),
            judge,
            [problem.prompt for problem in problems[:count]],
            seed=assets.seed,
            folder=Path(folder),
            # A model that learns on goes on with the responses that it was trained on, too.
            responses=assets.bags(kind) if kind and options.get("rm_update_every") else None,
        )
        steps = sorted({max(round(share * updates), 1) for share in budget.points})

        def evaluate(step: int) -> None:
            with clock.stopped():
                model: Any = trainer.model
                if step:
                    # Greedy decoding in the middle and at the end: it is as dear as sampling.
                    greedy = step in (steps[-1] / 2, steps[-1])
                    found, texts = measure(model, tokenizer, task, held_out, greedy=greedy)
                else:
                    found, texts = measure_start(assets, budget.held_out)
                prompts, some = [problem.prompt for problem in held_out], slice(KL_RESPONSES)
                logprobs = [response_logprobs(m, tokenizer, prompts[some], texts[some]) for m in (model, reference)]
                found |= {
                    "rollouts": step // trainer.num_iterations * budget.rollouts_per_update,
                    "rm_score": mean_score(judge, prompts, texts),
                    "kl": (logprobs[0] - logprobs[1]).mean().item(),
                    "alarms": trainer.alarms.guards.raised,
                    "seconds": clock.seconds,
                }
                found.pop("step_accuracy_greedy", None)
                report(found | cost)

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Evaluations(steps, evaluate))
        trainer.train()


def make_trainer(
    arm: Arm,
    options: Options,
    task: Task,
    policy: Path,
    judge: StepRewardModel | Path | None,
    prompts: Sequence[str],
    *,
    seed: int,
    folder: Path,
    responses: Any = None,
) -> StepPPOTrainer:
    """The trainer of an arm.

    Args:
        arm: Where rewards come from.
        options: Settings of [`StepPPOConfig`].
        task: Gives the outcome reward and the longest response.
        policy: Folder of the base policy.
        judge: What scores responses or their steps.
        prompts: Of the training.
        seed: Seed of the training.
        folder: Where the trainer writes.
        responses: Labelled responses, for a reward model that learns on.
    """
    outcome: Any = task.outcome
    if arm.online and isinstance(judge, ImplicitRewardModel):
        outcome = judge.learning_from(outcome)
    functions: list[Any] = [outcome] if arm.outcome else []
    if arm.response_model and isinstance(judge, StepRewardModel):
        functions.append(WholeResponseReward(judge))
    config: Options = {"max_completion_length": task.max_new_tokens, **options, "seed": seed}
    return StepPPOTrainer(
        model=str(policy),
        reward_model=None if arm.response_model else judge,
        reward_funcs=functions or None,
        args=StepPPOConfig(output_dir=str(folder), **config),
        reward_model_dataset=responses,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )


class Evaluations(TrainerCallback):
    """Evaluates a policy before its training and after some updates.

    Args:
        steps: Numbers of the updates.
        evaluate: Takes the number of updates so far.
    """

    def __init__(self, steps: Iterable[int], evaluate: Callable[[int], None]) -> None:
        self.steps, self.evaluate = frozenset(steps), evaluate

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.evaluate(0)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.evaluate(state.global_step)


class Clock:
    """Processor seconds of a training since its first evaluation, without those of evaluations."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what is done in the block."""
        if self._since is not None:
            self.seconds += time.process_time() - self._since
        yield
        self._since = time.process_time()


# What a policy is worth ----------------------------------------------------------------------------------------------


def measure(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], *, greedy: bool = True
) -> tuple[Metrics, list[str]]:
    """Accuracy on held-out problems, of answers and of steps, and the sampled responses.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        task: Gives the longest response.
        problems: Held-out problems.
        greedy: Also decode greedily, which doubles the work; otherwise these metrics are None.

    Returns:
        Metrics, those of greedy decoding with `_greedy` behind their names; the sampled responses.
    """
    found: Metrics = {"accuracy_greedy": None, "step_accuracy_greedy": None}
    texts: list[str] = []
    for suffix in ("_greedy", "") if greedy else ("",):
        texts = sample_responses(
            model,
            tokenizer,
            [problem.prompt for problem in problems],
            greedy=suffix == "_greedy",
            max_new_tokens=task.max_new_tokens,
            seed=SAMPLING_SEED,
        )
        found[f"accuracy{suffix}"] = mean([p.check_answer(text) for p, text in zip(problems, texts, strict=True)])
        checked = [p.check_steps(text) for p, text in zip(problems, texts, strict=True)]
        steps = [good for flags in checked if flags is not None for good in flags]
        found[f"step_accuracy{suffix}"] = mean(steps) if None not in checked else None
    found["response_tokens"] = mean([len(ids) for ids in tokenizer(texts)["input_ids"]])
    return found, texts


def measure_start(assets: Assets, count: int) -> tuple[Metrics, list[str]]:
    """What the base policy is worth on held-out problems, and its sampled responses: the start of every arm.

    Args:
        assets: Keep them.
        count: How many problems.
    """

    def make(folder: Path) -> None:
        problems = assets.task.problems("held_out", count, assets.seed)
        found, texts = measure(*load_policy(assets.policy()), assets.task, problems)
        write_atomic(folder / "start.json", json.dumps({"metrics": found, "texts": texts}))

    folder = made_once(assets.own / f"start-{count}", make)
    saved = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    return saved["metrics"], saved["texts"]


def mean_score(judge: StepRewardModel | None, prompts: list[str], texts: list[str]) -> float | None:
    """Mean response score by what rewards the policy; None without it."""
    if judge is None:
        return None
    if judge.settings.segmentation.method == "given":
        return mean(WholeResponseReward(judge)(prompts, texts))
    scored = judge.score(prompts, texts, progress=False)
    return mean([result.score for result in scored if result.error is None])


@torch.no_grad()
def response_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Log-probability (B,) of each response, the end of text included, in nats.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts.
        responses: Texts that follow them directly.
    """
    found = []
    was_training = model.training
    model.eval()
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        heads, tails = (tokenizer(list(texts[rows]))["input_ids"] for texts in (prompts, responses))
        ids = [torch.tensor([*head, *tail, tokenizer.eos_token_id]) for head, tail in zip(heads, tails, strict=True)]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        starts, ends = torch.tensor([len(head) for head in heads]), torch.tensor([len(row) for row in ids])
        places = torch.arange(batch.size(1))
        mask = (places >= starts[:, None]) & (places < ends[:, None])
        # Padding stands on the right, where a causal model does not see it.
        logits = model(input_ids=batch, attention_mask=(places < ends[:, None]).long()).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        found.append(-nll.masked_fill(~mask[:, 1:], 0.0).sum(dim=1))
    model.train(was_training)
    return torch.cat(found)


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / max(len(values), 1)


# Many runs -----------------------------------------------------------------------------------------------------------


def run_units(run: Callable[[Unit], Any], units: Sequence[Unit], jobs: int) -> None:
    """Do runs in their order, in one or several processes.

    Args:
        run: Does one; it can be pickled if there are several processes.
        units: The runs.
        jobs: Processes, each with one thread.
    """
    if jobs == 1:
        torch.set_num_threads(1)
        for unit in units:
            run(unit)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.imap_unordered(run, units, chunksize=1):
            pass


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' own bars and notes; errors still come through."""
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
