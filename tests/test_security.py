"""Code of strangers is never run: every load says so, and folders with planted code leave no trace."""

import ast
import builtins
import json
import re
import time
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.documents import REPOSITORY, script
from support.models import byte_tokenizer, reward_model
from support.stand_ins import save_policy, save_reward_model, solutions, write_jsonl
from transformers import LlamaForCausalLM

from benchmarks import audit
from fractal_rm.cli.main import main
from fractal_rm.data import patterns
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers import templates

# Classes of this package and of PEFT, which load through the functions that are checked.
OWN = {"StepRewardModel", "ScoringClient", "PeftModel", "cls"}
LOADERS = {"load_dataset", "SentenceTransformer"}


def loads_without_a_word(source: str) -> list[int]:
    """Lines of calls that load something and leave what they trust to a default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = getattr(getattr(called, "value", None), "id", "")
        if (name == "from_pretrained" and owner not in OWN) or name in LOADERS:
            said = {one.arg: one.value for one in node.keywords}.get("trust_remote_code")
            if not (isinstance(said, ast.Constant) and said.value is False):
                found.append(node.lineno)
    return found


def test_a_load_that_does_not_say_it_is_found():
    assert loads_without_a_word("AutoModel.from_pretrained(a)\nx.load_dataset(b, trust_remote_code=False)") == [1]
    assert loads_without_a_word("kind.from_pretrained(a, trust_remote_code=True)\nStepRewardModel.from_pretrained(a)")


@pytest.mark.parametrize("folder", ["fractal_rm", "recipes"])
def test_every_load_says_that_no_code_of_strangers_is_run(folder):
    silent = {
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in (REPOSITORY / folder).rglob("*.py")
        for line in loads_without_a_word(path.read_text(encoding="utf-8"))
    }
    assert not silent


PLANTED = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nfrom transformers import *\n"
PLANTED += "class Config(PreTrainedConfig):\n    model_type = 'planted'\nclass Model(PreTrainedModel):\n    pass\n"
MAPPED = {
    "AutoConfig": "planted.Config",
    **{f"AutoModel{name}": "planted.Model" for name in ("", "ForCausalLM", "ForTokenClassification")},
}


@pytest.fixture
def planted(tmp_path):
    """A folder whose configuration, model, tokenizer and modules are code, and the file that the code would write."""
    folder, marker = tmp_path / "planted", tmp_path / "ran"
    save_policy(folder)
    config = {"model_type": "planted", "auto_map": MAPPED, "architectures": ["Model"], "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["planted.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "planted.py").write_text(PLANTED.format(marker=str(marker)))
    return folder, marker


def commands(folder: Path, rows: str, good: dict[str, str], out: str) -> dict[str, list[str]]:
    """Every command that takes a model, with the folder in each place."""
    train = ["train", "--train_file", rows, "--output_dir", out, "--use_cpu", "true", "--model"]
    ppo = ["ppo", "--task", "arithmetic", "--output_dir", out, "--use_cpu", "true", "--bf16", "false"]
    by_answer = [*ppo, "--reward_function", "exact_answer"]
    return {
        "train": [*train, str(folder)],
        "train token": [*train, str(folder), "--scorer", "token"],
        "train embedding": [*train, str(folder), "--scorer", "embedding"],
        "train reference": [
            *train,
            good["policy"],
            "--likelihood_prior_weight",
            "1",
            "--reference_model",
            str(folder),
            "--max_steps",
            "1",
        ],
        "score": ["score", "--model", str(folder), "--input", rows, "--output", f"{out}.jsonl"],
        "evaluate": ["evaluate", "--model", str(folder), "--data", rows, "--output", f"{out}.json"],
        "ppo policy": [*by_answer, "--model", str(folder)],
        "ppo reward model": [*ppo, "--reward_model", str(folder), "--model", good["policy"]],
        "ppo value model": [*by_answer, "--model", good["policy"], "--value_model", str(folder)],
        "sample": ["sample", "--task", "arithmetic", "--model", str(folder), "--output", f"{out}.jsonl"],
        "serve": ["serve", "--model", str(folder)],
        "plan": ["plan", "--model", str(folder)],
    }


PLACES = list(commands(Path(), "", {"policy": ""}, ""))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, str]:
    return {"policy": save_policy(tmp_path_factory.mktemp("good") / "policy")}


@pytest.mark.parametrize("block", [False, True], ids=["plain", "with a fractal block"])
@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_model_folder_is_not_run_even_where_somebody_says_yes(
    planted, good, tmp_path, place, block, monkeypatch, capsys
):
    folder, marker = planted
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *told: asked.append(told) or "y")
    if block:
        saved = json.loads((Path(save_reward_model(tmp_path / "rm")) / "config.json").read_text())["fractal"]
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"fractal": saved}))
    rows = write_jsonl(tmp_path / "rows.jsonl", solutions(4))
    assert main(commands(folder, rows, good, str(tmp_path / "out"))[place]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("fractal-rm: ")] == said[-1:]
    assert not asked
    assert not marker.exists()


def test_modules_of_a_sentence_encoder_that_are_code_are_refused(planted, tmp_path, capsys):
    folder, marker = planted
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "planted.Model"}]))
    rows = write_jsonl(tmp_path / "rows.jsonl", solutions(4))
    arguments = ["--train_file", rows, "--output_dir", str(tmp_path / "out"), "--scorer", "embedding"]
    assert main(["train", "--model", str(folder), *arguments, "--use_cpu", "true"]) == 2
    assert "names the module 'planted.Model', which is code from the folder" in capsys.readouterr().err
    assert not marker.exists()


# Patterns of downloaded models ----------------------------------------------------------------------------------------

SLOW = "(a|a)*$"


def test_a_pattern_of_a_downloaded_model_ends_in_time_and_is_given_up(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    patterns.compiled.cache_clear()
    model = reward_model("likelihood", "llama", segmentation=Segmentation("pattern", pattern=SLOW))
    begun = time.monotonic()
    results = model.score(["1+1?"] * 40, ["a" * 60 + "!"] * 40)
    assert time.monotonic() - begun < 20  # not 40 times the limit, and not for ever
    assert all(re.search(r"takes longer than 0\.1 s on a text of 61 characters", one.error) for one in results)


def test_the_pattern_that_froze_a_server_is_read_at_once():
    assert Segmentation("pattern", pattern=r"([0-9a-z: ]+)+ ")("1: a b c" * 2000 + "!")


# Chat templates of downloaded models ----------------------------------------------------------------------------------

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    monkeypatch.setattr(templates, "_PAUSE", 0.02)
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = f"{ENDLESS}{time.monotonic()}"
    model = reward_model("token", "llama", tokenizer, chat=True)
    begun = time.monotonic()
    chat = [{"role": "user", "content": "2+2?"}]
    results = model.score([chat] * 20, ["4."] * 20)
    assert time.monotonic() - begun < 5  # not for ever, and not 20 times the limit
    assert all("The chat template takes longer than 0.1 s on a chat." in str(one.error) for one in results)
    tokenizer.chat_template = "{% for i in range(10**9) %}{% endfor %}"
    assert "The chat template refuses this chat (Range too big." in str(model.score([chat], ["4."])[0].error)


@pytest.mark.parametrize("source", ["{{ 9**9**9 }}", "{{ 'a' * 9999999999 }}"])
def test_a_chat_template_that_nothing_could_interrupt_is_refused(tmp_path, source):
    save_reward_model(tmp_path, scorer="token", chat=True)
    (tmp_path / "chat_template.jinja").write_text(source)
    assert re.search(r": the chat template calculates with `[*9]+`, which can run without end\.", refusal(tmp_path))


def test_an_adapter_beside_the_weights_of_a_reward_model_is_refused(tmp_path):
    save_reward_model(tmp_path, scorer="token")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}')
    assert "adapter_config.json: the folder holds an adapter. Merge it first" in refusal(tmp_path)


def test_what_a_name_says_to_a_terminal_is_shown_as_text(capsys):
    assert main(["report", "--results", "\x1b]0;title\x07\x1b[2J.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b]0;title\\x07\\x1b[2J.jsonl" in said
    assert said.rstrip("\n").isprintable()


# Files that are damaged -----------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        StepRewardModel.from_pretrained(folder, device="cpu")
    return str(caught.value)


def test_two_tokens_that_changed_places_are_found(tmp_path):
    save_reward_model(tmp_path, scorer="token")
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]  # letters that no probe text holds
    file.write_text(json.dumps(content))
    assert "the tokenizer's tokens or merges differ from the ones the model was trained with" in refusal(tmp_path)


def test_one_changed_bit_of_the_weights_is_found(tmp_path):
    save_reward_model(tmp_path, scorer="token")
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "the weights are not the saved ones (fingerprint " in refusal(tmp_path)


def test_weights_of_more_layers_than_the_configuration_has_are_refused(tmp_path):
    save_reward_model(tmp_path, scorer="token")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "config.json says 1 layers, but the weights next to it have 2" in refusal(tmp_path)


def test_weights_that_the_configuration_does_not_have_are_refused(tmp_path):
    save_reward_model(tmp_path, scorer="token")
    LlamaForCausalLM.from_pretrained(save_policy(tmp_path / "other")).save_pretrained(tmp_path / "more")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["fractal"] |= {"scorer": "likelihood", "head": None, "weights": None}
    file.write_text(json.dumps(config))
    assert re.search("weights are (missing|not of the model)", refusal(tmp_path))


def test_a_policy_without_its_head_is_refused(tmp_path, capsys):
    folder = tmp_path / "policy"
    save_policy(folder)
    LlamaForCausalLM.from_pretrained(folder).base_model.save_pretrained(folder)
    capsys.readouterr()
    assert main(["sample", "--task", "arithmetic", "--model", str(folder), "--output", str(tmp_path / "o.jsonl")]) == 2
    assert (
        "1 weights are missing from the folder and would be random (first: lm_head.weight)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["ppo", "sample", "plan"])
def test_a_policy_whose_files_do_not_fit_each_other_is_refused(tmp_path, capsys, command):
    folder = save_policy(tmp_path / "policy")
    flags = {
        "ppo": ["--task", "arithmetic", "--reward_function", "exact_answer", "--output_dir", str(tmp_path / "out")],
        "sample": ["--task", "arithmetic", "--output", str(tmp_path / "out.jsonl")],
        "plan": [],
    }[command]
    config, weights = tmp_path / "policy" / "config.json", tmp_path / "policy" / "model.safetensors"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"num_hidden_layers": 3}))
    assert main([command, "--model", folder, *flags]) == 2
    assert "config.json says 3 layers, but the weights next to it have 2" in capsys.readouterr().err
    config.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main([command, "--model", folder, *flags]) == 2
    assert "is truncated or not a safetensors file" in capsys.readouterr().err


def test_a_policy_or_value_model_that_lacks_a_weight_is_refused(tmp_path, capsys):
    whole, cut = save_policy(tmp_path / "whole"), save_policy(tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    flags = ["--task", "arithmetic", "--num_problems", "4", "--num_eval_problems", "0", "--use_cpu", "true"]
    flags += ["--bf16", "false", "--report_to", "none", "--reward_function", "exact_answer"]
    flags += ["--per_device_train_batch_size", "4", "--num_generations", "2", "--output_dir", str(tmp_path / "out")]
    lost = "weights are missing from the folder and would be random"
    assert main(["ppo", "--model", cut, *flags]) == 2
    assert f"{cut}: 1 {lost} (first: model.layers.1.mlp.up_proj.weight)" in capsys.readouterr().err
    assert main(["ppo", "--model", whole, *flags, "--advantage", "gae", "--value_model", whole]) == 2
    assert f"{whole}: 2 {lost} (first: score.bias)" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_reward_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "the weight model.norm.weight has NaN or infinite values" in refusal(tmp_path)


def test_a_folder_of_an_earlier_version_has_no_fingerprints_and_loads(tmp_path):
    save_reward_model(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in ("vocabulary", "weights"):
        del config["fractal"][name]
    file.write_text(json.dumps(config))
    assert StepRewardModel.from_pretrained(tmp_path, device="cpu").settings.weights is None


def test_a_readme_that_is_not_utf_8_does_not_stop_a_model(tmp_path):
    save_reward_model(tmp_path)
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    assert StepRewardModel.from_pretrained(tmp_path, device="cpu").card == "caf\ufffd"


def test_a_loop_of_links_is_one_sentence(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    loop = str(tmp_path / "loop")
    for arguments in (
        ["score", "--model", loop, "--input", loop, "--output", str(tmp_path / "o.jsonl")],
        ["score", "--model", "m/m", "--input", loop, "--output", loop],
        ["report", "--results", loop],
        ["report", "--runs", loop, "--output", str(tmp_path / "r.html")],
        ["train", "--model", loop, "--train_file", loop, "--output_dir", loop],
        ["evaluate", "--model", loop, "--data", loop],
        ["compare", "--chosen", loop, "--output_dir", str(tmp_path / "c")],
    ):
        assert main(arguments) == 2, arguments
        assert capsys.readouterr().err.count("\n") == 1


def test_a_nul_in_a_path_is_one_sentence(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text('input: "a\\0b"\n')
    assert main(["score", "--config", str(config), "--model", "m", "--output", "o"]) == 2
    assert "`input` holds a NUL character. Leave it out." in capsys.readouterr().err


# The audit ------------------------------------------------------------------------------------------------------------


def test_actions_of_the_hosted_ci_are_pinned_by_commit():
    used = re.findall(r"uses: (\S+)", (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert used
    assert all(re.search(r"@[0-9a-f]{40}$", one) for one in used)


def test_every_rule_that_the_audit_leaves_out_has_its_reason():
    said = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8").partition("| rule | why |")[2]
    assert set(re.findall(r"B\d{3}", said)) == set(audit.EXPLAINED)


def test_findings_of_schemathesis_are_read_and_the_last_run_of_each_scanner_is_shown():
    failed = {"title": "Server error", "operations": ["POST /score"], "count": 2}
    report = {"test_cases": {"generated": 7}, "failures": [failed], "errors": [{"title": "Timeout", "count": 1}]}
    found = audit.read_report(report)
    assert found == audit.Found(7, "requests", ["Server error (POST /score): 2", "Timeout: 1"])
    row = {"arm": "schemathesis", "dataset": "requests", "config": {"version": "4.1"}, "finished_at": "2026-11-30T01"}
    rows = [row | {"metrics": {"checked": n, "left_out": 0, "findings": 0}} for n in (1, 1234)]
    assert audit.audit_table(rows).splitlines()[2:] == ["| schemathesis | 4.1 | 1,234 requests | 0 | 0 | 2026-11-30 |"]


def test_the_inventory_lists_every_dependency_with_its_licence(tmp_path, capsys):
    inventory = script(REPOSITORY / "docs" / "tools" / "inventory.py")
    inventory.main(["--sbom", str(tmp_path / "sbom.json")])
    bill = json.loads((tmp_path / "sbom.json").read_text())
    found = {one["name"]: one["licenses"][0]["license"]["name"] for one in bill["components"]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", one)[0] for one in project["dependencies"]}
    assert needed <= found.keys()
    assert found["transformers"] != inventory.UNKNOWN
    assert len(capsys.readouterr().out.splitlines()) == len(found)
