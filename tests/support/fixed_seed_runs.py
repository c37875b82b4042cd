"""Small trainings of a fixed seed, whose numbers must not change when the code around them does.

    python tests/support/fixed_seed_runs.py               compares with tests/data/fixed_seed_runs.json
    python tests/support/fixed_seed_runs.py --write       stores what this machine computes
    python tests/support/fixed_seed_runs.py --quickstart runs/quickstart/results.jsonl
                                                          compares a quickstart of seed 0 with the stored one (made
                                                          with OMP_NUM_THREADS=1; more threads change last digits)

Equal to the last digit on one kind of machine; elsewhere last digits differ, and the test skips with its reason.
Only public names are used, so that the runs outlive any change of the modules behind them.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fractal_rm import FractalConfig, FractalTrainer, StepPPOConfig, StepPPOTrainer, StepRewardModel

QUICKSTART = Path(__file__).resolve().parent.parent / "data" / "fixed_seed_quickstart.json"
STORED = Path(__file__).resolve().parent.parent / "data" / "fixed_seed_runs.json"
QUIET: dict[str, Any] = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 0,
}
# What a log says of time and not of numbers.
TIMES = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "step_time",
    "total_flos",
    "num_tokens",
    "eta",
    "profiling/",
)


# Small models and data ------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, **{c: i for i, c in enumerate(alphabet, 2)}}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def save_policy(folder: Path) -> str:
    """A causal language model that writes all kinds of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_encoder(folder: Path) -> str:
    """A sentence encoder that knows nothing: one token a letter."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    AutoModel.from_config(config).save_pretrained(folder / "transformer")
    tokenizer().save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "encoder"), create_model_card=False)
    return str(folder / "encoder")


def sums(count: int) -> list[dict[str, Any]]:
    """Sums in one to four steps, every other one wrong somewhere."""
    rng, rows = random.Random(0), []
    for number in range(count):
        depth, value, steps = rng.randint(1, 4), rng.randrange(10), []
        slip = rng.randrange(depth) if number % 2 else None
        prompt = f"{number}. Start at {value}.\n"
        for step in range(depth):
            change = rng.randrange(1, 5)
            result = value + change + (7 if step == slip else 0)
            steps.append(f"{value}+{change}={result}.")
            value = result
        labels = [int(step != slip) for step in range(depth)]
        rows.append({"prompt": prompt, "steps": steps, "step_labels": labels, "label": int(slip is None)})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    rows = sums(2 * count)
    return [
        {"prompt": good["prompt"], "chosen": good["steps"], "rejected": bad["steps"]}
        for good, bad in zip(rows[::2], rows[1::2], strict=True)
    ]


# Runs -----------------------------------------------------------------------------------------------------------------


def reward_training(folder: Path, scorer: str, rows: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    """Train a reward model for a few steps, save it, load it, score with it."""
    model = save_encoder(folder) if scorer == "embedding" else save_policy(folder / "policy")
    defaults: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    if scorer == "embedding":
        defaults["embedding_cache"] = ""
    args = FractalConfig(output_dir=str(folder / "rm"), scorer=scorer, **QUIET | defaults | options)
    rows = rows or sums(24)
    trainer = FractalTrainer(model, args=args, train_dataset=rows[:16], eval_dataset=rows[16:])
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model()
    texts = ["2+3=5.\n5+1=6.", "Nothing.\n\n7+7=1."]
    scored = StepRewardModel.from_pretrained(folder / "rm").score(prompts=["1?\n", "2?\n"], responses=texts)
    return {
        "log": numbers(trainer.state.log_history),
        "evaluation": numbers([evaluated]),
        "weights": digest(trainer.model),
        "scores": [[result.score, *result.step_scores] for result in scored],
    }


def count_of_letters(completions: list[str], **_: Any) -> list[float]:
    """An outcome in [0, 1]."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]


def lengths_of_steps(steps: list[list[str]], **_: Any) -> list[list[float]]:
    return [[len(text) / 24 for text in row] for row in steps]


def ppo(
    folder: Path, *, value_model: Any = None, number_of_models: int = 1, functions: Any = None, **options: Any
) -> Any:
    """Two updates of a policy, with a reward model that was trained for two steps."""
    policy = save_policy(folder / "policy")
    args = FractalConfig(
        output_dir=str(folder / "rm"),
        max_steps=2,
        learning_rate=1e-2,
        scorer="token",
        segmentation="pattern",
        pattern="[a-zA-Z]",
        **QUIET,
    )
    trained = FractalTrainer(policy, args=args, train_dataset=[row | {"steps": None} for row in responses()])
    trained.train()
    trained.save_model()
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 24,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
    }
    peft = {name: options.pop(name) for name in ("peft_config", "value_peft_config") if name in options}
    original = {"reward_model_dataset": responses()} if options.get("rm_update_every") else {}
    trainer = StepPPOTrainer(
        policy,
        reward_model=[str(folder / "rm")] * number_of_models,
        reward_funcs=options.pop("reward_funcs", [count_of_letters]),
        value_model=str(folder / "value") if value_model == "path" else value_model,
        step_reward_funcs=functions,
        args=StepPPOConfig(output_dir=str(folder / "out"), **QUIET | defaults | options),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in sums(8)]),
        **peft,
        **original,
    )
    trainer.train()
    found = {"log": numbers(trainer.state.log_history), "weights": digest(trainer.model)}
    if trainer.value_model is not None:
        found["value_weights"] = digest(trainer.value_model)
    return found


def responses() -> list[dict[str, Any]]:
    rows = []
    for row in sums(40):
        text = " then ".join(row["steps"])
        rows.append({"prompt": row["prompt"], "completion": text, "label": bool(row["label"])})
    return rows


GOLD: dict[str, Any] = {"instance_weight": 1.0, "gold_fraction": 0.2}
STAGES = GOLD | {"gold_selection": "uncertainty", "hybrid_prior_weight": 0.5, "pseudo_labels": "hard"}
LORA: dict[str, Any] = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
RUNS: dict[str, Callable[[Path], Any]] = {
    **{
        f"reward model, {scorer}": partial(reward_training, scorer=scorer)
        for scorer in ("likelihood", "token", "embedding")
    },
    **{
        f"reward model, {scorer}, all stages": partial(reward_training, scorer=scorer, **STAGES)
        for scorer in ("likelihood", "token", "embedding")
    },
    "reward model, soft pseudo-labels": partial(reward_training, scorer="token", pseudo_labels="soft", pseudo_rounds=2),
    "reward model, product and label noise": partial(
        reward_training, scorer="likelihood", aggregation="product", missed_bad=0.1
    ),
    "reward model, preferences": partial(reward_training, scorer="token", rows=pairs(24), aggregation="mean"),
    "reward model, priors": partial(
        reward_training, scorer="embedding", cosine_prior_weight=0.2, correlation_prior_weight=0.1, aggregation="max"
    ),
    "reward model, grades": partial(
        reward_training,
        scorer="embedding",
        rows=[{"prompt": row["prompt"], "steps": row["steps"], "label": i % 4} for i, row in enumerate(sums(24))],
        aggregation="max",
        num_grades=4,
    ),
    "ppo, gae": ppo,
    "ppo, gae, centred over the batch": partial(ppo, center="batch"),
    "ppo, gae, outcome only in the reward": partial(ppo, step_weight=0.0),
    "ppo, gae, value model from the reward model": partial(ppo, value_model="reward_model"),
    "ppo, gae, shared value model": partial(ppo, value_model="shared"),
    "ppo, gae, two epochs of two minibatches": partial(ppo, num_iterations=2, steps_per_generation=2, max_steps=4),
    "ppo, gae, shared value model, two epochs": partial(ppo, value_model="shared", num_iterations=2, max_steps=4),
    "ppo, gae, adapters": partial(ppo, peft_config=LoraConfig(**LORA), value_peft_config=LoraConfig(**LORA), beta=0.1),
    "ppo, gae, KL in the reward": partial(ppo, kl_coef=0.1),
    "ppo, gae, one completion a prompt": partial(ppo, num_generations=1),
    "ppo, gae, two reward models and a function": partial(ppo, number_of_models=2, functions=lengths_of_steps),
    "ppo, gae, steps only": partial(ppo, reward_funcs=None),
    "ppo, group": partial(ppo, advantage="group"),
    "ppo, group, all later steps": partial(ppo, advantage="group", step_gamma=1.0, beta=0.1),
    "ppo, global": partial(ppo, advantage="global"),
    "ppo, global, delta": partial(ppo, advantage="global", shaping="delta", kl_coef=0.1),
    "ppo, group, min form": partial(ppo, advantage="group", shaping="min_form", step_gamma=1.0),
    "ppo, group, reward model that learns on": partial(
        ppo, advantage="group", rm_update_every=1, rm_update_steps=2, rm_holdout_share=0.5, max_steps=3
    ),
}


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a log says, without times."""
    return [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in sorted(entry.items())
            if isinstance(value, int | float | str) and not any(part in name for part in TIMES)
        }
        for entry in history
    ]


def digest(model: Any) -> str:
    """A hash of all weights, to the last bit."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.split("module.")[-1].encode())
        found.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()[:16]


def machine() -> str:
    """What decides the last digit."""
    model = platform.processor() or "unknown"
    if Path("/proc/cpuinfo").is_file():
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        model = " ".join(value.strip() for name, value in fields.items() if name.strip() in ("model name", "model"))
    return f"{model}, torch {torch.__version__}, transformers {transformers.__version__}"


def compute(name: str) -> Any:
    """Run one, in a folder of its own."""
    torch.manual_seed(0)
    random.seed(0)
    quiet = StringIO()  # every training prints its log
    with redirect_stdout(quiet), redirect_stderr(quiet), tempfile.TemporaryDirectory() as folder:
        return json.loads(json.dumps(RUNS[name](Path(folder))))


def quickstart_rows(results: Path) -> list[dict[str, Any]]:
    """What the rows of a quickstart say, without commands and times."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in ("benchmark", "arm", "seed", "split", "metrics")} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="store what this machine computes")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    parser.add_argument("--quickstart", type=Path, help="results.jsonl of a quickstart of seed 0, to compare")
    arguments = parser.parse_args()
    if arguments.quickstart:
        pairs = zip(quickstart_rows(arguments.quickstart), json.loads(QUICKSTART.read_text()), strict=True)
        differing = [number for number, (found, kept) in enumerate(pairs, 1) if found != kept]
        print(f"rows that differ: {differing or 'none'}")
        return len(differing)
    torch.set_num_threads(1)
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {"machine": machine(), "runs": {}}
    if arguments.write:
        stored["machine"] = machine()
    differing = 0
    for name in RUNS:
        if arguments.only not in name:
            continue
        found = compute(name)
        if arguments.write:
            stored["runs"][name] = found
        equal = found == stored["runs"].get(name)
        differing += not equal
        print("equal    " if equal else "DIFFERENT", name, flush=True)
        if not equal and name in stored["runs"]:
            for part, value in found.items():
                if value != stored["runs"][name].get(part):
                    print("   ", part, str(value)[:2000], "\n    was", str(stored["runs"][name].get(part))[:2000])
    if arguments.write:
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    return differing


if __name__ == "__main__":
    sys.exit(main() > 0)
