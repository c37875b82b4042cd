"""Checks of `StepPPOTrainer` before it samples a completion; each error is one sentence."""

import http.client
import inspect
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig
from trl.trainer import utils as trl_utils

from fractal_rm.data.prompts import is_chat, yields_names
from fractal_rm.data.shapes import TEMPLATE_OPTIONS
from fractal_rm.errors import reason
from fractal_rm.hf.parallelism import check_online_training, check_separate_value_model, check_whole_model
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.sources import numbered
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import check_finite, load_tokenizer
from fractal_rm.scorers.folder import check_model_folder
from fractal_rm.scorers.inputs import prompt_text
from fractal_rm.scorers.published import PublishedSettings

# Seconds to wait for one reply of a vLLM server, and between two requests.
_ANSWER, _PAUSE = 5.0, 1.0
# Every tokenizer and multimodal processor saves a file whose name begins with one of these.
_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "tekken", "processor_config")
# Number of prompts that every reward model encodes before training, as a check.
_READ_PROMPTS = 256
# What TRL passes to every reward function, in addition to the data set's columns.
_TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load_checked(
    args: StepPPOConfig,
    *,
    policy: Any,
    tokenizer: Any,
    reward_models: Sequence[Any],
    outcomes: Sequence[Any],
    step_functions: Sequence[Any],
    value_model: Any,
    value_peft_config: Any,
    reward_model_dataset: Any,
    train_dataset: Any,
    eval_dataset: Any,
    tools: Any,
    environments: Any,
) -> list[StepRewardModel]:
    """Check the arguments of `StepPPOTrainer`, cheap checks first, and return the loaded reward models.

    Raises:
        ConnectionError: If no vLLM server answers.
        TypeError: If a function cannot be called with the arguments it will get.
        ValueError: If an argument is missing, has no effect, or does not suit the others.
    """
    if not (outcomes or step_functions or reward_models):
        raise ValueError(
            "There is no reward. Give a `reward_model` or `step_reward_funcs` (dense), `reward_funcs` (outcome), "
            "or several of them."
        )
    check_value_arguments(args, value_model, value_peft_config)
    _check_datasets(train_dataset, eval_dataset)
    args.check_evaluation(eval_dataset)
    _check_columns(train_dataset)
    config = _check_policy(policy)
    check_setup(args, policy, tokenizer, eval_dataset)
    if any(map(is_chat, _first_prompt(train_dataset))) and (tokenizer or not _is_adapter(_path_of(policy))):
        check_chat_template("the policy", tokenizer or load_tokenizer(_path_of(policy)))
    check_prompt_lengths(config, lambda: tokenizer or load_tokenizer(_path_of(policy)), train_dataset)
    check_step_functions(step_functions, args, train_dataset)
    models = [
        one if isinstance(one, StepRewardModel) else StepRewardModel.from_pretrained(one) for one in reward_models
    ]
    check_reward_models(models, train_dataset)
    sets = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
    _check_readable(models, args, [train_dataset, *sets], tools, environments)
    if reward_model_dataset is not None and not args.rm_update_every:
        raise ValueError("`reward_model_dataset` needs `rm_update_every`, which is 0. Set it, or leave the data out.")
    if args.rm_update_every and not models:
        raise ValueError("`rm_update_every` needs a `reward_model` to update. Give one, or set it to 0.")
    return models


def check_engine(trainer: Any, reward_models: Sequence[StepRewardModel]) -> None:
    """Raise ValueError, once TRL's trainer is built, if weights are sharded that must be complete."""
    args = trainer.args
    check_finite(_path_of(trainer.policy) or "The policy", trainer.policy)
    if args.on_alarm == "rollback" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("`on_alarm='rollback'` cannot restore sharded weights. Use `on_alarm='stop'`.")
    if args.advantage == "gae":
        check_separate_value_model(trainer)
    for model in reward_models:
        check_whole_model(trainer, model.scorer, "the reward model")
    if args.rm_update_every:
        check_online_training(trainer)


def _check_datasets(train: Any, evaluation: Any) -> None:
    """Raise unless data is given as data sets with prompts; evaluation data may be a dictionary of them."""
    sets = evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]
    for name, given in [("train_dataset", train), *(("eval_dataset", one) for one in sets)]:
        if isinstance(given, Sequence) or yields_names(given):
            raise TypeError(
                f"`{name}` is a {type(given).__name__}. Give a `datasets.Dataset`: `Dataset.from_list(rows)`, "
                "`Dataset.from_pandas(frame)`, or one split of a DatasetDict."
            )
        if isinstance(given, Dataset) and not len(given):
            raise ValueError(f"`{name}` has no rows. Give at least one.")
        if isinstance(given, Dataset) and "prompt" not in given.column_names:
            names = ", ".join(map(repr, given.column_names))
            raise ValueError(f"`{name}` has no column 'prompt' (found: {names}). Rename the one with the prompts.")


def _check_columns(dataset: Any) -> None:
    """Raise ValueError if a column has the name of an argument that TRL gives to every reward function."""
    # TRL itself drops a column `completion_ids`.
    taken = [name for name in _columns(dataset) if name in _TRL_ARGUMENTS and name != "completion_ids"]
    if taken:
        raise ValueError(
            f"The data set has a column {taken[0]!r}, but reward functions get an argument of that name from the "
            "rollout. Rename or drop the column."
        )


def check_prompt_lengths(config: Any, tokenizer: Callable[[], Any], dataset: Any) -> None:
    """Raise ValueError if the longest prompt exceeds the policy's maximum length; streaming data sets pass.

    `config` is None if it is unknown; `tokenizer` is called only if a prompt may be too long.
    """
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    prompts = list(dataset["prompt"]) if "prompt" in _columns(dataset) else []
    longest = max(range(len(prompts)), key=lambda row: len(str(prompts[row])), default=None)
    if limit is None or longest is None or len(str(prompts[longest])) <= limit:  # a token has at least one character
        return
    prompt = prompts[longest]
    if is_chat(prompt) and not all(isinstance(message.get("content"), str) for message in prompt):  # pictures
        return
    words = tokenizer()
    tokens = len(words(str(prompt_text(prompt, words, "{prompt}")), add_special_tokens=False)["input_ids"])
    if tokens >= limit:
        raise ValueError(
            f"Row {longest + 1} of the prompts has {tokens:,} tokens, but the policy reads {limit:,}, with the "
            "completion. Drop or shorten such prompts."
        )


def check_value_arguments(args: StepPPOConfig, value_model: Any, value_peft_config: Any) -> None:
    """Raise ValueError for arguments of a value model that would have no effect."""
    if args.advantage != "gae" and not (value_model is None and value_peft_config is None):
        name = "value_model" if value_model is not None else "value_peft_config"
        raise ValueError(f"`advantage='{args.advantage}'` uses no `{name}`. Leave it out or set `advantage='gae'`.")
    if isinstance(value_model, str) and value_model == "shared" and value_peft_config is not None:
        raise ValueError(
            "`value_model='shared'` has no backbone of its own that `value_peft_config` could adapt. Leave one out."
        )


def check_setup(args: StepPPOConfig, model: Any, processing_class: Any, eval_dataset: Any) -> None:
    """Checks that need no model: the policy's tokenizer, evaluation batches of whole groups, the vLLM server.

    Raises ConnectionError if no vLLM server answers, ValueError for the others.
    """
    if processing_class is None:
        _check_tokenizer(_path_of(model))
    if eval_dataset is not None:
        generations = args.num_generations_eval or args.num_generations or 1
        batch = args.per_device_eval_batch_size * args.world_size
        if batch % generations:
            raise ValueError(
                f"An evaluation batch has {batch} completions (`per_device_eval_batch_size` x processes), which is "
                f"not a multiple of {generations}, the size of a group. Set `num_generations_eval` to 1, or to a "
                f"divisor of {batch}."
            )
    if args.use_vllm and args.vllm_mode == "server" and args.process_index == 0:  # the process that calls it
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        wait_for_vllm(url.rstrip("/"), args.vllm_server_timeout)


def _check_policy(policy: Any) -> Any:
    """The configuration of a policy; None for an adapter, whose base model has it.

    Raises ValueError if the files of a policy to be loaded are damaged, or its configuration needs custom code.
    """
    if not isinstance(policy, str):
        return policy.config
    if _is_adapter(policy):
        return None
    check_model_folder(policy, "Give the folder or hub id of the policy.")
    try:
        return AutoConfig.from_pretrained(policy, trust_remote_code=False)
    except Exception as error:  # damaged files make libraries raise anything
        raise ValueError(
            f"{policy} cannot be loaded as the policy ({reason(error)}). Give a causal language model that "
            "transformers supports natively: code that comes with a model is never run."
        ) from error


def _path_of(policy: Any) -> str:
    """Path or hub id of a policy; empty if it was built in code."""
    return policy if isinstance(policy, str) else getattr(policy.config, "_name_or_path", None) or ""


def _is_adapter(name: str) -> bool:
    """Whether a policy is a folder with an adapter, which uses its base model's tokenizer."""
    return (Path(name) / "adapter_config.json").is_file()


def _check_tokenizer(name: str) -> None:
    """Raise if there is no tokenizer and the policy is a local folder or has no name; hub ids pass."""
    folder = Path(name)
    if not name:
        raise ValueError("The policy was built in code, so its tokenizer is unknown. Give it as `processing_class`.")
    if not folder.is_dir() or _is_adapter(name):
        return
    if not any(path.name.startswith(_TOKENIZER_FILES) for path in folder.iterdir()):
        raise ValueError(
            f"{name} has a policy without a tokenizer. Save its tokenizer there, or give it as `processing_class`."
        )


def wait_for_vllm(url: str, seconds: float) -> None:
    """Wait for a healthy vLLM server before the policy is loaded; raises ConnectionError if it is not healthy in
    time."""
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_ANSWER) as answer:
                if answer.status == 200:
                    return
                reason = f"status {answer.status}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error)
        if time.monotonic() + _PAUSE > until:
            raise ConnectionError(
                f"No vLLM server answers at {url} ({reason}). Start one with `vllm serve`, set `vllm_server_base_url`, "
                "or raise `vllm_server_timeout` to wait for one that is starting."
            )
        time.sleep(_PAUSE)


def check_reward_models(models: Sequence[StepRewardModel], train_dataset: Any) -> None:
    """Raise ValueError if a reward model cannot cut completions into steps, or does not suit the kind of the prompts.

    Streaming data sets are not read.
    """
    prompts = _first_prompt(train_dataset)
    for which, model in numbered(models):
        if model.segmentation.method == "given":
            raise ValueError(
                f"{which} was trained on data with given steps, so it cannot cut completions into steps. Train it "
                "with a `segmentation`, or set one in its `settings`."
            )
        model.check_prompts(prompts)
        if any(map(is_chat, prompts)) and not isinstance(model.settings, PublishedSettings):
            check_chat_template(f"{which[0].lower()}{which[1:]}", model.tokenizer)


def _check_readable(
    models: Sequence[StepRewardModel], args: StepPPOConfig, datasets: Sequence[Any], tools: Any, environments: Any
) -> None:
    """Raise ValueError if a reward model cannot read one of the first prompts of a data set with a length."""
    options = args.template_options(tools)
    if models and isinstance(environments, Mapping) and len(environments) > 1:
        raise ValueError(
            f"`environment_factory` names {len(environments)} environments. The policy reads the tools of one in each "
            "prompt, and reward models would read the tools of all. Give one environment, or leave `reward_model` out."
        )
    for dataset in datasets if models else ():
        first, columns = _first_prompt(dataset), _columns(dataset)
        lost = [name for name in TEMPLATE_OPTIONS if name in columns and any(dataset[0:_READ_PROMPTS][name])]
        lost = lost if any(map(is_chat, first)) else []
        if lost:
            raise ValueError(
                f"The data has a column {lost[0]!r}, which reaches neither the chat template of the policy nor that of "
                "reward models. Give `tools` to the trainer and others as `chat_template_kwargs`, and drop the column."
            )
    for which, model in numbered(models):
        if (tools or environments) and isinstance(model.settings, PublishedSettings):
            given = "tools" if tools else "environment_factory"
            raise ValueError(
                f"{which} is a published model that reads one turn, but with `{given}` completions have several. Train "
                f"a reward model on conversations, or leave `{given}` out."
            )
        for dataset in datasets:
            prompts = dataset[0:_READ_PROMPTS]["prompt"] if "prompt" in _columns(dataset) else []
            model.check_readable(prompts, chat_template_kwargs=options, which=which)


def check_step_functions(functions: Sequence[Callable[..., Any]], args: StepPPOConfig, train_dataset: Any) -> None:
    """Check that functions accept the columns of the data set; a streaming data set has unknown columns.

    Raises TypeError if something is not callable with these arguments, ValueError if a column is called `steps` or an
    option lacks its functions.
    """
    if not functions and args.step_segmentation is not None:
        raise ValueError(
            "`step_segmentation` needs `step_reward_funcs`, and there are none; a reward model cuts as it was "
            "trained. Leave it out."
        )
    columns = _columns(train_dataset)
    if functions and "steps" in columns:
        raise ValueError(
            "The data set has a column `steps`, but `step_reward_funcs` get the completions' steps under that name. "
            "Rename it: `dataset.rename_column('steps', 'reference_steps')`."
        )
    passed = {name for name in columns if name not in ("prompt", "completion")} | {*_TRL_ARGUMENTS, "steps"}
    for function in functions:
        if not callable(function):
            raise TypeError(
                f"`step_reward_funcs` contains a {type(function).__name__}. Give functions; models belong in "
                "`reward_model`."
            )
        try:
            signature = inspect.signature(function)
        except ValueError:  # written in C
            continue
        try:
            signature.bind(**dict.fromkeys(passed)) if columns else signature.bind_partial(**dict.fromkeys(passed))
        except TypeError as error:
            name = trl_utils.get_callable_name(function)
            raise TypeError(
                f"`{name}` cannot be called with {', '.join(sorted(passed))}: {error}. Let it take the columns it "
                "reads and `steps` by name, and the others as `**kwargs`."
            ) from None


def check_chat_template(owner: str, tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer has no chat template; an embedding scorer needs none."""
    if tokenizer is not None and not tokenizer.chat_template:
        raise ValueError(
            f"The prompts are chats, but the tokenizer of {owner} has no chat template. Set its `chat_template`, use a "
            "chat model, or give the prompts as text."
        )


def _first_prompt(dataset: Any) -> list[Any]:
    """The first prompt, as a list: a column has one kind. Empty without prompts, or for streaming data."""
    return dataset[0:1]["prompt"] if "prompt" in _columns(dataset) else []


def _columns(dataset: Any) -> list[str]:
    return dataset.column_names if isinstance(dataset, Dataset) else []
