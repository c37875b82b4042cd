"""TRL's online engine for `StepPPOTrainer`: the only module that names TRL's private methods.

`trl.GRPOTrainer` generates, calls reward functions, computes log-probabilities, clips, logs and checkpoints. This class
inverts the calling order: it calls `rollout` and `loss` of its subclass, and offers the parts that both need. It copies
no TRL code; `contract.py` lists what it relies on.

TRL's methods do not return intermediate results (which completions were judged, the hidden states behind a
log-probability), and do not accept known ones (log-probabilities). `_HandOver` is the only place that stores such
values, from a call into TRL until the line after it.
"""

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_trainer import GRPOTrainer

from fractal_rm.credit.kl import kl_estimates
from fractal_rm.credit.placement import completion_text, token_end_characters, turn_spans
from fractal_rm.data.bag import StepScores
from fractal_rm.data.prompts import Conversation, contexts_of, is_chat
from fractal_rm.files import write_atomic
from fractal_rm.hf.checkpoints import named_write_errors
from fractal_rm.hf.denormals import flush_denormals
from fractal_rm.hf.length_buckets import LengthBuckets, bucketed_log_probs, completion_log_probs, may_be_sorted
from fractal_rm.hf.parallelism import is_sharded
from fractal_rm.hf.runs import Run, naming_option
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.contract import TOOL_MASK_PLACE, check_contract
from fractal_rm.ppo.rollout import RolloutBatch, policy_mask, share_metrics
from fractal_rm.ppo.sources import (
    NotFiniteReward,
    StepRewardSource,
    as_list,
    check_model_outcomes,
    finite_outcomes,
    step_lines,
)
from fractal_rm.scorers.checkpoint import check_finite_weights, complete_models, replaced_folder

# TRL makes a reference model only for its own penalty, and only checks whether `beta` is 0.
_ANY_BETA = 1.0
# Below, the logits of prompts cost little.
_LARGE_VOCABULARY = 8192
# Minibatch keys of the rollout's forward pass, if the update reuses it.
_LOGPROBS, _ENTROPIES = "rollout_logprobs", "rollout_entropies"


class _Forward(NamedTuple):
    """A forward pass of the policy: log-probabilities (B, T), and what was read from its last hidden states, if
    anything.

    With gradients these are the states (B, P + T, H); without, the reader's output (B, P + T), which is much smaller.
    """

    logprobs: Tensor
    read: Tensor | None


@dataclass
class _HandOver:
    """Values stored between a call into TRL and the line after it."""

    # Arguments of the policy's chat template, for reward models.
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prompts: list[Any] = field(default_factory=list)  # prompts of the judged completions
    completion_ids: list[list[int]] = field(default_factory=list)  # their token ids, without padding
    # For each of them, which tokens the policy sampled (not tool output). None: all.
    written: list[list[int]] | None = None
    texts: list[str] = field(default_factory=list)  # their texts; conversations if tools or users wrote in between
    function_rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # rewards of this process (B, F)
    scores: dict[str, Sequence[StepScores]] = field(default_factory=dict)  # steps and scores by source name
    forwards: list[_Forward] = field(default_factory=list)  # forward passes of the policy, in TRL's order
    # Log-probabilities and entropies that TRL gets instead of the next forward pass.
    known: tuple[Tensor, Tensor] | None = None


class _SourceFunction:
    """A source of step rewards as TRL sees it: one more reward function, of weight 0.

    So TRL logs its numbers, runs asynchronous sources concurrently, and passes the data set's columns.
    """

    def __init__(self, source: StepRewardSource, hand_over: Callable[[], _HandOver]) -> None:
        self.__name__, self.source, self._hand_over = source.name, source, hand_over

    def __call__(
        self,
        prompts: list[Any],
        log_extra: Callable[[str, list[str]], None] | None = None,
        **arguments: Any,
    ) -> list[float | None]:
        return self._hand(self._ask(prompts, log_extra, arguments), log_extra)

    def _ask(self, prompts: list[Any], log_extra: Any, arguments: Mapping[str, Any]) -> Any:
        known = self._hand_over()
        return self.source(prompts, known.texts, known.template_options, log_extra=log_extra, **arguments)

    def _hand(self, found: Sequence[StepScores], log_extra: Any) -> list[float | None]:
        self._hand_over().scores[self.source.name] = found
        if log_extra is not None and self.source.gives_probabilities:  # a column of TRL's table of completions
            log_extra(f"steps/{self.source.name}", [step_lines(scored) for scored in found])
        return [scored.score if scored.judged and not math.isnan(scored.score) else None for scored in found]


class _AsyncSourceFunction(_SourceFunction):
    async def __call__(self, prompts: list[Any], log_extra: Any = None, **arguments: Any) -> list[float | None]:  # type: ignore[override]
        return self._hand(await self._ask(prompts, log_extra, arguments), log_extra)


class Engine(Run, GRPOTrainer):
    """`GRPOTrainer` inverted: a subclass defines `rollout` and `loss`, and this class offers the rest.

    Takes the arguments of `GRPOTrainer`, and the `sources` of step rewards. `args` is copied;
    `reward_processing_classes` belong to `reward_funcs`.

    Raises:
        RuntimeError: If the installed TRL lacks a name that this class relies on.
        ValueError: If the number of weights differs from the number of outcome rewards, or a model's folder lacks
            weights.
    """

    args: StepPPOConfig
    model: Any
    num_generations: int

    def __init__(
        self,
        *,
        reward_funcs: Sequence[Any],
        sources: Sequence[StepRewardSource],
        args: StepPPOConfig,
        reward_processing_classes: Any = None,
        **kwargs: Any,
    ) -> None:
        moved = check_contract()
        if moved:
            raise RuntimeError(" ".join(moved))
        self._hand_over = _HandOver()
        self._token_texts: dict[int, str] = {}  # texts of the tokens seen so far
        args, beta = copy.copy(args), args.beta
        args.reward_weights = _weights(args, len(reward_funcs), len(sources))
        args.beta = beta or (_ANY_BETA if args.kl_coef else 0.0)
        kinds = {True: _AsyncSourceFunction, False: _SourceFunction}
        scorers = [kinds[source.is_async](source, lambda: self._hand_over) for source in sources]
        if reward_processing_classes is not None:
            reward_processing_classes = [*as_list(reward_processing_classes), *[None] * len(sources)]
        with complete_models(), naming_option("model_init_kwargs", args.model_init_kwargs, kinds=(TypeError,)):
            super().__init__(
                reward_funcs=[*reward_funcs, *scorers],
                args=args,
                reward_processing_classes=reward_processing_classes,
                **kwargs,
            )
        self.args.beta = self.beta = beta
        self.is_outcome = torch.tensor([not isinstance(function, _SourceFunction) for function in self.reward_funcs])
        self.reward_funcs = [
            finite_outcomes(function, name) if outcome else function
            for function, name, outcome in zip(
                self.reward_funcs, self.reward_func_names, self.is_outcome.tolist(), strict=True
            )
        ]

    # What a trainer defines ------------------------------------------------------------------------------------------

    def rollout(self, inputs: Any) -> RolloutBatch:
        """A batch with its advantages, made with [`sample`]; called whenever a new rollout is due, and in
        evaluation."""
        return self.sample(inputs)

    def loss(self, policy_loss: Tensor, minibatch: dict[str, Any], states: Tensor | None) -> Tensor:
        """The total loss of a minibatch (a part of `RolloutBatch.minibatches`), given TRL's clipped loss.

        `states` are the policy's last hidden states (B, P + T, H), if there is a `state_reader`.
        """
        return policy_loss

    @property
    def state_reader(self) -> nn.Module | None:
        """Module that reads the policy's last hidden states (..., H) while log-probabilities are computed; None:
        none."""
        return None

    def save_state(self, folder: Path, *, resumable: bool) -> None:
        """Write the state of the trainer next to a saved policy; with `resumable`, also what a checkpoint needs in
        addition to policy and optimizer."""

    def load_state(self, folder: Path, *, weights: bool) -> None:
        """Restore what `save_state` wrote; without `weights`, only running statistics."""

    # What a trainer is offered ---------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self._tokenizer

    @property
    def ending_ids(self) -> set[int]:
        """Ids that a finished completion may end with, as TRL counts them: EOS, the model's own EOS ids, padding."""
        eos = getattr(getattr(self.policy, "generation_config", None), "eos_token_id", None)
        tokenizer: Any = self._tokenizer
        return {tokenizer.eos_token_id, tokenizer.pad_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    @property
    def policy(self) -> Any:
        """The policy without wrappers. Looked up on every call, because wrappers are added after construction."""
        return self.accelerator.unwrap_model(self.model)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Log numbers: each is averaged until the next log, and over all processes."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(float(value))

    def updates_once(self) -> bool:
        """Whether a rollout is followed by one backward pass over all of it, before any weight changes.

        The update may then reuse the rollout's forward passes. Not with sharded weights: they are gathered for a
        forward pass and its backward pass, and other models run in between.
        """
        args = self.args
        return args.num_iterations == 1 and args.steps_per_generation == 1 and not is_sharded(self.accelerator)

    def sample(self, inputs: Any) -> RolloutBatch:
        """Let TRL generate and judge completions, and measure the KL divergence if it is requested or free."""
        self._hand_over = hand_over = _HandOver(self.args.template_options(self.tools))
        try:
            output = super()._generate_and_score_completions(inputs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            file = self._keep_rollout([row["prompt"] for row in inputs], [None] * len(inputs))
            raise ValueError(
                f"The policy cannot sample at step {self.state.global_step}, because its logits are NaN or infinite. "
                f"{file} keeps the prompts. Lower `learning_rate`, and resume from a checkpoint."
            ) from error
        old = output.get("old_per_token_logps")
        batch = RolloutBatch(
            prompts=hand_over.prompts,
            completion_ids=hand_over.completion_ids,
            texts=hand_over.texts,
            written=hand_over.written,
            function_rewards=hand_over.function_rewards,
            function_weights=self.reward_weights,
            is_outcome=self.is_outcome,
            scores={name: hand_over.scores[name] for name in self.reward_func_names if name in hand_over.scores},
            tokens=output,
            mask=policy_mask(output),
            outcome_advantages=output["advantages"],
            logprobs=old,
            # TRL computes the policy's log-probabilities before the reference's.
            state_values=None if old is None or not hand_over.forwards else hand_over.forwards[0].read,
        )
        return self._with_kl(batch) if self.model.training else batch

    def _with_kl(self, batch: RolloutBatch) -> RolloutBatch:
        reference = batch.tokens.get("ref_per_token_logps")
        if not self.args.kl_coef and (reference is None or batch.logprobs is None):
            return batch
        if batch.logprobs is None:
            batch = self._with_logprobs(batch)
        if reference is None:
            reference = self._reference_logprobs(batch)
        assert batch.logprobs is not None
        return batch.plus(kl=kl_estimates(batch.logprobs, reference, batch.mask, estimator=self.args.kl_estimator))

    def _with_logprobs(self, batch: RolloutBatch) -> RolloutBatch:
        """Log-probabilities of the sampling policy (B, T); the update reuses the forward pass if it can."""
        if self.updates_once() and self.state_reader is None and not self.aux_loss_enabled:
            logprobs, entropies, _ = self._logprobs_of(self.model_wrapped, batch, compute_entropy=True)
            return batch.plus(logprobs=logprobs.detach(), for_update={_LOGPROBS: logprobs, _ENTROPIES: entropies})
        self._hand_over = hand_over = _HandOver()
        with torch.no_grad():
            logprobs, _, _ = self._logprobs_of(self.model, batch, batch_size=self.args.per_device_train_batch_size)
        return batch.plus(logprobs=logprobs, state_values=hand_over.forwards[0].read if hand_over.forwards else None)

    def _reference_logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probabilities of the reference (B, T): a separate model, or the policy without its adapter."""
        rows = self.args.per_device_train_batch_size
        adapter: Any = nullcontext()
        if self.ref_model is None:
            name = "ref" if "ref" in self.policy.peft_config else None
            adapter = trl_utils.use_adapter(self.policy, adapter_name=name)
        model = self.model if self.ref_model is None else self.ref_model
        with torch.no_grad(), adapter:
            return self._logprobs_of(model, batch, batch_size=rows)[0]

    def _logprobs_of(self, model: Any, batch: RolloutBatch, **options: Any) -> Any:
        tokens = batch.tokens
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([tokens["prompt_ids"], tokens["completion_ids"]], dim=1),
            torch.cat([tokens["prompt_mask"], tokens["completion_mask"]], dim=1),
            tokens["completion_ids"].size(1),
            **options,
        )

    def restore_weights(self, checkpoint: Path) -> None:
        """Restore the policy's weights, and reset the optimizer's state."""
        super()._load_from_checkpoint(str(checkpoint))
        optimizer: Any = self.optimizer
        optimizer.state.clear()
        optimizer.zero_grad()

    # What TRL calls ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        prompts: Any = self.train_dataset
        needed = self.args.generation_batch_size // self.num_generations  # type: ignore[operator]
        if hasattr(prompts, "__len__") and len(prompts) < needed:  # TRL would end without a training step
            raise ValueError(
                f"The training set has {len(prompts)} prompts, but a rollout takes {needed}. Give more prompts, raise "
                "`num_generations`, or lower `per_device_train_batch_size` or `steps_per_generation`."
            )
        return super().get_train_dataloader()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = self.rollout(inputs)
        if batch.advantages is not None:
            self._show_advantages(batch)
        return batch.minibatches()

    def _generate(self, prompts: Any) -> Any:
        found = super()._generate(prompts)
        # Tool and environment output is known here, and TRL passes it to no reward function.
        self._hand_over.written = found[TOOL_MASK_PLACE]
        return found

    def _text(self, ids: list[int], written: Sequence[int], completion: Any, endings: set[int]) -> str:
        """A completion as it is scored: the policy's own text, with other messages as context."""
        tokenizer = self.tokenizer
        # Not TRL's texts: placement counts the characters of exactly this decoding.
        text = completion_text(ids, tokenizer, endings)
        if all(written):
            return text
        ends = token_end_characters(ids, tokenizer, self._token_texts, endings)
        turns = turn_spans(ids, ends, list(map(bool, written)), endings)
        context = contexts_of(completion) if is_chat(completion) else []
        # A rollout function may return the completion as one message: its context stays text.
        return Conversation(text, turns, context if len(context) == len(turns) else [None] * len(turns))

    def _show_advantages(self, batch: RolloutBatch) -> None:
        """Put each completion's mean advantage into TRL's table of completions, in place of TRL's own."""
        assert batch.advantages is not None
        mask = batch.mask if batch.learned is None else batch.learned
        means = (batch.advantages.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).detach()
        gathered: Any = self.accelerator.gather(means)
        for _ in gathered:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(gathered.tolist())

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        hand_over = self._hand_over
        written = hand_over.written or [[1] * len(ids) for ids in completion_ids_list]
        rows = zip(completion_ids_list, written, completions, strict=True)
        endings = self.ending_ids  # once a rollout: accelerate looks for installed packages to unwrap a model
        hand_over.texts = [self._text(ids, mask, completion, endings) for ids, mask, completion in rows]
        with self._keeping_rollout(prompts):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        is_outcome = self.is_outcome.to(rewards.device)
        if is_outcome.any() and not is_outcome.all():
            # TRL leaves out completions that no function judged. Step scores must not turn these into an outcome of 0.
            unjudged = rewards[:, is_outcome].isnan().all(dim=1)
            rewards[unjudged.unsqueeze(1) & ~is_outcome] = torch.nan
        first = self.accelerator.process_index * len(prompts)
        ours = rewards[first : first + len(prompts)]
        with self._keeping_rollout(prompts):
            check_model_outcomes(self.reward_funcs, self.reward_func_names, ours, prompts, completions)
        hand_over.prompts, hand_over.completion_ids, hand_over.function_rewards = prompts, completion_ids_list, ours
        return rewards

    @property
    def _has_large_vocabulary(self) -> bool:
        """Whether the logits of a token are many, and the policy can compute those of completions alone."""
        policy: Any = self.policy.get_base_model() if hasattr(self.policy, "peft_config") else self.policy
        if self.args.cast_lm_head_to_fp32 or "logits_to_keep" not in inspect.signature(policy.forward).parameters:
            return False
        return policy.config.get_text_config().vocab_size >= _LARGE_VOCABULARY

    @contextmanager
    def _keeping_rollout(self, prompts: Any) -> Iterator[None]:
        """Write prompts and completions into the output folder if one of them has a NaN or infinite reward."""
        try:
            yield
        except NotFiniteReward as error:
            file = self._keep_rollout(prompts, self._hand_over.texts)
            raise NotFiniteReward(f"{error} {file} keeps the rollout.") from error

    def _keep_rollout(self, prompts: Sequence[Any], texts: Sequence[str | None]) -> Path:
        """Write prompts and completions of a failed rollout; returns the file."""
        name = f"not_finite-{self.state.global_step}-{self.args.process_index}.jsonl"
        pairs = zip(prompts, texts, strict=True)
        rows = [json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) for prompt, text in pairs]
        write_atomic(file := Path(str(self.args.output_dir)) / name, "\n".join(rows) + "\n")
        return file

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._hand_over = hand_over = _HandOver()
        if _LOGPROBS in inputs:  # only once: the backward pass frees the graph
            hand_over.known = inputs.pop(_LOGPROBS), inputs.pop(_ENTROPIES)
        policy_loss = super()._compute_loss(model, inputs)
        self._hand_over = _HandOver()  # states are large: free them as soon as possible
        loss = self.loss(policy_loss, inputs, hand_over.forwards[-1].read if hand_over.forwards else None)
        if self.model.training:
            self.finite.check_loss(loss, inputs)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL's, in length buckets; also reads the policy's hidden states if there is a reader."""
        hand_over = self._hand_over
        if hand_over.known is not None:
            (logprobs, entropies), hand_over.known = hand_over.known, None
            return logprobs, entropies, None
        log_probs_of: Any = super()._get_per_token_logps_and_entropies
        texts, buckets = (input_ids, attention_mask), None
        if not any(value is not None and value is not False for value in others.values()):  # images, experts: TRL's way
            sort, prompt_width = may_be_sorted(model, self.accelerator), input_ids.size(1) - logits_to_keep
            buckets = LengthBuckets(attention_mask, prompt_width, most_rows=batch_size, sort=sort)
            if input_ids.device.type == "cpu" and self._has_large_vocabulary:
                learned = bool(self.args.entropy_coef or self.args.use_adaptive_entropy)
                log_probs_of = partial(completion_log_probs, temperature=self.args.temperature, learn_entropy=learned)

        def compute() -> Any:
            if buckets is None:
                options = others | {"batch_size": batch_size, "compute_entropy": compute_entropy}
                return log_probs_of(model, *texts, logits_to_keep, **options)
            return bucketed_log_probs(log_probs_of, buckets, model, *texts, compute_entropy=compute_entropy)

        reader = self.state_reader
        if reader is None or not self.model.training:
            return compute()
        keeps_states, read = torch.is_grad_enabled(), []
        with _each_output(
            backbone(self.policy), lambda states: read.append(states if keeps_states else reader(states))
        ):
            result = compute()
        if read:  # a separate reference model gives none
            joined = torch.cat(read) if buckets is None else buckets.join(read)
            hand_over.forwards.append(_Forward(result[0], joined))
        return result

    # Logs and checkpoints ---------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `GRPOTrainer`: means over all processes; NaN and infinite values are left out."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.accelerator.num_processes > 1:
            share_metrics(metrics)
        for name, values in list(metrics.items()):
            if not torch.tensor(values, dtype=torch.float64).nanmean().isfinite():
                del metrics[name]  # TRL would log None or infinity
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; `resume_from_checkpoint=True` means the last complete checkpoint."""
        self.begin(resume_from_checkpoint)
        with flush_denormals(self.accelerator.device):
            return self.go_on(resume_from_checkpoint, str(self.args.output_dir), **kwargs)

    def restore_sums(self) -> None:
        super().restore_sums()
        if self.resumes is not None and self.is_deepspeed_enabled:  # it loads the weights itself, and nothing else
            self.load_state(self.resumes, weights=False)

    def pending_logs(self) -> dict[str, list[float]]:
        return dict(self._metrics["train"])

    def restore_pending_logs(self, pending: dict[str, list[float]]) -> None:
        for name, values in pending.items():
            self._metrics["train"][name] = list(values)

    def may_stop(self) -> bool:
        """Whether no rollout is pending: TRL does not save one, and would sample it again."""
        args = self.args
        served = args.num_iterations * (args.steps_per_generation or 1)
        return self.state.global_step * args.gradient_accumulation_steps % served == 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if not self.args.should_save:
            return super()._save(output_dir, state_dict=state_dict)
        check_finite_weights(self.policy, folder)
        with named_write_errors(f"The policy in {folder}"), replaced_folder(folder) as whole:
            super()._save(str(whole), state_dict=state_dict)
            self.save_state(whole, resumable=folder.name.startswith(PREFIX_CHECKPOINT_DIR))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        self.load_state(Path(resume_from_checkpoint), weights=True)


def _weights(args: StepPPOConfig, outcomes: int, sources: int) -> list[float] | None:
    """Weights of all reward functions: the outcome weights, and 0 for each source."""
    weights = args.reward_weights
    if weights is not None and len(weights) != outcomes:
        raise ValueError(
            f"`reward_weights` has {len(weights)} numbers for {outcomes} `reward_funcs`. Give one each; "
            "the weights of step rewards are `step_weight` and `step_reward_weights`."
        )
    return [*(weights or [1.0] * outcomes), *[0.0] * sources] if sources else weights


def backbone(policy: Any) -> nn.Module:
    """The part of a causal language model up to the last hidden states, PEFT layers included."""
    return (policy.get_base_model() if hasattr(policy, "peft_config") else policy).base_model


@contextmanager
def _each_output(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, pass the first output of every forward pass of a module to a function."""
    handle = module.register_forward_hook(lambda module, args, output: take(output[0]))
    try:
        yield
    finally:
        handle.remove()
