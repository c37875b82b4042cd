"""Help and unknown names: short, complete, and answered without the libraries that options configure."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from support.documents import documents, script

from fractal_rm.cli.main import COMMANDS, main
from fractal_rm.cli.options import help as help_module
from fractal_rm.cli.options.help import ALIASES, COMMON, PLAIN, SCREEN, full_help, options_of, short_help
from fractal_rm.cli.options.parser import CommandParser

HEAVY = ("torch", "transformers", "trl", "datasets", "peft")


@pytest.fixture(scope="module")
def live() -> dict[str, tuple[list[type], CommandParser]]:
    """What each command really parses."""
    arguments_of = script(REPOSITORY / "docs" / "tools" / "site_reference.py").arguments_of
    kinds = {command: arguments_of(command) for command in COMMANDS}
    return {command: (found, CommandParser(command, found)) for command, found in kinds.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_read_from_source_are_those_of_the_dataclasses(live, command):
    kinds, parser = live[command]
    read = {option.name: option for option in options_of(command).options}
    assert list(read) == list(dict.fromkeys(parser.names))
    assert set(options_of(command).names) == {*read, *(alias for alias, name in ALIASES.items() if name in read)}
    shown = {name for names in COMMON.get(command, {}).values() for name in names}
    actions = {action.dest: action for action in reversed(parser._actions)}  # `--no_x` comes after `--x`
    for kind in kinds:
        for field in dataclasses.fields(kind):
            option, action = read[field.name], actions[field.name]
            assert option.required == bool(action.required), field.name
            ours = option.owner.startswith("fractal_rm")
            read_all = ours or field.name in ("eval_strategy", "lr_scheduler_type", "train_sampling_strategy")
            assert option.choices in (tuple(map(str, action.choices or ())), *([] if read_all else [()])), field.name
            assert option.is_list == (action.nargs == "+") or not ours, field.name
            if not ours and field.name not in shown:
                continue  # only its name is needed, and the full help where the source tells it
            assert option.help == " ".join(str(action.help).replace("%%", "%").split()), field.name
            if field.name != "output_dir" or command in ("compare", "quickstart"):
                value = action.default
                default = "" if value is None or action.required else str(value)
                assert option.default == (default.lower() if isinstance(value, bool) else default), field.name
    assert options_of(command).complete
    removed = {name for kind in kinds for name in getattr(kind, "REMOVED", {})}
    assert set(options_of(command).removed) == removed


def test_every_option_of_our_own_stands_in_a_document():
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents() if path.name != "CHANGELOG.md")
    read = [option for command in COMMANDS for option in options_of(command).options]
    own = {option.name for option in read if option.owner.startswith("fractal_rm")}
    assert len(own) > 150
    assert own - set(re.findall(r"\w+", text)) == {"remove_unused_columns"}  # never but False


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = short_help(command, COMMANDS[command]).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines[:-1])) <= 80
    shown = {line.split()[0] for line in lines if line.startswith("  --")}
    wanted = [name for names in COMMON.get(command, {}).values() for name in names]
    assert shown == {f"--{name}" for name in wanted or [option.name for option in options_of(command).options]}
    if wanted:
        assert f"lists {len(options_of(command).options) - len(wanted)} more" in lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_sentence_of_the_help_is_cut_off(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    choices = {f"--{option.name}" for option in options_of(command).options if option.choices}
    lines = [line.split() for line in short_help(command, COMMANDS[command]).splitlines() if line.startswith("  --")]
    assert [words[0] for words in lines if "..." in words and words[0] not in choices] == []


@pytest.mark.parametrize("command", ["train", "ppo"])
def test_an_option_with_choices_says_what_is_chosen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = {line.split()[0]: line for line in short_help(command, COMMANDS[command]).splitlines() if "--" in line}
    chosen = [one for one in options_of(command).options if one.choices and f"--{one.name}" in lines]
    chosen = [one for one in chosen if one.name not in PLAIN]
    assert len(chosen) > 3
    for one in chosen:
        sentence = one.help.partition(": ")[0].partition(". ")[0].partition("; ")[0].rstrip(".")
        assert sentence in lines[f"--{one.name}"], one.name


def test_choices_are_shown_where_the_help_is_shown_whole():
    text = " ".join(short_help("score", COMMANDS["score"]).split())
    assert "published rows, docs/datasets.md: prm800k, processbench," in text


def test_the_full_help_explains_every_option_with_ours_first():
    text = full_help("ppo", COMMANDS["ppo"])
    for option in options_of("ppo").options:
        assert f"\n  --{option.name}" in text
    assert text.index("fractal_rm.StepPPOConfig:") < text.index("trl.GRPOConfig:")
    assert "--model, --model_name_or_path  (required)" in text


@pytest.fixture(scope="module")
def answered() -> tuple[str, str]:
    """Output and errors of commands that need no library, in one process that says which of them it imported."""
    calls = [["ppo", "--help"], ["train", "--help", "all"], ["train", "-h"], ["ppo", "--modle", "x"], ["trian"]]
    calls += [["compare", "--arms", "oracle", "fractal_mx"]]
    code = (
        f"import sys; from fractal_rm.cli.main import main; print([main(argv) for argv in {calls}]);"
        f"print('imported', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_help_and_a_typo_import_no_heavy_library(answered):
    output, errors = answered
    assert output.endswith("[0, 0, 0, 2, 2, 2]\nimported []\n")
    assert "unknown flag --modle. Did you mean `model`?" in errors
    assert "Unknown command 'trian'. Did you mean `train`?" in errors
    assert "compare: `arms` is 'fractal_mx'. Did you mean `fractal_mix`? Choose one of outcome_grpo, " in errors


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--leave_one_out", "1"], "unknown flag --leave_one_out. It is no longer an option. Leave it out: it"),
        (["--leaning-rate=1"], "unknown flag --leaning-rate. Did you mean `learning_rate`?"),
        (["--model_name_or_pth", "x"], "Did you mean `model_name_or_path`?"),
        (["--qqqqqq", "1"], "unknown flag --qqqqqq. See `fractal-rm ppo --help`."),
        (["--no_bf17"], "unknown flag --no_bf17. Did you mean"),
        (["--config", "typo.yaml"], "typo.yaml: unknown key 'modle'. Did you mean `model`?"),
        (["--config=typo.yaml"], "typo.yaml: unknown key 'modle'. Did you mean `model`?"),
        (["--config", "none.yaml"], "There is no file none.yaml."),
        (["--shaping", "delt"], "fractal-rm: ppo: `shaping` is 'delt'. Did you mean `delta`? Choose one of raw, "),
        (["--shaping=x"], "fractal-rm: ppo: `shaping` is 'x'. Choose one of raw, "),
        (["--eval_strategy", "stepz"], "`eval_strategy` is 'stepz'. Did you mean `steps`? Choose one of no, steps, ep"),
        (["--dataset_format", "aquamuse"], "`dataset_format` is 'aquamuse'. Its files hold good summaries only"),
        (["--config", "choice.yaml"], "choice.yaml: `shaping` is 'delt'. Did you mean `delta`?"),
    ],
)
def test_an_unknown_name_is_answered_before_the_command_is_imported(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("modle: x\n")
    (tmp_path / "choice.yaml").write_text("shaping: delt\n")
    monkeypatch.setattr("fractal_rm.cli.main.run", lambda *_: pytest.fail("the command was imported"))
    assert main(["ppo", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_misspelt_flag_and_wrong_choice_is_answered_at_once(command, monkeypatch, capsys):
    monkeypatch.setattr("fractal_rm.cli.main.run", lambda *_: pytest.fail("the command was imported"))
    known = options_of(command)
    for option in known.options:
        misspelt = f"{option.name}q"
        assert main([command, f"--{misspelt}", "1"]) == 2
        assert f"unknown flag --{misspelt}. Did you mean `" in capsys.readouterr().err
        if option.choices:
            right = option.choices[:1] if option.is_list else ()
            assert main([command, f"--{option.name}", *right, "qqq"]) == 2
            assert f"{command}: `{option.name}` is 'qqq'. Choose one of " in capsys.readouterr().err
        elif option.number:
            right = ("1",) if option.is_list else ()
            assert main([command, f"--{option.name}", *right, "ten"]) == 2
            assert f"{command}: `{option.name}` is 'ten'. Give {option.number}." in capsys.readouterr().err


def test_numbers_are_known_by_the_type_of_their_option():
    known = {option.name: option.number for option in options_of("ppo").options}
    assert known["max_steps"] == known["num_generations"] == "a whole number"
    assert known["learning_rate"] == known["kl_coef"] == known["reward_weights"] == "a number"
    assert known["bf16"] == known["shaping"] == known["model"] == known["output_dir"] == ""


def test_known_names_reach_the_command(tmp_path, monkeypatch):
    (tmp_path / "good.yaml").write_text("model_name_or_path: x\nlearning_rate: 1\neval_strategy: no\nkl_coef: null\n")
    given = [
        "--config",
        str(tmp_path / "good.yaml"),
        "--no_chat",
        "--model-name-or-path",
        "y",
        "--step_separator",
        "-- ",
        "--center",
        "batch",
        "stray",
    ]
    seen = []
    monkeypatch.setattr("fractal_rm.cli.main.run", lambda *call: seen.append(call))
    assert main(["ppo", *given]) == 0
    assert seen == [("ppo", given)]


def test_a_library_without_its_source_leaves_unknown_names_to_the_parser(monkeypatch):
    read = help_module._module
    monkeypatch.setattr(help_module, "_module", lambda name: None if name.startswith("transformers") else read(name))
    seen = []
    monkeypatch.setattr("fractal_rm.cli.main.run", lambda *call: seen.append(call))
    help_module.options_of.cache_clear()
    try:
        assert main(["train", "--learning_rate", "1"]) == 0
        assert seen == [("train", ["--learning_rate", "1"])]
    finally:
        help_module.options_of.cache_clear()


def test_names_of_trl_mean_ours(live, tmp_path):
    _, parser = live["ppo"]
    (tmp_path / "trl.yaml").write_text("model_name_or_path: policy\nreward_funcs: exact_answer\n")
    parser.read_config(str(tmp_path / "trl.yaml"))
    known, rest = parser.parse_known_args(["--reward_model_name_or_path", "rm", "--reward-funcs", "my.rewards.exact"])
    assert (known.model, known.reward_model, known.reward_function) == ("policy", ["rm"], "my.rewards.exact")
    assert rest == []


@pytest.mark.parametrize("command", ["train", "ppo"])
def test_without_an_output_folder_the_default_names_the_command_and_the_time(live, command, monkeypatch):
    kinds, parser = live[command]
    assert parser.get_default("output_dir").startswith(f"runs/{command}-20")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"are required: .*--output_dir"):
        CommandParser(command, kinds).parse_known_args(["--model", "x"])
