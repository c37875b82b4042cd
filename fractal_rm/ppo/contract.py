"""The engine's assumptions about TRL's internals, compared with the installed TRL.

`engine.py` overrides private methods of `trl.GRPOTrainer`, and TRL may change those in any release. The tables of this
module list everything it uses (a test compares them with the engine's source), and `check_contract` reports each
difference in one sentence: before training, instead of a traceback or silently wrong advantages.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import ModuleType

import transformers
import trl
from packaging.version import Version
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_trainer import GRPOTrainer

# Tested versions, oldest first.
TESTED_TRL = ("1.14.0", "1.16.0")

# Methods that we override or call, with their parameters after `self`. Some belong to `transformers.Trainer` and are
# used by `hf/runs.py`.
METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate": ("prompts",),
    "_prepare_inputs": ("generation_batch",),
    "_compute_loss": ("model", "inputs"),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "_load_rng_state": ("checkpoint",),
    "log": ("logs", "start_time"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
}

# Methods whose signature differs between versions, with a call that every version accepts.
CALLABLE_WITH = {
    "_get_per_token_logps_and_entropies": (
        ("model", "input_ids", "attention_mask", "logits_to_keep"),
        ("batch_size", "compute_entropy"),
    ),
}

# Number of values a method returns, by how TRL itself unpacks them: (method, caller) -> number.
UNPACKED = {
    ("_get_per_token_logps_and_entropies", "_generate_and_score_completions"): 3,
    ("_get_per_token_logps_and_entropies", "_compute_loss"): 3,
}

# Position, among the values `_generate` returns, of the mask that separates policy tokens from tool tokens.
TOOL_MASK_PLACE = 2

# (caller, callee): an override that nothing calls would be silently ignored.
CALLS = (
    ("_prepare_inputs", "_generate_and_score_completions"),
    ("_generate_and_score_completions", "_generate"),
    ("_generate_and_score_completions", "_calculate_rewards"),
    ("_generate_and_score_completions", "_get_per_token_logps_and_entropies"),
    ("compute_loss", "_compute_loss"),
    ("_compute_loss", "_get_per_token_logps_and_entropies"),
)

# Keys of the dictionary that a method returns or reads.
RETURNED_KEYS = {
    "_generate_and_score_completions": (
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        # Only with tools, off-policy updates or a reference:
        "tool_mask",
        "old_per_token_logps",
        "ref_per_token_logps",
    ),
}
READ_KEYS = {
    "_compute_loss": (
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "tool_mask",
        "old_per_token_logps",
    )
}

# Attributes set by a constructor (TRL's, or that of `transformers.Trainer`), and keys of the dictionaries among them.
ATTRIBUTES = {
    "_buffered_inputs": (),
    "_logs": ("prompt", "completion", "rewards", "advantages"),
    "_metrics": ("train", "eval"),
    "_tokenizer": (),
    "aux_loss_enabled": (),
    "beta": (),
    "control": (),
    "model_wrapped": (),
    "num_generations": (),
    "ref_model": (),
    "reward_func_names": (),
    "reward_funcs": (),
    "reward_weights": (),
    "tools": (),
}

# Attributes set by one of these methods, depending on the version of transformers.
SET_IN_TRAINING = {
    "current_gradient_accumulation_steps": ("_run_epoch", "_inner_training_loop"),
    "_globalstep_last_logged": ("_inner_training_loop",),
    "_initial_global_step": ("_inner_training_loop",),
    "_total_loss_scalar": ("_inner_training_loop",),
    "_tr_loss": ("_inner_training_loop",),
}

# Attributes that older versions of transformers do not have and do not need.
SINCE_TRANSFORMERS = {"_initial_global_step": "5.19"}  # before, the mean loss always covers all steps

# Functions of `trl.trainer.utils`, with their parameters. TRL itself calls the first two on our batches.
FUNCTIONS = {
    "split_tensor_dict": ("tensor_dict", "num_chunks"),
    "shuffle_sequence_dict": ("seq_dict",),
    "use_adapter": ("model", "adapter_name"),
    "get_callable_name": ("func",),
    "is_async_callable": ("func",),
}


@functools.cache  # half a second, and a process that makes many trainers has one TRL
def check_contract(trainer_class: type = GRPOTrainer, utils: ModuleType = trl_utils) -> tuple[str, ...]:
    """Compare TRL's private names with what `StepPPOTrainer` expects: one sentence for each difference.

    It reads signatures and source text but runs no TRL code, so random number generators do not advance.

    Example:
        >>> check_contract()
        ()
    """
    moved = [
        *_moved_signatures(trainer_class, METHODS),
        *_moved_signatures(utils, FUNCTIONS),
        *_moved_calls(trainer_class),
        *_refused_calls(trainer_class),
        *_moved_results(trainer_class),
        *_moved_tool_mask(trainer_class),
        *_moved_keys(trainer_class),
        *_moved_attributes(trainer_class),
        *_moved_advantages(trainer_class),
    ]
    oldest, newest = TESTED_TRL[0], TESTED_TRL[-1]
    advice = (
        f"TRL {trl.__version__} is installed, but StepPPOTrainer is tested with {oldest} to {newest}: `pip install "
        f"'trl>={oldest},<={newest}'`, or install a newer fractal-rm."
    )
    return tuple(f"{sentence}. {advice}" for sentence in moved)


def _moved_signatures(owner: type | ModuleType, expected: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for name, parameters in expected.items():
        function, wanted = getattr(owner, name, None), f"expected it to take ({', '.join(parameters)})"
        if not callable(function):
            yield f"`{owner.__name__}.{name}` is gone, {wanted}"
            continue
        found = tuple(parameter for parameter in inspect.signature(function).parameters if parameter != "self")
        if found != parameters:
            yield f"`{owner.__name__}.{name}` takes ({', '.join(found)}), {wanted}"


def _moved_calls(trainer_class: type) -> Iterator[str]:
    for caller, callee in CALLS:
        for tree in _syntax(trainer_class, caller):
            called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            if callee not in [function.attr for function in called if isinstance(function, ast.Attribute)]:
                yield f"`{trainer_class.__name__}.{caller}` does not call `{callee}`, expected it to"


def _refused_calls(trainer_class: type) -> Iterator[str]:
    for name, (positional, keywords) in CALLABLE_WITH.items():
        method = getattr(trainer_class, name, None)
        if not callable(method):
            yield f"`{trainer_class.__name__}.{name}` is gone, expected it to take ({', '.join(positional)})"
            continue
        try:
            inspect.signature(method).bind(None, *positional, **dict.fromkeys(keywords))
        except TypeError as error:
            found = ", ".join((*positional, *keywords))
            yield f"`{trainer_class.__name__}.{name}` cannot be called with ({found}): {error}"


def _moved_results(trainer_class: type) -> Iterator[str]:
    for (method, caller), count in UNPACKED.items():
        for tree in _syntax(trainer_class, caller):
            found = {
                len(target.elts) if isinstance(target, ast.Tuple) else 1
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign) and f"self.{method}(" in ast.unparse(node.value)
                for target in node.targets
            }
            if found - {count}:
                owner = trainer_class.__name__
                yield f"`{owner}.{caller}` unpacks {sorted(found)} values of `{method}`, expected {count}"


def _moved_tool_mask(trainer_class: type) -> Iterator[str]:
    for tree in _syntax(trainer_class, "_generate"):
        returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
        masks = [value.elts[TOOL_MASK_PLACE:][:1] for value in returned if isinstance(value, ast.Tuple)]
        if not any(ast.unparse(mask) == "tool_mask" for found in masks for mask in found):
            yield (
                f"`{trainer_class.__name__}._generate` does not return `tool_mask` as value {TOOL_MASK_PLACE + 1}, "
                "expected it to"
            )


def _moved_keys(trainer_class: type) -> Iterator[str]:
    tables = ((RETURNED_KEYS, _written_keys, "return the key {!r}"), (READ_KEYS, _read_keys, "read `inputs[{!r}]`"))
    for table, keys_of, does in tables:
        for method, keys in table.items():
            for tree in _syntax(trainer_class, method):
                found = keys_of(tree)
                for key in keys:
                    if key not in found:
                        yield f"`{trainer_class.__name__}.{method}` does not {does.format(key)}, expected it to"


def _moved_attributes(trainer_class: type) -> Iterator[str]:
    values: dict[str, list[ast.expr]] = {}
    for parent in inspect.getmro(trainer_class):
        for tree in _syntax(parent, "__init__") if "__init__" in vars(parent) else []:
            for name, value in _assignments(tree):
                values.setdefault(name, []).append(value)
    for name, keys in ATTRIBUTES.items():
        if name not in values:
            yield f"`{trainer_class.__name__}.{name}` is not set by a constructor, expected it to be"
            continue
        found = {key for value in values[name] for key in _written_keys(value)}
        missing = [repr(key) for key in keys if key not in found]
        if missing:
            yield f"`{trainer_class.__name__}.{name}` has no key {', '.join(missing)}, expected it to"
    for name, methods in SET_IN_TRAINING.items():
        if Version(transformers.__version__) < Version(SINCE_TRANSFORMERS.get(name, "0")):
            continue
        trees = [tree for method in methods for tree in _syntax(trainer_class, method)]
        if not any(name == found for tree in trees for found, _ in _assignments(tree)):
            yield f"`{trainer_class.__name__}.{name}` is not set in training, expected it to be"


def _moved_advantages(trainer_class: type) -> Iterator[str]:
    # TRL adds the token axis to advantages of shape (B,) and leaves shape (B, T) unchanged.
    for tree in _syntax(trainer_class, "_compute_loss"):
        if not any(
            ast.unparse(node.test) in ("advantages.dim() == 1", "advantages.ndim == 1")
            and "advantages.unsqueeze" in ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.If)
        ):
            yield (
                f"`{trainer_class.__name__}._compute_loss` adds the token axis to advantages whatever their shape, "
                "expected it to accept advantages of shape (B, T)"
            )


def _syntax(owner: type, name: str) -> list[ast.AST]:
    """Parse a method: a list with one tree, or an empty list if the method does not exist (reported elsewhere)."""
    method = getattr(owner, name, None)
    if not inspect.isroutine(method):
        return []
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):  # written in C, or shipped without source: nothing to compare
        return []
    return [ast.parse(textwrap.dedent(source))]


def _written_keys(tree: ast.AST) -> set[str]:
    """Keys of dictionary displays, and of `name["key"] = ...`."""
    keys: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys += node.keys
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys.append(node.slice)
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _read_keys(tree: ast.AST) -> set[str]:
    """Keys of `inputs["key"]` and `inputs.get("key")`."""
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "inputs":
            keys.append(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "inputs.get":
            keys += node.args[:1]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _assignments(tree: ast.AST) -> list[tuple[str, ast.expr]]:
    """Pairs of name and value for each `self.name = value`."""
    pairs: list[tuple[str, ast.expr]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                pairs.append((target.attr, node.value))
    return pairs
