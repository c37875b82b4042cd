"""Pictures of docs/words.md: learning curves, and answers of the policy before and after PPO with their step scores.

    python -m benchmarks.evidence.words_pictures --work runs/words --arm dense_outcome

The answers are decoded greedily for the first held-out problems of a seed, without selection. They are rows of
`benchmarks/results/words_answers.jsonl`; without `--work` the pictures are drawn from the existing rows.
"""

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.places import REPOSITORY, RESULTS
from fractal_rm.cli.options.arguments import DataArguments
from fractal_rm.cli.options.tasks import TaskArguments, make_task
from fractal_rm.evaluation.results import read_results
from fractal_rm.files import write_atomic
from fractal_rm.report.drawing import LINES, PICTURE, new_figure, save_figure, style_axes
from fractal_rm.report.palette import ink_on, score_colour
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.statistics import finished_runs
from fractal_rm.tasks.task import Problem, sample_responses

Answer = Mapping[str, Any]
BEFORE, AFTER = "before", "after"
# Size of the picture of answers, in inches, and characters in a line of it.
_WIDTH, _ROW, _CHARACTERS, _QUESTION = 9.0, 0.2, 52, 118


def collect(work: Path, arm: str, seed: int, task_name: str, count: int, held_out: int) -> list[Answer]:
    """Greedy answers of the policy before and after an arm of the study, with the reward model's step scores.

    Args:
        work: Work folder of the recipe, with the arm's adapter.
        arm: An arm of the study.
        seed: Of the run.
        task_name: Data set of reasoning-gym.
        count: Problems.
        held_out: Held-out problems of the study: the first of them are shown.

    Raises:
        OSError: If a model is not there.
    """
    base, adapter = work / "policy" / "model", work / "ppo" / task_name / f"seed-{seed}" / "trained" / arm
    task = make_task(TaskArguments(task="reasoning_gym", task_name=task_name), DataArguments(), str(base))
    problems = task.problems("held_out", held_out, seed)[:count]
    tokenizer = AutoTokenizer.from_pretrained(base)
    policy: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    judge = StepRewardModel.from_pretrained(work / "reward_model", dtype=torch.bfloat16)
    asked = (tokenizer, judge, problems, task.max_new_tokens)
    before = answers(policy.eval(), *asked, {"when": BEFORE, "arm": arm})
    trained = PeftModel.from_pretrained(policy, adapter)  # which changes `policy` itself
    return before + answers(trained.eval(), *asked, {"when": AFTER, "arm": arm})


def answers(
    model: Any, tokenizer: Any, judge: StepRewardModel, problems: Sequence[Problem], longest: int, named: Answer
) -> list[Answer]:
    """A row for each problem: its question, the answer's steps and scores, whether it is right.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        judge: Scores steps.
        problems: The questions.
        longest: Tokens of an answer.
        named: Stands in each row.
    """
    prompts = [problem.prompt for problem in problems]
    texts = sample_responses(model, tokenizer, prompts, greedy=True, max_new_tokens=longest, seed=0)
    scored = judge.score(prompts, texts, progress=False)
    return [
        {
            **named,
            "prompt": problem.prompt,
            "right": bool(problem.check_answer(text)),
            "steps": [
                {"text": step.text, "score": None if np.isnan(step.score) else round(step.score, 4)}
                for step in one.steps
            ],
        }
        for problem, text, one in zip(problems, texts, scored, strict=True)
    ]


def draw_answers(rows: Sequence[Answer], path: Path) -> None:
    """Draw both answers to each problem side by side, a coloured box a step.

    Args:
        rows: As [`collect`] gives them.
        path: The picture.
    """
    pairs = [
        [row for row in rows if row["prompt"] == prompt] for prompt in dict.fromkeys(row["prompt"] for row in rows)
    ]
    blocks = [(_wrapped(pair[0]["prompt"], _QUESTION), [_boxes(row) for row in pair], pair) for pair in pairs]
    heights = [len(asked) + max(sum(len(box) for box, _ in side) for side in sides) + 2 for asked, sides, _ in blocks]
    total = (sum(heights) + 1) * _ROW
    with new_figure(_WIDTH, total) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, _WIDTH), ylim=(total, 0))
        axes.axis("off")
        plain: dict[str, Any] = {"fontsize": 8.5, "va": "top", "color": PICTURE.ink, "linespacing": 1.25}
        muted: dict[str, Any] = plain | {"color": PICTURE.muted}
        for place, when in enumerate((BEFORE, AFTER)):
            axes.text(0.1 + place * _WIDTH / 2, 0.05, f"{when} PPO", weight="bold", **plain)
        top = 1.4 * _ROW
        for (asked, sides, pair), height in zip(blocks, heights, strict=True):
            axes.text(0.1, top, "\n".join(asked), **muted)
            for place, (boxes, row) in enumerate(zip(sides, pair, strict=True)):
                left, y = 0.1 + place * _WIDTH / 2, top + len(asked) * _ROW
                for lines, score in boxes:
                    ground = score_colour(score) if score is not None else PICTURE.paper
                    inked: dict[str, Any] = plain | {"color": ink_on(ground)}
                    box = (left, y), _WIDTH / 2 - 0.2, len(lines) * _ROW - 0.02
                    axes.add_patch(_rectangle(*box, ground))
                    shown = "\n".join(lines)
                    axes.text(left + 0.45, y + 0.02, shown, **inked)
                    said = "?" if score is None else f"{score:.2f}"
                    axes.text(left + 0.05, y + 0.02, said, weight="bold", **inked)
                    y += len(lines) * _ROW
                axes.text(left, y + 0.03, "right answer" if row["right"] else "wrong answer", **plain)
            top += height * _ROW
        save_figure(figure, path)


def _rectangle(corner: tuple[float, float], width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="none")


def _wrapped(text: str, width: int) -> list[str]:
    question = text.removeprefix("Question: ").removesuffix("Answer:\n")
    return textwrap.wrap(question, width) or [""]


def _boxes(row: Answer) -> list[tuple[list[str], float | None]]:
    """Lines and score of each step."""
    plain = ("".join(c if _is_drawn(c) else "?" for c in step["text"]) for step in row["steps"])
    lines = [textwrap.wrap(text, _CHARACTERS) or [""] for text in plain]
    return [(one, step["score"]) for one, step in zip(lines, row["steps"], strict=True)]


def _is_drawn(character: str) -> bool:
    """Whether the font of the pictures has a character: Latin, currencies, signs of mathematics."""
    return character.isprintable() and (
        character < "\u0250" or "\u20a0" <= character < "\u20b0" or character in "\u2212\u2264"
    )


def draw_curves(rows: Sequence[Mapping[str, Any]], dataset: str, path: Path) -> None:
    """Draw held-out accuracy against rollouts: the mean over seeds of each arm, and how many seeds it has.

    Args:
        rows: Of the study.
        dataset: Its problems.
        path: The picture.

    Raises:
        ValueError: If there is no finished run.
    """
    runs = {arm: seeds for (found, arm), seeds in finished_runs(rows, benchmark="words").items() if found == dataset}
    if not runs:
        raise ValueError(f"There is no finished run on {dataset}.")
    with new_figure(7, 4) as figure:
        axes = figure.subplots()
        style_axes(axes, PICTURE)
        for number, (arm, seeds) in enumerate(runs.items()):
            points = sorted(set.intersection(*(set(run) for run in seeds.values())))
            means = [100 * np.mean([run[point]["accuracy"] for run in seeds.values()]) for point in points]
            line, marker = LINES[number // len(PICTURE.series) % len(LINES)]
            colour = PICTURE.series[number % len(PICTURE.series)]
            label = f"{arm} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
            axes.plot(points, means, line, marker=marker, color=colour, label=label)
        axes.set(xlabel="rollouts", ylabel="held-out accuracy, %")
        axes.legend(frameon=False, fontsize=9)
        save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, help="work folder of the recipe; none: draw the rows that there are")
    parser.add_argument("--arm", default="dense_outcome")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task_name", default="gsm_symbolic")
    parser.add_argument("--count", type=int, default=4, help="problems that are shown")
    parser.add_argument("--held_out", type=int, default=150, help="held-out problems of the study")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--pictures", type=Path, default=REPOSITORY / "docs", help="folder of the pictures")
    given = parser.parse_args(argv)
    file = given.results / "words_answers.jsonl"
    if given.work is not None:
        rows = collect(given.work, given.arm, given.seed, given.task_name, given.count, given.held_out)
        write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    shown = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    draw_answers(shown, given.pictures / "words_answers.png")
    draw_curves(read_results(given.results / "words.jsonl"), given.task_name, given.pictures / "words_curves.png")


if __name__ == "__main__":
    main()
