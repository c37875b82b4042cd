"""TRL's private names that StepPPOTrainer relies on: present as written down, and doing what we expect of them."""

import ast
import functools
import inspect
import textwrap
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils

from fractal_rm.ppo import contract as trl_contract
from fractal_rm.ppo.contract import check_contract

WORDS = ("<pad>", "<eos>", "<unk>", "one", "two", "three", "plus", "is")


class Recording(GRPOTrainer):
    """TRL's trainer with the overrides that StepPPOTrainer needs, each of which counts its calls."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = Counter()

    def _generate_and_score_completions(self, inputs):
        self.calls["_generate_and_score_completions"] += 1
        batch = super()._generate_and_score_completions(inputs)
        batch["companion"] = batch["completion_ids"].clone()  # (B, T), to be shuffled and split with the rest
        return batch

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.calls["_calculate_rewards"] += 1
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model, inputs):
        self.calls["_compute_loss"] += 1
        assert torch.equal(inputs["companion"], inputs["completion_ids"])
        return super()._compute_loss(model, inputs)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Recording:
    """A trainer over a two-layer model built in code, after two rollouts and four optimizer steps."""
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    trainer = Recording(
        model=LlamaForCausalLM(config),
        processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": ["one plus two is", "two is", "three plus one"] * 4}),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("grpo")),
            per_device_train_batch_size=4,
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            num_generations=2,
            max_completion_length=8,
            max_steps=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return trainer


def test_everything_is_where_the_contract_says():
    assert check_contract() == ()


def test_overrides_are_called_once_a_rollout_and_once_a_step(trainer):
    assert trainer.calls == {"_generate_and_score_completions": 2, "_calculate_rewards": 2, "_compute_loss": 4}


def test_a_trained_trainer_holds_what_we_read_from_it(trainer):
    assert trainer._step == 4
    assert trainer.num_generations == 2
    assert trainer._tokenizer is trainer.processing_class
    assert trainer.accelerator.unwrap_model(trainer.model_wrapped) is trainer.model
    assert set(trainer._metrics) == {"train", "eval"}
    trainer._metrics["train"]["a name of our own"].append(0.5)
    assert len(trainer._logs["advantages"]) == len(trainer._logs["completion"])
    assert len(trainer._buffered_inputs) == 2


def test_a_buffered_batch_has_the_shapes_that_we_place_rewards_on(trainer):
    batch = trainer._buffered_inputs[0]
    size, tokens = batch["completion_ids"].shape
    assert batch["completion_mask"].shape == (size, tokens)
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert batch["advantages"].shape == (size,)
    # Completions are padded on the right: the mask of a row never rises again.
    assert (batch["completion_mask"].diff(dim=1) <= 0).all()


def loss(trainer: Recording, advantages: torch.Tensor) -> float:
    """TRL's loss of a buffered batch under these advantages, with a probability ratio of one."""
    batch = dict(trainer._buffered_inputs[0], advantages=advantages)
    batch.pop("old_per_token_logps", None)
    trainer.model.train()
    return trainer._compute_loss(trainer.model, batch).item()


def test_advantages_of_one_a_response_equal_the_same_on_every_token(trainer):
    batch = trainer._buffered_inputs[0]
    one_each = torch.linspace(-1.0, 2.0, len(batch["completion_ids"]))
    on_tokens = one_each[:, None].expand(batch["completion_ids"].shape)
    assert loss(trainer, one_each) == pytest.approx(loss(trainer, on_tokens), abs=1e-6)


def test_an_advantage_counts_at_its_own_token_and_not_on_padding(trainer):
    mask = trainer._buffered_inputs[0]["completion_mask"].bool()
    assert mask.any()
    assert not mask.all(), "the batch has no padding: nothing is shown"
    losses = torch.zeros(mask.shape)
    for row, token in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        advantages = torch.zeros(mask.shape)
        advantages[row, token] = 1.0
        losses[row, token] = loss(trainer, advantages)
    assert (losses[~mask] == 0).all()
    torch.testing.assert_close(losses[mask], losses[mask][:1].expand(int(mask.sum())))
    assert losses[mask][0] < 0


# What moves in TRL, planted.


def without(*names: str, **replaced) -> type:
    """GRPOTrainer less some methods, with others replaced."""
    kept = {name: value for name, value in vars(GRPOTrainer).items() if name not in (*names, "__dict__", "__weakref__")}
    return type("GRPOTrainer", GRPOTrainer.__bases__, kept | replaced)


@pytest.mark.parametrize("name", ["_generate_and_score_completions", "_calculate_rewards", "_compute_loss"])
def test_a_method_that_is_gone_is_named_with_the_version_and_the_remedy(name):
    (sentence,) = check_contract(without(name))
    assert sentence.startswith(f"`GRPOTrainer.{name}` is gone, expected it to take (")
    assert "is installed, but StepPPOTrainer is tested with 1.14.0 to 1.16.0: `pip install 'trl>=1.14.0" in sentence


def test_the_installed_class_is_the_one_that_is_checked_once_in_a_process(monkeypatch):
    assert check_contract() is check_contract()
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    check_contract.cache_clear()
    (sentence,) = check_contract()
    check_contract.cache_clear()
    assert "`GRPOTrainer._calculate_rewards` is gone" in sentence


def test_another_parameter_is_named():
    class Moved(GRPOTrainer):
        def _calculate_rewards(self, inputs, completions, *, prompts):
            return inputs, completions, prompts

    (sentence,) = check_contract(Moved)
    assert "takes (inputs, completions, prompts), expected it to take (inputs, prompts, completions, " in sentence


def test_a_key_that_is_no_longer_returned_is_named():
    class Moved(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            rewards = self._calculate_rewards(self._generate(inputs), [], [], [])
            batch = {"prompt_ids": inputs, "prompt_mask": inputs, "completion_ids": inputs, "rewards": rewards}
            batch["completion_mask"] = batch["tool_mask"] = inputs
            logprobs, _, _ = self._get_per_token_logps_and_entropies(self.model, inputs, inputs, 1)
            batch["old_per_token_logps"] = batch["ref_per_token_logps"] = logprobs
            return batch

    (sentence,) = check_contract(Moved)
    assert "`Moved._generate_and_score_completions` does not return the key 'advantages'" in sentence


def test_an_override_that_nothing_calls_is_named():
    class Moved(GRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self._another_loss(model, inputs)

    (sentence,) = check_contract(Moved)
    assert "`Moved.compute_loss` does not call `_compute_loss`" in sentence


def test_a_loss_that_takes_one_advantage_a_response_only_is_named():
    class Moved(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1) * inputs["tool_mask"]
            advantages = inputs["advantages"]
            logprobs, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, 1)
            return (advantages.unsqueeze(1) * (logprobs - inputs.get("old_per_token_logps"))).sum()

    (sentence,) = check_contract(Moved)
    assert "`Moved._compute_loss` adds the token axis to advantages whatever their shape" in sentence


def test_attributes_and_their_keys_that_are_gone_are_named():
    def constructor(self, num_generations):
        self.num_generations = num_generations
        self._metrics: dict = {"train": {}, "evaluation": {}}
        self._logs = {"prompt": [], "completion": [], "rewards": {}, "advantages": []}
        self._tokenizer = self._step = self.reward_weights = self.beta = self.aux_loss_enabled = self.ref_model = None
        self.reward_funcs = self.reward_func_names = []

    sentences = check_contract(without("__init__", __init__=constructor))
    assert [sentence.partition(", expected")[0] for sentence in sentences] == [
        "`GRPOTrainer._buffered_inputs` is not set by a constructor",
        "`GRPOTrainer._metrics` has no key 'eval'",
        "`GRPOTrainer.tools` is not set by a constructor",
    ]


def test_a_function_on_batches_that_is_gone_or_changed_is_named():
    utils = ModuleType("trl.trainer.utils")
    utils.shuffle_sequence_dict = lambda seq_dict, seed: seq_dict
    utils.use_adapter = lambda model, adapter_name: model
    utils.get_callable_name = utils.is_async_callable = lambda func: func
    gone, changed = check_contract(utils=utils)
    assert "`trl.trainer.utils.split_tensor_dict` is gone" in gone
    assert "`trl.trainer.utils.shuffle_sequence_dict` takes (seq_dict, seed)" in changed


def test_the_check_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    check_contract()
    assert torch.equal(before, torch.get_rng_state())


def test_shuffling_and_splitting_keep_the_rows_of_all_tensors_together():
    rows = torch.arange(6)
    shuffled = trl_utils.shuffle_sequence_dict({"ids": rows, "tokens": rows[:, None].expand(6, 3), "none": None})
    first, second = trl_utils.split_tensor_dict(shuffled, 2)
    assert torch.equal(torch.cat([first["ids"], second["ids"]]).sort().values, rows)
    for part in (first, second):
        assert torch.equal(part["tokens"], part["ids"][:, None].expand(3, 3))


PPO = Path(trl_contract.__file__).parent
OURS = {"values", "returns", "value_mask", "value_tokens", "rollout_logprobs", "rollout_entropies", "rollout_values"}


@functools.cache
def names_of(library: str) -> frozenset[str]:
    """Methods of the trainers of a library below ours, and every attribute that they give themselves."""
    found = set()
    for parent in GRPOTrainer.__mro__[:-1]:
        if parent.__module__.partition(".")[0] == library:
            found |= {*vars(parent), *written_to_self(ast.parse(textwrap.dedent(inspect.getsource(parent))))}
    return frozenset(found)


def written_to_self(tree: ast.AST) -> set[str]:
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {one.attr for one in attributes if isinstance(one.ctx, ast.Store) and dotted(one.value) == "self"}


def dotted(node: ast.expr) -> str:
    """A name, or a chain of attributes, as it is written; empty for other expressions."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names_used(code: str, *, of: tuple[str, ...] = ()) -> set[str]:
    """Attributes that a module reads or writes, and functions that it defines; with `of`, attributes of these alone."""
    nodes = list(ast.walk(ast.parse(code)))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) if not of or dotted(node.value) in of}
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return read if of else read | {node.name for node in nodes if isinstance(node, functions)}


def private_names(code: str) -> set[str]:
    """Private names of TRL's trainer in a module, or of the one of transformers below it."""
    theirs = names_of("trl") | names_of("transformers")
    return {name for name in names_used(code) & theirs if name.startswith("_") and not name.startswith("__")}


def own_attributes(code: str) -> set[str]:
    """Attributes that TRL alone gives a trainer, where a module asks a trainer for them: public, but not documented."""
    return names_used(code, of=("self", "trainer", "self.engine")) & (names_of("trl") - names_of("transformers"))


def imported_functions(code: str) -> set[str]:
    """Functions of `trl.trainer.utils` that a module calls or imports."""
    tree = ast.parse(code)
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == trl_utils.__name__
    ]
    return names_used(code, of=("trl_utils",)) | {alias.name for node in imports for alias in node.names}


def code_of(*paths: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def keys(path: Path) -> set[str]:
    """Keys of TRL's dictionaries in a module: `tokens["x"]`, `output.get("x")`, `"x" in inputs`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            owner, key = node.func.value, next(iter(node.args), None)
        elif isinstance(node, ast.Compare):
            owner, key = node.comparators[0], node.left
        else:
            continue
        name = ast.unparse(owner).rpartition(".")[2]
        if name in ("tokens", "output", "minibatch", "inputs") and isinstance(getattr(key, "value", None), str):
            found.add(key.value)
    return found


PACKAGE, ENGINE = PPO.parent, (PPO / "engine.py", PPO.parent / "hf" / "runs.py")
LISTED = {
    *trl_contract.METHODS,
    *trl_contract.ATTRIBUTES,
    *trl_contract.CALLABLE_WITH,
    *trl_contract.SET_IN_TRAINING,
}


def test_every_private_name_that_the_engine_uses_is_in_the_contract():
    used = private_names(code_of(*ENGINE))
    assert used - LISTED == set()
    assert {*trl_contract.METHODS, *trl_contract.CALLABLE_WITH} - used <= {"log", "_prepare_inputs"}


def test_an_attribute_is_expected_only_of_versions_of_transformers_that_have_it(monkeypatch):
    check = trl_contract.check_contract.__wrapped__
    monkeypatch.setitem(trl_contract.SET_IN_TRAINING, "_newer", ("_inner_training_loop",))
    assert ["_newer" in sentence for sentence in check()] == [True]
    monkeypatch.setitem(trl_contract.SINCE_TRANSFORMERS, "_newer", "999")
    assert check() == ()


def test_every_attribute_that_trl_alone_sets_is_in_the_contract():
    # Options of `GRPOConfig` are public; the trainer has some of them as attributes of the same name.
    used = own_attributes(code_of(*(path for path in PPO.rglob("*.py") if path.name != "config.py")))
    assert {"reward_weights", "tools"} <= used
    assert {name for name in used if not name.startswith("_")} - LISTED == set()


def test_every_function_of_trl_that_is_called_is_in_the_contract():
    of_trl = [path for path in PACKAGE.rglob("*.py") if "trl.trainer" in code_of(path)]
    assert imported_functions(code_of(*of_trl)) == trl_contract.FUNCTIONS.keys() - {
        "split_tensor_dict",
        "shuffle_sequence_dict",
    }


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("self._last_loaded_step", private_names),  # set by a method of TRL's trainer
        ("trainer._step += 1", private_names),
        ("async def _generate_single_turn(self): ...", private_names),
        ("self.engine.scale_rewards", own_attributes),
        ("from trl.trainer.utils import pad", imported_functions),
        ("trl_utils.pad(x)", imported_functions),
    ],
)
def test_a_planted_use_of_another_name_is_found(code, found):
    (name,) = found(code)
    assert name not in LISTED | trl_contract.FUNCTIONS.keys()


def test_only_the_engine_names_private_methods_of_trl():
    others = [path for path in PACKAGE.rglob("*.py") if "ppo" in path.parts or "trainer." in code_of(path)]
    others = [path for path in others if path not in ENGINE]
    # The reward model's trainer stands on transformers alone; everywhere else a trainer is only one if it is called so.
    others.remove(PACKAGE / "reward_training" / "trainer.py")
    private = {
        path.relative_to(PACKAGE).as_posix(): private_names(code := code_of(path))
        & (names_used(code) if "ppo" in path.parts else names_used(code, of=("trainer",)))
        for path in others
    }
    assert {path: names for path, names in private.items() if names} == {}


def test_every_key_of_a_rollout_that_is_read_is_in_the_contract():
    returned = {key for names in trl_contract.RETURNED_KEYS.values() for key in names}
    found = {key for path in PPO.rglob("*.py") for key in keys(path)}
    assert {"prompt_ids", "completion_mask", "old_per_token_logps"} <= found
    assert found - returned - OURS == set()


def test_a_tool_mask_in_another_place_is_named():
    class Moved(GRPOTrainer):
        def _generate(self, prompts):
            prompt_ids = completion_ids = completions = tool_mask = prompts
            return prompt_ids, completion_ids, completions, tool_mask

    (sentence,) = check_contract(Moved)
    assert "`Moved._generate` does not return `tool_mask` as value 3, expected it to" in sentence


def test_log_probabilities_that_are_called_or_unpacked_otherwise_are_named():
    class Moved(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, texts, *, batch_size=None):
            return model, texts, batch_size

    (sentence,) = check_contract(Moved)
    assert "`Moved._get_per_token_logps_and_entropies` cannot be called with (model, input_ids, " in sentence


def test_another_number_of_results_is_named():
    class Moved(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1) * inputs["tool_mask"]
            logprobs, entropies = self._get_per_token_logps_and_entropies(model, ids, mask, 1)
            advantages = inputs["advantages"]
            if advantages.dim() == 1:
                advantages = advantages.unsqueeze(1)
            return (advantages * logprobs * inputs.get("old_per_token_logps") + entropies).sum()

    (sentence,) = check_contract(Moved)
    assert "`Moved._compute_loss` unpacks [2] values of `_get_per_token_logps_and_entropies`, expected 3" in sentence
