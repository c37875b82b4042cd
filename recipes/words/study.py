"""Question: do step rewards learned from answers alone train a real language model better than the answers themselves?

    python recipes/words/study.py --tune --jobs 2    # two learning rates per arm, on a seed that is never reported
    python recipes/words/study.py --jobs 2           # the study; continues where it stopped

It uses the results of the earlier steps of README.md in the work folder: the fine-tuned policy (`policy/model`) and the
reward model (`reward_model`). All arms start from the same policy and see the same prompts for a seed; a policy trains
low-rank adapters, which are kept in the work folder. Rows go to the file of `--results` at each evaluation.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fractal_rm.cli.options.arguments import DataArguments
from fractal_rm.cli.options.tasks import TaskArguments, make_task
from fractal_rm.evaluation.results import portable_command
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import PPO_SETTINGS, Arm, Assets, Options, Recipe
from fractal_rm.study.rivals import ScriptedRewardModel
from fractal_rm.study.run import Budget
from fractal_rm.study.study import TUNING_SEED, Study, Unit, write_chosen
from fractal_rm.tasks.agreement import agreement
from fractal_rm.tasks.group_sampling import rollout_in_groups
from fractal_rm.tasks.task import Task

# Two trials per arm. A run has only 20 optimizer steps, in which policies move by about one nat per response at 6e-4.
RATES = (2e-3, 6e-4)
# Layers and rank of the adapters that the policy trains, as in its fine-tuning.
ADAPTED_LAYERS, RANK = 20, 16
# The credit of a step's reward reaches back to earlier steps and fades; a value head reads the policy's states.
# Without an outcome, steps must say which responses are better: the batch is their baseline (`PPO_SETTINGS`).
_STEPS = {"advantage": "gae", "step_lam": 0.2}
_GROUP = {"advantage": "group", "scale_rewards": "group"}


@dataclass(frozen=True)
class WordsArm(Arm):
    """An arm with one setting and two learning rates."""

    @property
    def trials(self) -> list[Options]:
        """The configurations that compete on the tuning seed."""
        return [{**dict(self.options), "learning_rate": rate} for rate in RATES]


def _options(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        WordsArm("outcome_grpo", outcome=True, options=_options(**_GROUP)),
        WordsArm("outcome_ppo", outcome=True, options=_options(advantage="gae", lam=1.0)),
        WordsArm("dense", steps="fractal", options=_options(**_STEPS)),
        WordsArm("dense_outcome", steps="fractal", outcome=True, options=_options(**_STEPS, center="response")),
        # The baseline of the arithmetic study: more steps above it earn more.
        WordsArm("dense_outcome_batch", steps="fractal", outcome=True, options=_options(**_STEPS)),
        # The same reward model and the same outcomes, but one number at the end of a response.
        WordsArm("scalar_outcome", steps="fractal", scalar=True, outcome=True, options=_options(**_STEPS)),
        # The same pair without a value model: TRL's baseline of a prompt's responses, as in `outcome_grpo`.
        WordsArm("dense_outcome_group", steps="fractal", outcome=True, options=_options(**_GROUP, center="response")),
        WordsArm("scalar_outcome_group", steps="fractal", scalar=True, outcome=True, options=_options(**_GROUP)),
        # The ceiling of that pair: the checker's own steps.
        WordsArm("oracle_outcome_group", steps="oracle", outcome=True, options=_options(**_GROUP, center="response")),
        # Only the first mistake is penalized: later steps get no reward and no penalty.
        WordsArm(
            "dense_outcome_first", steps="fractal", outcome=True, options=_options(**_GROUP, shaping="first_mistake")
        ),
        WordsArm(
            "oracle_outcome_first", steps="oracle", outcome=True, options=_options(**_GROUP, shaping="first_mistake")
        ),
        # The ceiling of `dense_outcome_batch`.
        WordsArm("oracle_outcome_batch", steps="oracle", outcome=True, options=_options(**_STEPS)),
        # Agreement with other responses to the same prompt: no model and no label.
        WordsArm("agreement_outcome", steps="agreement", outcome=True, options=_options(**_STEPS)),
        WordsArm("oracle", steps="oracle", options=_options(**_STEPS)),
        WordsArm("random_steps", steps="random_steps", options=_options(**_STEPS)),
    )
}


class WordsAssets(Assets):
    """Policy and reward model of the earlier steps; all seeds share them."""

    device: ClassVar[str] = "cuda" if torch.cuda.is_available() else "cpu"
    ppo: ClassVar[Options] = PPO_SETTINGS | {
        "use_cpu": device == "cpu",
        # Frozen weights and calculations in bfloat16, adapters in float32.
        "model_init_kwargs": {"dtype": "bfloat16"} | ({"attn_implementation": "eager"} if device == "cpu" else {}),
        "bf16": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
    }
    # Rollouts whose activations are in memory at a time.
    micro_batch: ClassVar[int] = 4 if device == "cpu" else 16

    def __init__(self, folder: Path, task: Task, seed: int, max_steps: int = -1) -> None:
        super().__init__(folder / "ppo", task, seed, max_steps)
        self.work = folder

    @classmethod
    def recipes(cls, task: Task) -> dict[str, Recipe]:
        """Reward models are trained before the study: their recipe is a configuration of `fractal-rm train`."""
        return {}

    def load_policy(self) -> tuple[Any, Any]:
        """The policy in bfloat16, and its tokenizer."""
        folder = self.policy()
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
        return model.to(self.device), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def reward_model_folder(self, kind: str) -> Path:
        """Folder of the reward model that an earlier step trained."""
        return self.work / "reward_model"

    def reward_model(self, kind: str) -> StepRewardModel:
        """The reward model in bfloat16, or a rule in its place."""
        if kind == "agreement":
            return ScriptedRewardModel(agreement)
        if kind in self.rules:
            return super().reward_model(kind)
        folder = self.reward_model_folder(kind)
        batch = 4 * self.micro_batch
        return StepRewardModel.from_pretrained(folder, device=self.device, batch_size=batch, dtype=torch.bfloat16)

    def trainer_arguments(self, options: Options) -> dict[str, Any]:
        """Adapters, a value head on the policy's states, and on a CPU a sampler made for CPUs."""
        depth = AutoConfig.from_pretrained(self.policy(), trust_remote_code=False).num_hidden_layers
        adapters = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(max(0, depth - ADAPTED_LAYERS), depth)),
            task_type="CAUSAL_LM",
        )
        arguments: dict[str, Any] = {"peft_config": adapters}
        if options["advantage"] == "gae":
            arguments["value_model"] = "shared"
        if self.device == "cpu":
            arguments["rollout_func"] = rollout_in_groups
        return arguments


@dataclass(frozen=True)
class WordsStudy(Study):
    """The study on word problems: the arms of this file, two trials each."""

    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    assets: type[Assets] = WordsAssets
    benchmark: str = "words"

    def tune(self, tasks: Sequence[str], arms: Sequence[str], jobs: int) -> dict[str, Options]:
        """Run both trials of each arm on the tuning seed, and choose by the mean accuracy of their evaluations."""
        self.run_all(
            [Unit(task, TUNING_SEED, arm, n) for task in tasks for arm in arms for n in range(len(RATES))], jobs
        )
        found: dict[str, Options] = {}
        for arm in arms:
            values = self.values(tasks, arm, range(len(RATES)))
            found[arm] = self.arms[arm].trials[values.index(max(values))]
        return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=Path("runs/words"), help="folder of the earlier steps")
    parser.add_argument("--results", type=Path, help="file of rows; default: words.jsonl in the work folder")
    parser.add_argument("--chosen", type=Path, help="learning rates; default: chosen.yaml in the work folder")
    parser.add_argument("--task", default="reasoning_gym", choices=["reasoning_gym", "word_problems"])
    parser.add_argument("--task_name", default="gsm_symbolic", help="data set; empty for word_problems")
    parser.add_argument("--data_dir", help="folder of word_problems")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--rollouts", type=int, default=64, help="rollouts per update")
    parser.add_argument("--held_out", type=int, default=150, help="problems on which a policy is evaluated")
    parser.add_argument("--draws", type=int, default=4, help="sampled responses to each of them")
    parser.add_argument("--learning_rate", type=float, help="of all arms, in place of the rates in `chosen`")
    parser.add_argument("--tune", action="store_true", help="choose learning rates, with half of the updates")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    arguments = parser.parse_args(argv)
    work: Path = arguments.work
    needed = [
        work / "policy" / "model",
        *([work / "reward_model"] if any(ARMS[arm].steps == "fractal" for arm in arguments.arms) else []),
    ]
    missing = next((folder for folder in needed if not (folder / "config.json").is_file()), None)
    if missing is not None:
        sys.exit(f"study: {missing} holds no model. Run the earlier steps of recipes/words/README.md first.")
    try:
        chosen_task = TaskArguments(task=arguments.task, task_name=arguments.task_name or None)
        task = make_task(chosen_task, DataArguments(data_dir=arguments.data_dir), str(work / "policy" / "model"))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"study: {error}")
    budget = Budget(arguments.rollouts, arguments.held_out, arguments.draws, arguments.updates, (0.5, 1.0))
    results = arguments.results or work / "words.jsonl"
    chosen = arguments.chosen or work / "chosen.yaml"
    study = WordsStudy(results, work, budget, {}, tasks={task.name: task})
    if arguments.tune:
        study = replace(study, budget=replace(budget, updates=max(1, arguments.updates // 2), points=(1.0,)))
        write_chosen(chosen, study.tune([task.name], arguments.arms, arguments.jobs), portable_command(sys.argv))
        print(f"{chosen} holds the settings of {len(arguments.arms)} arms.")
        return
    try:
        if arguments.learning_rate is None:
            study = study.with_chosen(chosen, arguments.arms)
        else:
            rate = {"learning_rate": arguments.learning_rate}
            study = replace(study, chosen={arm: dict(ARMS[arm].options) | rate for arm in arguments.arms})
    except (OSError, ValueError) as error:
        sys.exit(f"study: {error}")
    study.run_all(study.units([task.name], arguments.arms, arguments.seeds), arguments.jobs)
    print(f"{results} holds the rows.")


if __name__ == "__main__":
    main()
