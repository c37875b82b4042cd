"""Samples solutions of GSM8K training questions from a policy and labels each by its final answer.

    python recipes/gsm8k_ppo/sample.py --model Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/gsm8k/solutions

Writes `train.jsonl` and, for every tenth question, `validation.jsonl`: rows with `prompt`, `completion` and `label`,
as `fractal-rm train` reads them. Question and answer come from the training split: the test split stays unseen.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from fractal_rm.cli.arguments import DataArguments
from fractal_rm.cli.checks import check_models, check_writable_folder
from fractal_rm.cli.parser import parse
from fractal_rm.files import write_atomic
from fractal_rm.scorers.checkpoint import load_tokenizer
from fractal_rm.scorers.inputs import prompt_text
from fractal_rm.tasks.gsm8k import gsm8k_answer, read_gsm8k
from fractal_rm.tasks.task import sample_responses


@dataclass
class SampleArguments:
    """What to sample from, and where it goes."""

    model: str = field(metadata={"help": "Policy: path or hub id of a causal language model."})
    output_dir: str = field(metadata={"help": "Where train.jsonl and validation.jsonl go."})
    samples: int = field(default=4, metadata={"help": "Solutions of each question."})
    chat: bool = field(default=True, metadata={"help": "Ask in a chat, for models with a chat template; else as text."})
    max_new_tokens: int = field(default=320, metadata={"help": "Where a solution is cut off."})
    batch_size: int = field(default=128, metadata={"help": "Solutions sampled at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


def main(argv: Sequence[str]) -> None:
    """Sample, label, write."""
    arguments, data = parse("sample", [SampleArguments, DataArguments], argv)
    if data.train_file is None and data.dataset_name is None:
        data.dataset_name, data.dataset_config = "openai/gsm8k", "main"
    folder = Path(arguments.output_dir)
    check_writable_folder(folder)
    check_models(arguments.model)
    rows, source = data.read("train")
    problems = read_gsm8k(rows, source=source, chat=arguments.chat)
    tokenizer = load_tokenizer(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)

    torch.manual_seed(arguments.seed)
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    step = max(1, arguments.batch_size // arguments.samples)
    for start in track(range(0, len(problems), step), description="Sampling"):
        chosen = [problem for problem in problems[start : start + step] for _ in range(arguments.samples)]
        texts = [prompt_text(problem["prompt"], tokenizer, "{prompt}") for problem in chosen]
        solutions = sample_responses(
            model, tokenizer, texts, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size
        )
        answers = [problem["answer"] for problem in chosen]
        labels = gsm8k_answer(texts, solutions, answers)
        for place, (problem, solution, label) in enumerate(zip(chosen, solutions, labels, strict=True)):
            question = start + place // arguments.samples
            if solution.strip():
                row = {"prompt": problem["prompt"], "completion": solution, "label": label}
                lines["validation" if question % 10 == 9 else "train"].append(json.dumps(row, ensure_ascii=False))
    for split, written in lines.items():
        write_atomic(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in written))
        print(f"{folder / split}.jsonl: {len(written)} solutions")


if __name__ == "__main__":
    main(sys.argv[1:])
