"""Supervised fine-tuning of the policy: low-rank adapters on the upper layers, from reference solutions.

    python recipes/words/policy.py --model runs/words/smollm2-135m --output_dir runs/words/policy

Writes `adapter/` (a few MB) and, with the adapter merged, an ordinary model folder `model/`. One thread in bfloat16 is
the fastest on a busy CPU. A stopped run continues from its last checkpoint when it is started again.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fractal_rm.cli.options.arguments import DataArguments
from fractal_rm.cli.options.tasks import TaskArguments, make_task
from fractal_rm.files import made_once, replacing
from fractal_rm.tasks.gym import demonstrations

CHECKPOINT_EVERY = 25
SHOW_EVERY = 10
WARMUP = 0.05
# Number of batches whose texts are sorted by length together, so batches have little padding.
SORTED_BATCHES = 16

# Calculations of reference solutions in a drill, one per line: most mistakes of a small model are wrong results.
DRILL_PROMPT, DRILL_LINES = "Calculate.\n", 12
CALCULATION = re.compile(r"(?<![\d.,*/+-])(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)(?![\d.,]*\d)")

Row = tuple[list[int], list[int]]  # token ids of the prompt, and of the solution with its end


def tokenize(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Token ids of prompts and solutions, tokenized separately: no token crosses the end of the prompt."""
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    solutions = tokenizer([solution for _, solution in texts], add_special_tokens=False)["input_ids"]
    return [(p, [*s, tokenizer.eos_token_id]) for p, s in zip(prompts, solutions, strict=True)]  # type: ignore[list-item]


def drills(solutions: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of calculations from solutions, in random order.

    Raises:
        ValueError: If the solutions have too few calculations.
    """
    found = [" ".join((a, sign, b, "=", c)) for text in solutions for a, sign, b, c in CALCULATION.findall(text)]
    if len(found) < count * DRILL_LINES:
        raise ValueError(
            f"{len(solutions)} solutions have {len(found)} calculations; {count} drills need {count * DRILL_LINES}. "
            "Lower `drills`, or raise `solutions`."
        )
    random.Random(seed).shuffle(found)
    lines = [found[i * DRILL_LINES : (i + 1) * DRILL_LINES] for i in range(count)]
    return [(DRILL_PROMPT, "\n".join(one)) for one in lines]


def batches(rows: Sequence[Row], size: int, epochs: int, seed: int) -> Iterator[list[Row]]:
    """Batches of similar length in random order; the same arguments give the same batches."""
    rng = random.Random(seed)
    for _ in range(epochs):
        order = list(range(len(rows)))
        rng.shuffle(order)
        made = []
        for start in range(0, len(order), size * SORTED_BATCHES):
            near = sorted(order[start : start + size * SORTED_BATCHES], key=lambda i: len(rows[i][0]) + len(rows[i][1]))
            made += [[rows[i] for i in near[k : k + size]] for k in range(0, len(near), size)]
        rng.shuffle(made)
        yield from made


def solution_loss(model: Any, batch: Sequence[Row], pad: int, device: torch.device) -> torch.Tensor:
    """Mean cross entropy of the tokens of the solutions, in nats.

    The head runs on the solutions only: on a small model with a large vocabulary it is a large share of the work.
    """
    width = max(len(p) + len(s) for p, s in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    learned = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, (p, s) in enumerate(batch):
        ids[i, : len(p) + len(s)] = torch.tensor(p + s)
        mask[i, : len(p) + len(s)] = 1
        learned[i, len(p) : len(p) + len(s)] = True
    ids, mask, learned = ids.to(device), mask.to(device), learned.to(device)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = causal.lm_head(hidden[:, :-1][learned[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][learned[:, 1:]])


def adapt(model: Any, layers: int, rank: int) -> Any:
    """Low-rank adapters (scale 1) on all linear modules of the upper layers; the rest is frozen."""
    depth = model.config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"`layers` is {layers}; the model has {depth}.")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(depth - layers, depth)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def start_from(model: PeftModel, adapter: Path) -> None:
    """Load the adapters of a folder that this script wrote.

    Raises:
        ValueError: If they have another shape, or belong to another model.
    """
    found = load_file(adapter / "adapter_model.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(model).items()}
    if shapes != {name: tuple(weight.shape) for name, weight in found.items()}:
        raise ValueError(
            f"{adapter} is an adapter of another model, or of other `layers` and `lora_r`. Give its values."
        )
    set_peft_model_state_dict(model, found)


def train(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fine-tune, from the last checkpoint if there is one, and write the adapter; returns what was measured."""
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    chosen = TaskArguments(task=arguments.task, task_name=arguments.task_name or None)
    task = make_task(chosen, DataArguments(data_dir=arguments.data_dir), arguments.model)
    # Drills come from further solutions, which have about two plainly written calculations each.
    wanted = arguments.solutions + arguments.drills * DRILL_LINES
    texts = demonstrations(task.problems("train", wanted if arguments.drills else arguments.solutions, arguments.seed))
    drilled = drills([solution for _, solution in texts[arguments.solutions :]], arguments.drills, arguments.seed)
    rows = tokenize([*texts[: arguments.solutions], *drilled], tokenizer)
    model = adapt(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, trust_remote_code=False).to(device),
        arguments.layers,
        arguments.lora_r,
    )
    if arguments.adapter:
        start_from(model, Path(arguments.adapter))
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    steps = arguments.epochs * -(-len(rows) // arguments.batch_size)
    if arguments.max_steps > 0:
        steps = min(steps, arguments.max_steps)
    warmup = max(1, round(WARMUP * steps))
    print(f"{len(rows)} texts, {steps} steps, {sum(w.numel() for w in weights):,} weights", flush=True)

    checkpoint, settings, done, seconds, losses = folder / "checkpoint.safetensors", settings_of(arguments), 0, 0.0, []
    if checkpoint.is_file():
        state = read_state(checkpoint)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} is from a run with other settings. Choose another output_dir or remove it.")
        load_tensors(checkpoint, model, optimizer)
        done, seconds, losses = state["step"], state["seconds"], state["losses"]
        print(f"Continues from step {done} of {steps}.", flush=True)

    before, tokens, start = seconds, 0, time.monotonic()
    for step, batch in enumerate(batches(rows, arguments.batch_size, arguments.epochs, arguments.seed)):
        if step < done:
            continue
        if step >= steps:
            break
        rate = min((step + 1) / warmup, max(0.02, (steps - step) / (steps - warmup + 1)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate
        with torch.autocast(device.type, torch.bfloat16):
            loss = solution_loss(model, batch, tokenizer.pad_token_id, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(len(p) + len(s) for p, s in batch)
        seconds = before + time.monotonic() - start
        if (step + 1) % SHOW_EVERY == 0:
            speed = tokens / (seconds - before)
            recent = sum(losses[-SHOW_EVERY:]) / len(losses[-SHOW_EVERY:])
            print(f"step {step + 1}/{steps}: loss {recent:.3f}, {speed:.0f} tokens/s, {seconds:.0f} s", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {"settings": settings, "step": step + 1, "seconds": seconds, "losses": losses}
            save_checkpoint(checkpoint, model, optimizer, state)
    model.save_pretrained(folder / "adapter")
    return {"loss": sum(losses[-20:]) / len(losses[-20:]), "steps": steps, "seconds": round(seconds)}


def save_checkpoint(file: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write the adapter and the optimizer as tensors, and everything else as JSON in the metadata of that file."""
    tensors = {f"weights/{name}": value.contiguous() for name, value in get_peft_model_state_dict(model).items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": value.contiguous() for name, value in values.items()}
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})


def read_state(file: Path) -> dict[str, Any]:
    """What [`save_checkpoint`] wrote in addition to the tensors."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["state"])


def load_tensors(file: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of [`save_checkpoint`] where they came from."""
    weights, moments = {}, {}
    for key, value in load_file(file).items():
        kind, _, name = key.partition("/")
        if kind == "weights":
            weights[name] = value
        else:
            number, _, moment = name.partition("/")
            moments.setdefault(int(number), {})[moment] = value
    set_peft_model_state_dict(model, weights)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a checkpoint belongs to."""
    places = ("output_dir", "device", "model")
    return {name: value for name, value in vars(arguments).items() if name not in places and value != ""}


def merge(base: str, adapter: Path, folder: Path) -> None:
    """Write an ordinary model folder with the adapter merged into the weights, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=False
    )  # merged in float32, rounded once
    merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[operator]
    merged.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="runs/words/smollm2-135m", help="folder or hub id of a causal LM")
    parser.add_argument("--output_dir", default="runs/words/policy")
    parser.add_argument("--adapter", default="", help="continue from the adapter in this folder, with a new schedule")
    parser.add_argument("--task", default="reasoning_gym", choices=["reasoning_gym", "word_problems"])
    parser.add_argument("--task_name", default="gsm_symbolic", help="data set with solutions; empty for word_problems")
    parser.add_argument("--data_dir", help="folder of word_problems")
    parser.add_argument("--solutions", type=int, default=3200, help="0: no training; `adapter` is merged into `model`")
    parser.add_argument("--drills", type=int, default=0, help="texts of calculations to learn in addition to solutions")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=20, help="upper layers that get adapters")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--max_steps", type=int, default=-1, help="end after this many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if not arguments.solutions and not (Path(arguments.adapter or "-") / "adapter_config.json").is_file():
        sys.exit("policy: `solutions` is 0, so there is nothing to learn from. Give `adapter`, a folder to merge.")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not arguments.solutions:
            made_once(folder / "model", lambda partial: merge(arguments.model, Path(arguments.adapter), partial))
            print(f"{folder / 'model'} holds the policy: {arguments.model} with the adapter {arguments.adapter}.")
            return
        measured = train(arguments, folder)
        made_once(folder / "model", lambda partial: merge(arguments.model, folder / "adapter", partial))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"policy: {error}")
    with replacing(folder / "metrics.json") as file:
        file.write_text(json.dumps(measured | {"settings": settings_of(arguments)}, indent=2) + "\n")
    print(f"{folder / 'model'} holds the policy; loss of the last 20 steps {measured['loss']:.3f}")


if __name__ == "__main__":
    main()
