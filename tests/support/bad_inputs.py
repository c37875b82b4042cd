"""The corpus of bad input, each case with a part of its sentence. Writes `tests/corpus/bad_input.jsonl`:

    python tests/support/bad_inputs.py

Cases are made of tables: the options of every configuration with numbers outside their ranges, and small files of each
kind. What reads a case is in `tests/test_bad_corpus.py`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

CORPUS = Path(__file__).resolve().parent.parent / "corpus" / "bad_input.jsonl"
Case = dict[str, Any]


# Keys of `chat_template_kwargs` that would replace the template, or change what is made of it.
TAKEN = ["chat_template", "tokenize", "conversation", "padding", "truncation", "max_length", "return_tensors"]
TAKEN += ["add_generation_prompt", "continue_final_message", "messages", "tokenizer_kwargs"]


def configurations() -> dict[str, tuple[type, dict[str, Any]]]:
    """Every configuration with ranges, by name, and what it needs to be made."""
    from fractal_rm.cli.compare import CompareArguments
    from fractal_rm.cli.evaluate import EvaluateArguments
    from fractal_rm.cli.options.arguments import DataArguments, LoraArguments
    from fractal_rm.cli.plan import PlanArguments
    from fractal_rm.cli.ppo import PPOArguments
    from fractal_rm.cli.sample import SampleArguments
    from fractal_rm.cli.score import ScoreArguments
    from fractal_rm.cli.serve import ServeArguments
    from fractal_rm.ppo.config import StepPPOConfig
    from fractal_rm.reward_training.config import FractalConfig
    from fractal_rm.scorers.settings import FractalSettings
    from fractal_rm.serving.limits import Limits
    from fractal_rm.study.quickstart import QuickstartArguments

    trainer = {"output_dir": "out", "use_cpu": True, "bf16": False}
    made: list[tuple[type, dict[str, Any]]] = [
        (StepPPOConfig, trainer),
        (FractalConfig, trainer),
        (FractalSettings, {"scorer": "token", "aggregation": "max"}),
        (LoraArguments, {}),
        (DataArguments, {}),
        (SampleArguments, {"model": "m", "output": "o"}),
        (PPOArguments, {"model": "m"}),
        (PlanArguments, {}),
        (ScoreArguments, {"model": "m", "input": "i", "output": "o"}),
        (EvaluateArguments, {"model": "m"}),
        (ServeArguments, {"model": "m"}),
        (Limits, {}),
        (QuickstartArguments, {}),
        (CompareArguments, {}),
    ]
    return {kind.__name__: (kind, needed) for kind, needed in made}


def options() -> Iterator[Case]:
    """Numbers outside the range of an option: NaN, infinite, below, above, not whole."""
    from fractal_rm.ranges import RANGES

    told: set[tuple[str, str]] = set()
    for kind, (cls, _) in configurations().items():
        for one in fields(cls):
            allowed = RANGES.get(one.name)
            # A base class's options are the same in both trainers.
            if allowed is None or (one.name, "Config" * kind.endswith("Config")) in told:
                continue
            told.add((one.name, "Config" * kind.endswith("Config")))
            below = allowed.low if allowed.open_low else allowed.low - 1
            above = allowed.high if allowed.open_high else allowed.high * 2 + 1
            values = [below, above] if allowed.whole else [math.nan, math.inf, below, above]
            lists = one.name in ("step_reward_weights", "reward_weights", "label_scale")
            for value in values:
                place = "Number 1 of " if lists else ""
                says = f"{place}`{one.name}` is {value}. Give a "
                if not lists and allowed.whole:
                    says = f"`{one.name}` is {int(value)}. Give a "
                    value = int(value)
                yield case("option", {"of": kind, one.name: [value] if lists else value}, says)


def kinds() -> Iterator[Case]:
    """Options of another type, as a YAML file that somebody else read gives them, and choices that there are not."""
    own = {"scorer", "aggregation", "segmentation", "thinking", "head_type", "reduction"}  # with sentences of their own
    wrong: dict[str, list[Any]] = {"number": ["1e-5", True, [1.0]], "boolean": ["false", 1], "choice": ["NONE", 3]}
    for kind, (cls, _) in configurations().items():
        hints = get_type_hints(cls)
        for one in fields(cls):
            types = {hints[one.name], *get_args(hints[one.name])} - {type(None)}
            found = "choice" if get_origin(hints[one.name]) is Literal else None
            found = "number" if types & {int, float} and str not in types else found
            found = "boolean" if types & {bool} and types <= {bool, NoneType} else found
            if found is None or one.name in own or not one.init:
                continue
            # By the name: other versions of the base classes have other options beside it.
            value: Any = wrong[found][sum(one.name.encode()) % len(wrong[found])]
            yield case("option", {"of": kind, one.name: value}, f"`{one.name}` is {value!r}. ")


def objects() -> Iterator[Case]:
    """Options that are objects, or files with one, as a command line gives them."""
    for name in ("accelerator_config", "fsdp_config"):
        for value, says in {
            "{": "is invalid JSON",
            '{"a": 1, "a": 2}': "has the name 'a' twice",
            "none.json": "is 'none.json', which is neither an object nor a file",
            "": "is '', which is neither an object nor a file",
        }.items():
            yield case("option", {"of": "FractalConfig", name: value}, f"`{name}` {says}")
    yield case("option", {"of": "FractalConfig", "accelerator_config": {"x": 1}}, "has no option 'x'. Choose among")
    unknown = '{"split_batch": true}'
    yield case("option", {"of": "StepPPOConfig", "accelerator_config": unknown}, "option 'split_batch'. Choose")
    yield case("option", {"of": "StepPPOConfig", "deepspeed": '{"a": '}, "`deepspeed` is invalid JSON")
    for name in ("torch_compile_backend", "torch_compile_mode"):
        yield case("option", {"of": "FractalConfig", name: "x"}, f"`{name}` is 'x'. Choose one of ")
    yield case("option", {"of": "FractalConfig", "neftune_noise_alpha": 5.0}, "works for language models only")
    for value in ("[1]", "3", '"a"'):
        yield case("option", {"of": "StepPPOConfig", "generation_kwargs": value}, "Give an object with named values")


def blocks() -> Iterator[Case]:
    """`fractal` blocks with a value of another type, outside its range, or unknown."""
    wrong: dict[str, list[Any]] = {
        "scorer": [3, None, "head", ["token"]],
        "aggregation": [1, "median", None],
        "segmentation": [3, "lines", [], {"method": 3}, {"method": "words"}, {"pattern": "(", "method": "pattern"}],
        "prompt_template": [None, 5, "no place"],
        "max_length": ["512", 0, -5, 1.5, True, 10**12],
        "sharpness": [0, -1, math.nan, math.inf, "1"],
        "missed_good": [-0.1, 1.0, "0", math.nan],
        "missed_bad": [2, None],
        "num_grades": [1, "4", 4, 1.0],
        "head_type": ["deep", 1],
        "reduction": ["max", None],
        "log_weight": [math.nan, 1e9, -1e9, "0", math.inf, None],
        "bias": ["3", math.inf, -math.inf, math.nan, None, [0], True],
        "temperature": [-1, 0, math.nan, math.inf, "1", None, True, 1e30],
        "threshold": [5, -0.1, math.nan, "0.5", None],
        "tokenizer": [5, []],
        "vocabulary": [1],
        "weights": [["a"]],
        "config": [3],
        "head": ["abc", [1, "2"], [math.nan], {"a": 1}],
        "chat": [1, "yes"],
        "chat_template_kwargs": [[], None, "x", *({name: 1} for name in TAKEN)],
        "joint": [1],
        "reading": [0, 3, "2", True],
        "data": [1],
        "versions": [[], {"torch": 2}],
    }
    for name, values in wrong.items():
        for value in values:
            if name == "segmentation":  # the sentence names its key
                yield case("block", {name: value}, "rm/config.json: the `fractal` block cannot be used (")
                continue
            unknown = isinstance(value, str) and name in ("scorer", "aggregation", "head_type", "reduction")
            says = f"nknown {name} {value!r}" if unknown else name
            yield case("block", {name: value}, f"rm/config.json: the `fractal` block cannot be used (|{says}")
    for version in (True, 1.0, "1", None, 0, 99, [1]):
        yield case("block", {"format_version": version}, f"has format version {version!r}")
    for more in ({"segmentation": {"cut": 1}}, {"segmentation": {"version": 7}}, {"segmentation": {"language": "?"}}):
        yield case("block", more, "the `fractal` block cannot be used (")
    yield case("block", {"ordinal": 4}, "has unknown keys ['ordinal']")


def files() -> Iterator[Case]:
    """Files of rows, and of settings in YAML, as bytes in Latin-1."""
    row = '{"prompt": "1+1?", "completion": "2", "label": 1}\n'
    rows = {
        "": "is empty",
        "\n\n": "is empty",
        "{": "row 1: the line begins a list or an object that goes on",
        "[\n" + row: "row 1: the line begins a list or an object that goes on",
        row + "{'a': 1}\n": "row 2: the line is invalid JSON",
        row + "\n" + row: "row 2: the line is blank",
        "[1, 2]\n": "row 1: the row is list",
        "3\n": "row 1: the row is int",
        "null\n": "row 1: the row is NoneType",
        '"text"\n': "row 1: the row is str",
        "\xff\xfe{\x00}\x00\n\x00": "row 1: the line is not UTF-8 (byte 0)",
        '{"prompt": "caf\xe9"}\n': "row 1: the line is not UTF-8",
        '{"label": 1, "label": 0}\n': "row 1: the line has the name 'label' twice",
        '{"prompt": [{"role": "user", "role": "system"}]}\n': "has the name 'role' twice",
        "[" * 3000 + "]" * 3000 + "\n": "row 1: the line is JSON that Python cannot hold",
        '{"a": ' * 2000 + "1" + "}" * 2000 + "\n": "row 1: the line is JSON that Python cannot hold",
        '{"label": ' + "9" * 5000 + "}\n": "row 1: the line is JSON that Python cannot hold",
        '{"prompt": "a' + "\x00" + '"}\n': "row 1: the line is invalid JSON",
        row[:-2]: "row 1: the line is invalid JSON",
        row * 2 + "}" + row: "row 3: the line is invalid JSON",
        "PAR1": "row 1: the line is invalid JSON",
        "prompt,label\n1,2\n": "row 1: the line is invalid JSON",
    }
    for content, says in rows.items():
        yield case("rows", content, f"rows.jsonl|{says}")
    for content, says in {
        "{}": "does not hold a list",
        "3": "does not hold a list",
        "[1]": "row 1: the row is int",
        row * 2: "rows.json has an object on each line; name it .jsonl",
        "[{}, 2]": "row 2: the row is int",
        "[": "the file is invalid JSON",
        '{"a": 1, "a": 2}': "the file has the name 'a' twice",
        "": "is empty",
        "[]": "is empty",
    }.items():
        yield case("list", content, f"rows.json|{says}")
    for name in ("rows.txt", "rows", "rows.jsonl.bz2", "rows.pkl"):
        yield case("name", name, f"{name} has an unknown ending")
    yield case("gzip", "not gzip", "is not a complete gzip file")
    yield case("gzip", "\x1f\x8b\x08\x00", "is not a complete gzip file")
    for content, says in {
        "": "does not hold a mapping",
        "- a": "does not hold a mapping",
        "3": "does not hold a mapping",
        "a: 1\na: 2\n": "line 2 is invalid YAML: the key 'a' comes twice",
        "a: {b: 1, b: 2}": "the key 'b' comes twice",
        "a: &x [1]\nb: *x\n": "an alias (`*name`) is not taken",
        "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n": "an alias (`*name`) is not taken",
        "a: [1\nb: 2": "is invalid YAML",
        "a: !!python/object/apply:os.system ['true']": "could not determine a constructor",
        "a: !!python/name:os.system": "could not determine a constructor",
        "\ta: 1": "is invalid YAML",
        "a: 1\n b: 2": "is invalid YAML",
        "\xff\xfea\x00": "is not UTF-8 (byte 0)",
        "a: caf\xe9": "is not UTF-8",
        "a: 2026-13-45": "cannot be read",
        "[" * 600: "cannot be read",
        "? [a]\n: 1": "a.yaml",
        "a: \x01": "invalid YAML",
        "%FOO\n---\n---\n": "a.yaml",
        "a: 'b": "is invalid YAML",
        "a: 010": "line 1 is invalid YAML: `010` is not a decimal number; write one, or quote a text",
        "a: -0_7": "`-0_7` is not a decimal number",
        "b: 1\na: 1:30": "line 2 is invalid YAML: `1:30` is not a decimal number",
        "a: 1:30.5": "`1:30.5` is not a decimal number",
        "a: 1_0": "`1_0` is not a decimal number",
        "a: 0x1_0": "`0x1_0` is not a decimal number",
        "a: 1_0.5": "`1_0.5` is not a decimal number",
        "a: !!bool y": "cannot be read",
        "a: !!int ''": "cannot be read",
        "a: !!float x": "cannot be read",
        "a: !!timestamp x": "cannot be read",
        "a: !!binary a": "is invalid YAML",
        "<<: 3": "expected a mapping or list of mappings for merging",
        "---\na: 1\n---\nb: 2": "found another document",
    }.items():
        yield case("yaml", content, f"a.yaml|{says}")
    for content, says in {
        "step": "does not hold a mapping",
        "step: 3": "'step' has int in place of options",
        "step: [1]": "'step' has list in place of options",
        "step: {gama: 1}": "the option 'gama', which StepPPOConfig does not know",
        "step: {gamma: high}": "`gamma` of step is 'high'. Give a number",
        "step: {gamma: 2}": "`gamma` of step is 2. Give a number from 0 to 1",
        "step: {learning_rate: .nan}": "`learning_rate` of step is nan",
        "step: {learning_rate: true}": "`learning_rate` of step is True",
        "3: {gamma: 1}": "3 has dict in place of options",
        "step: {gamma: 1}\nstep: {gamma: 0}": "the key 'step' comes twice",
    }.items():
        yield case("chosen", content, f"a.yaml|{says}")


def folders() -> Iterator[Case]:
    """Model folders by their `config.json` and the layers of their weights."""
    weights = [f"model.layers.{number}.mlp.weight" for number in range(2)]
    for config, says in {
        "[]": "is list, not an object",
        "3": "is int, not an object",
        "null": "is NoneType, not an object",
        "{": "is invalid JSON",
        "": "is invalid JSON",
        '{"a": 1, "a": 2}': "has the name 'a' twice",
        "[" * 5000: "JSON that Python cannot hold",
        "\xff\xfe{\x00": "is not UTF-8",
        '{"num_hidden_layers": 1}': "says 1 layers, but the weights next to it have 2",
        '{"n_layer": 3}': "says 3 layers, but the weights next to it have 2",
        '{"num_hidden_layers": 10000000}': "`num_hidden_layers` is 10000000. Give a whole number from 1 to 2,000",
        '{"num_hidden_layers": 0}': "`num_hidden_layers` is 0",
        '{"num_hidden_layers": -1}': "`num_hidden_layers` is -1",
        '{"num_hidden_layers": "2"}': "`num_hidden_layers` is 2. Give a whole number",
        '{"num_hidden_layers": 2.0}': "`num_hidden_layers` is 2.0",
        '{"num_hidden_layers": true}': "`num_hidden_layers` is True",
        '{"num_hidden_layers": [2]}': "`num_hidden_layers` is [2]",
        '{"text_config": {"num_hidden_layers": 7}}': "says 7 layers",
        '{"n_layers": 1e9}': "`n_layers` is 1000000000.0",
        '{"rms_norm_eps": NaN}': "`rms_norm_eps` is NaN",
        '{"transformers_weights": "other.safetensors"}': "`transformers_weights` names another file of weights",
        '{"attn_implementation": "evil/kernel"}': "`attn_implementation` is 'evil/kernel', code from the hub",
        '{"text_config": {"_attn_implementation": {"": "a/b:c"}}}': "`attn_implementation` is 'a/b:c', code",
        '{"rope_parameters": {"factors": [1, NaN]}}': "`factors` is NaN",
    }.items():
        yield case("folder", {"config": config, "weights": weights}, f"config.json|{says}")
    tensor = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'  # whose four bytes are missing, or one too many
    for content, says in {
        "": "is truncated or not a safetensors file (0 bytes",
        "abc": "is truncated or not a safetensors file",
        "PK\x03\x04" + "x" * 60: "is truncated or not a safetensors file",
        "\xff" * 16: "is truncated or not a safetensors file",
        "\x02" + "\x00" * 7 + "[]": "is truncated or not a safetensors file",
        "\x02" + "\x00" * 7 + "{}": "has no weights",
        "\x02" + "\x00" * 7 + "{x": "is truncated or not a safetensors file",
        "\x09" + "\x00" * 7 + '{"a": {}}': "is truncated or not a safetensors file",
        "\x08" + "\x00" * 7 + '{"a": 1}': "is truncated or not a safetensors file",
        "\x36" + "\x00" * 7 + tensor: "is truncated or not a safetensors file",
        "\x36" + "\x00" * 7 + tensor + "\x00" * 5: "is truncated or not a safetensors file",
        "\x1f" + "\x00" * 7 + '{"a": {"data_offsets":["x",4]}}': "is truncated or not a safetensors file",
    }.items():
        yield case("safetensors", content, f"model.safetensors|{says}")
    for content, says in {
        "[]": "has no `weight_map`",
        "{}": "has no `weight_map`",
        '{"weight_map": {"a": 1}}': "has no `weight_map`",
        '{"weight_map": {"a": "b.safetensors"}}': "names 'b.safetensors', which is not in the folder",
        '{"weight_map": {"a": "../other"}}': "names '../other', which is not in the folder",
        "{": "is invalid JSON",
    }.items():
        yield case("index", content, f"model.safetensors.index.json|{says}")
    for content, says in {
        "{}": "is not a list of modules",
        "[3]": "is not a list of modules",
        '[{"type": "evil.Module"}]': "'evil.Module', which is code from the folder",
        '[{"type": "sentence_transformersX.evil"}]': "which is code from the folder",
        "[{}]": "which is code from the folder",
        '[{"type": "sentence_transformers.models.Router"}]': "which is code from the folder",
        '[{"type": "sentence_transformers.models.Pooling", "path": "../1_Pooling"}]': "names the path '../1_Pooling'",
        '[{"type": "sentence_transformers.models.Pooling", "path": "/etc"}]': "names the path '/etc', which is not in",
        '[{"type": "sentence_transformers.models.Pooling", "path": 1}]': "names the path 1, which is not in",
    }.items():
        yield case("modules", content, f"modules.json|{says}")
    for part, arguments in {
        "model_args": '{"weights_only": false, "use_safetensors": false}',  # a pickle
        "model_kwargs": '{"attn_implementation": "evil/kernel"}',
        "tokenizer_args": '{"tokenizer_file": "/etc/passwd"}',
        "config_args": '{"auto_map": {}}',
    }.items():
        yield case("encoder", f'{{"{part}": {arguments}}}', f"sentence_bert_config.json|`{part}` sets `|Remove it.")
    for name, file in (("tokenizer_file", "/etc/passwd"), ("vocab_file", "../vocab.json"), ("merges_file", 3)):
        yield case("tokenizer", json.dumps({name: file}), f"tokenizer_config.json|`{name}` is '{file}', a file outside")
    for name in ("os.abort", "sys.exit", "torch.hub.load"):
        yield case("activation", json.dumps({"activation_function": name}), f"config.json|is '{name}', which would be")


def patterns() -> Iterator[Case]:
    """Patterns that are none, or take too long: what downloaded models bring."""
    for pattern, says in {
        "(": "is not a regular expression",
        "[a": "is not a regular expression",
        "*": "is not a regular expression",
        "(?P<1>a)": "is not a regular expression",
        "a{2,1}": "is not a regular expression",
        "(?<=a+": "is not a regular expression",
        "\\": "is not a regular expression",
        "(" * 900: "is not a regular expression",
        "(?u)a(?L)": "is not a regular expression",
        "\\L<words>": "is not a regular expression",
        "(?1)": "is not a regular expression",
        "\\p{none}": "is not a regular expression",
        "a{99999999999999999999}": "is not a regular expression",
        "a" * 3000: "The pattern has 3,000 characters",
        "(?R)": "calls itself",
        "a(?R)?b": "calls itself",
        "(a)(?-1)": "calls itself",
        "(?P<x>a(?&x)?)": "calls itself",
        "(?P<x>a(?P>x)?)": "calls itself",
        "(a|a)*$": "takes longer than",
        "(a|aa)+$": "takes longer than",
        "(.*a){20}$": "takes longer than",
    }.items():
        yield case("pattern", pattern, says)


def results() -> Iterator[Case]:
    """Rows of results with metrics that are none."""
    for row, says in {
        "[1]": "line 1 is not a result but list",
        "3": "line 1 is not a result but int",
        "null": "line 1 is not a result but NoneType",
        "x": "line 1 is invalid JSON",
        "{}": "row 1 holds no metrics",
        '{"metrics": 3}': "row 1 holds no metrics",
        '{"metrics": [1]}': "row 1 holds no metrics",
        '{"metrics": null}': "row 1 holds no metrics",
        '{"metrics": {"a": "b"}}': "the metric 'a' is 'b'. Give a number, or null",
        '{"metrics": {"a": [1]}}': "the metric 'a' is [1]",
        '{"metrics": {"a": {"b": 1}}}': "the metric 'a' is {'b': 1}",
        '{"metrics": {"a": ' + "9" * 400 + "}}": "the metric 'a' is 9999",
        '{"metrics": {"a": 1}, "metrics": {}}': "has the name 'metrics' twice",
        '{"metrics": {"a": 1, "a": 2}}': "has the name 'a' twice",
        "\xff\xfe{\x00": "is not UTF-8",
        "[" * 3000 + "]" * 3000: "JSON that Python cannot hold",
        '{"metrics": {}}\n[2]': "line 2 is not a result but list",
    }.items():
        yield case("results", row, f"results.jsonl|{says}")


def case(reader: str, given: Any, says: str) -> Case:
    """One line of the corpus; parts of the sentence stand between bars."""
    return {"reader": reader, "given": given, "says": says.split("|")}


def option_of(one: Case) -> tuple[str, str] | None:
    """The configuration and the option that a case gives; None for a case of another reader."""
    if one["reader"] != "option":
        return None
    (name,) = one["given"].keys() - {"of"}
    return one["given"]["of"], name


def is_here(one: Case) -> bool:
    """Whether the installed transformers and TRL have what a case gives: base classes gain and lose options."""
    option = option_of(one)
    return option is None or option[1] in {each.name for each in fields(configurations()[option[0]][0])}


def cases() -> list[Case]:
    """All of them, for the installed versions of transformers and TRL."""
    return [one for made in (options, kinds, objects, blocks, files, folders, patterns, results) for one in made()]


if __name__ == "__main__":
    CORPUS.write_text("".join(json.dumps(one) + "\n" for one in cases()), encoding="utf-8")
