"""Small trainings of reward models."""

from pathlib import Path
from typing import Any

from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from support.models import byte_tokenizer, make_model, sums, wordpiece_tokenizer

ROWS = sums(16)


def make(
    folder: Path,
    rows: Any = ROWS,
    *,
    scorer: str = "likelihood",
    family: str = "llama",
    eval_rows: Any = None,
    peft_config: Any = None,
    tokenizer: Any = None,
    model: Any = None,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> FractalTrainer:
    defaults: dict[str, Any] = {
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return FractalTrainer(
        model or make_model(scorer, family, **model_options or {}),
        args=FractalConfig(output_dir=str(folder), scorer=scorer, **defaults | options),  # type: ignore[arg-type]
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer or (wordpiece_tokenizer() if family == "bert" else byte_tokenizer(merges=True)),
        peft_config=peft_config,
    )
