"""Question: does a reward model that keeps learning remove the late collapse of a frozen one?

Rival: the arm `frozen`. For every seed a small reward model is trained on few responses of the base policy, and the
policy is trained on its step scores (no outcome in the policy's reward) from the same start, on the same prompts. The
learning rate is constant and the sampling temperature high, so that a policy that exploits its reward model does so
within a short run. The arm `online` differs in `rm_update_every` and its options only: the reward model keeps learning
from the outcomes of the rollouts. Each evaluation appends a row; a run's last row has the reward model's scores of the
final policy's responses to held-out problems (gold step labels are read only there).

Command: python -m benchmarks.evidence.online_reward --seeds 1 2 3 4 5
Resumable: a finished run is not run again.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.places import RESULTS
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import bag_metrics, step_auc, within_bag_auc
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import Arm
from fractal_rm.study.quickstart import PPO_SETTINGS, Amounts, Quickstart, QuickstartArguments
from fractal_rm.tasks.task import sample_responses

AMOUNTS = Amounts(responses=384, updates=32, evaluate_every=8, held_out=384, validation=100)
# One completion per prompt, and no value model: every rollout is a different problem for the reward model.
SETTINGS = PPO_SETTINGS | {
    "advantage": "global",
    "num_generations": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "temperature": 1.2,
    "outcome_weight": 0.0,
    "gradient_checkpointing": False,
    "reward_model_batch_size": 128,
}
ARMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "online": {
        "rm_update_every": 1,
        "rm_update_steps": 8,
        "rm_learning_rate": 5e-4,
        "rm_replay_size": 2048,
    },
}


def run_arm(run: Quickstart, name: str, results: ResultsFile) -> None:
    """Train the policy with one arm's rewards, and append a row for each evaluation."""

    def at_end(trainer: StepPPOTrainer) -> dict[str, float]:
        learned = trainer.online_reward.state_dict() if trainer.online_reward is not None else {}
        judged = judge(run, trainer, trainer.step_scores.reward_model) if trainer.step_scores is not None else {}
        return learned | judged

    arm = Arm(name, steps="fractal", outcome=True, options=tuple(ARMS[name].items()))
    for point in run.train_policy(arm, SETTINGS, at_end):
        results.append(
            benchmark="online_reward",
            arm=name,
            dataset="arithmetic",
            seed=run.arguments.seed,
            split="held_out",
            metrics={name: value for name, value in point.items() if name != "seconds"},
            config={"responses": AMOUNTS.responses, "ppo": SETTINGS | ARMS[name]},
            seconds=point["seconds"],
        )


def judge(run: Quickstart, trainer: StepPPOTrainer, reward_model: StepRewardModel) -> dict[str, float]:
    """What a reward model tells apart in the policy's responses to held-out problems, and what it gives them."""
    problems = run.held_out
    prompts = [problem.prompt for problem in problems]
    responses = sample_responses(trainer.model, trainer.tokenizer, prompts, seed=8)
    scored = reward_model.score(prompts, responses, progress=False)
    rows = [(row, problem) for row, problem in zip(scored, problems, strict=True) if row.steps]
    scores, gold = [row.step_scores for row, _ in rows], [problem.check_steps(row.response) for row, problem in rows]
    bags = bag_metrics([row.score for row, _ in rows], [problem.check_answer(row.response) for row, problem in rows])
    found = {"step_auc": step_auc(scores, gold), "within_bag_auc": within_bag_auc(scores, gold)}
    return found | {"bag_auc": bags["bag_auc"], "score": sum(row.score for row, _ in rows) / len(rows)}


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--work_dir", type=Path, default=Path("runs/online_reward"))
    parser.add_argument("--results", type=Path, default=RESULTS / "online_reward.jsonl")
    arguments = parser.parse_args()
    results = ResultsFile(arguments.results)
    for seed in arguments.seeds:
        folder = arguments.work_dir / f"seed-{seed}"
        run = Quickstart(QuickstartArguments(output_dir=str(folder), seed=seed), amounts=AMOUNTS, arms=())
        if not (folder / "reward_model" / "config.json").is_file():
            run.take_policy()
            run.sample()
            run.train_reward_model()
        for arm in arguments.arms:
            if not results.has(arm=arm, seed=seed):
                run_arm(run, arm, results)


if __name__ == "__main__":
    main()
