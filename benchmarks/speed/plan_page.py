"""Tables of `fractal-rm plan`: formulas against measurements for docs/speed.md, and models for recipes/gsm8k_ppo."""

from dataclasses import replace
from typing import Any

import yaml

from benchmarks.common.places import REPOSITORY
from fractal_rm.cli.plan import GIGABYTE, read_gpu
from fractal_rm.ppo.plan import MODELS, Run, hours, memory, reward_training_memory
from fractal_rm.report.tables import markdown_table

RECIPE = REPOSITORY / "recipes" / "gsm8k_ppo" / "config.yaml"
# Responses that the reward model of the recipe trains on: 6,700 prompts, four each.
SAMPLED = 26_800
SHOWN = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B")
VLLM_SHARE = 0.3
CHECKED = ("peak_gb", "formula_gb", "peak_over_formula", "kept_over_formula", "seconds_over_formula")


def recipe_table() -> str:
    """Memory and hours of usual models under the settings of the recipe's configuration, on a card of 24 GB."""
    config, gpu = yaml.safe_load(RECIPE.read_text(encoding="utf-8")), read_gpu("RTX-3090", None)
    rows: list[dict[str, Any]] = []
    for name in SHOWN:
        run = Run(
            policy=MODELS[name],
            reward=MODELS[name],
            lora_rank=config["lora_r"],
            dtype=config["model_init_kwargs"]["dtype"],
            completion=config["max_completion_length"],
            rollouts=config["per_device_train_batch_size"] * config["gradient_accumulation_steps"],
            micro_batch=config["per_device_train_batch_size"],
            checkpointing=config["gradient_checkpointing"],
        )
        ways = {"": run, ", batches of 1": replace(run, micro_batch=1)}
        ways[", vLLM"] = replace(run, vllm=VLLM_SHARE)
        ways[", vLLM, sleep"] = replace(run, vllm=VLLM_SHARE, sleep=True)
        for way, one in ways.items():
            total = memory(one, gpu)["total"]
            spent = hours(one, gpu, updates=config["max_steps"], sampled=SAMPLED)
            trained = reward_training_memory(one)["total"]
            metrics = {"train_gb": trained / GIGABYTE, "ppo_gb": total / GIGABYTE}
            metrics["fits"] = int(max(trained, total) <= gpu.usable * gpu.memory)
            rows.append({"arm": f"{name}{way}", "metrics": metrics | {f"{key}_h": v for key, v in spent.items()}})
    return markdown_table(rows)
