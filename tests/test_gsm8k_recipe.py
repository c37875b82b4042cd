"""The recipe for GSM8K solutions: its language model, its benchmark and its tables, on invented rows."""

import importlib.util
import json
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY
from support.stand_ins import save_reward_model, write_jsonl

from benchmarks.evaluation import gsm8k_solutions as benchmark
from fractal_rm.data.bag import Bag
from fractal_rm.evaluation.results import read_results
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import load_tokenizer

RECIPE = REPOSITORY / "recipes" / "gsm8k_solutions"
RESULTS = REPOSITORY / "benchmarks" / "results" / "gsm8k_solutions.jsonl"
# Steps of an invented text, so that few texts fill a training row.
REPEATS = 20


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_lm() -> ModuleType:
    return load(RECIPE / "train_lm.py")


def question(i: int) -> str:
    return f"Ada has {i} pens and buys {i + 1} more. How many has she?"


def solution(i: int, *, kind: str, wrong: bool, known: bool) -> dict:
    """A row as the data sets have them."""
    total = 2 * i + 1 + wrong
    return {
        "id": f"{kind}-{i}",
        "prompt": question(i),
        "steps": [f"She has {i} pens", f"{i} + {i + 1} = {total}", f"A: {total}"],
        "step_labels": [1, 0, None] if known and wrong else [1, 1, 1] if known else [None] * 3,
        "label": int(not wrong),
        "aggregation": "min" if known else "native",
        "task": "math",
        "meta": {"answer_correct": int(not wrong)},
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Invented rows in the layout of the real data sets."""
    folder = tmp_path_factory.mktemp("data")
    for split, numbers in (("train", range(10)), ("validation", range(10, 20)), ("test", range(20, 30))):
        rows = [solution(i, kind="gsm8k-sol", wrong=i % 2 == 0, known=False) for i in numbers]
        write_jsonl(folder / "gsm8k_solutions" / f"{split}.jsonl.gz", rows)
    rows = [solution(i, kind="processbench-gsm8k", wrong=i % 2 == 0, known=True) for i in (*range(5), *range(20, 30))]
    rows.append(solution(40, kind="processbench-math", wrong=True, known=True))
    write_jsonl(folder / "processbench" / "test.jsonl.gz", rows)
    texts = []
    for i in range(20, 420):
        step = f"{i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n"
        source = "gsm8k_train" if i % 5 else "svamp"
        texts.append({"source": source, "text": f"Question: {question(i)}\nAnswer: {step * REPEATS}#### {2 * i + 1}"})
    write_jsonl(folder / "math_text.jsonl.gz", texts)
    return folder


# The language model ---------------------------------------------------------------------------------------------------


def test_texts_look_like_solutions_and_leave_out_what_is_asked_in_the_evaluation(train_lm, data_dir):
    texts = train_lm.read_texts(str(data_dir), ("gsm8k_train",))
    assert ("Ada has 41 pens and buys 42 more. How many has she?", "41 + 42 = 83\n" * REPEATS + "A: 83") in texts
    asked = {question(i) for i in range(20, 30)}
    assert not asked & {text for text, _ in texts}
    assert len(texts) == len([i for i in range(30, 420) if i % 5])


@pytest.mark.parametrize("text", ["2 + 2 = 4", "Question: 2+2?", "Question: 2+2?\nAnswer: "])
def test_a_text_without_question_and_answer_is_no_solution(train_lm, text):
    assert train_lm.split_text(text) is None


def test_every_digit_is_a_token_and_a_text_comes_back_whole(train_lm):
    tokenizer = train_lm.train_tokenizer([("2024 pens cost 3.50?", "2024 * 3.50 = 7084\nA: 7084")] * 5, 300)
    ids = tokenizer("A: 7084 € 12", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "A: 7084 € 12"
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip().isdigit()] == list("708412")
    assert tokenizer("A")["input_ids"][0] == tokenizer.bos_token_id


def test_the_language_model_is_trained_and_goes_on_from_its_checkpoint(train_lm, data_dir, tmp_path, capsys):
    folder = tmp_path / "lm"
    small = ["--data_dir", str(data_dir), "--output_dir", str(folder), "--hidden_size", "32", "--layers", "1"]
    small += ["--vocab_size", "320", "--no-bf16"]
    train_lm.main([*small, "--max_steps", "2"])
    assert "nats per token" in capsys.readouterr().out
    train_lm.main([*small, "--max_steps", "3"])
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    model = benchmark.untrained(folder, "sum")
    prompts, responses = [question(1)] * 2, [["1 + 2 = 3"], ["1 + 2 = 3", "A: 3"]]
    scores = [scored.step_scores for scored in model.score(prompts, responses)]
    assert scores[0][0] == pytest.approx(scores[1][0], abs=1e-4)
    assert load_tokenizer(folder).pad_token_id == 0


# The benchmark --------------------------------------------------------------------------------------------------------


def arms(path: Path) -> set[tuple[str, str]]:
    return {(row["arm"], row["dataset"]) for row in read_results(path)}


README = "".join(
    f"<!-- table: {name} --><!-- end of table: {name} -->\n"
    for name in (
        "gsm8k_solutions",
        "processbench_gsm8k",
        "processbench_gsm8k_unseen",
        "response gains",
        "step gains",
    )
)


def test_the_benchmark_measures_trained_models_and_floors_and_writes_the_tables(data_dir, tmp_path):
    runs, results, readme = tmp_path / "runs", tmp_path / "rows.jsonl", tmp_path / "README.md"
    readme.write_text(README)
    for arm in ("token", "likelihood"):
        folder = runs / f"{arm}-0"
        save_reward_model(folder, scorer=arm, aggregation="product", prompt_template="Question: {prompt}\nAnswer: ")
        (folder / "metrics.json").write_text('{"train": {"responses": 10, "train_runtime": 1.5}}')
    flags = ["--data-dir", str(data_dir), "--runs-dir", str(runs), "--results", str(results), "--readme", str(readme)]
    benchmark.main([*flags, "--arms", "floors", "token", "likelihood"])
    rows = read_results(results)
    assert {row["dataset"] for row in rows if row["arm"] == "token"} == set(benchmark.DATASETS)
    assert {row["arm"] for row in rows} == {arm for arm in benchmark.ARMS if "untrained" not in arm}
    by_arm = {(row["arm"], row["dataset"], row["seed"]): row["metrics"] for row in rows}
    # Rows 20 to 29 are asked in no training row.
    assert by_arm["token", "processbench_gsm8k", 0]["responses"] == 15
    assert by_arm["token", "processbench_gsm8k_unseen", 0]["responses"] == 10
    assert by_arm["floor_copy", "processbench_gsm8k", None]["all_correct_accuracy"] == 1
    assert by_arm["floor_position", "processbench_gsm8k", None]["same_position_auc"] == 0.5
    assert by_arm["floor_position", "processbench_gsm8k", None]["within_bag_auc"] == 1
    reward_model = StepRewardModel.from_pretrained(runs / "token-0")
    assert reward_model.settings.aggregation == "product"
    shown = readme.read_text()
    assert "| token |" in shown
    assert benchmark.with_tables(shown, rows) == shown


def test_a_scorer_has_no_gain_over_itself_and_a_perfect_one_gains_on_every_draw():
    bags = [
        Bag("2?", "a\nb", ((0, 1), (2, 3)), label=float(i % 2), step_labels=(1.0, float(i % 2)), id=str(i))
        for i in range(40)
    ]
    coin = benchmark.score_by(benchmark.at_random(0), bags)
    same = benchmark.intervals(coin, coin, bags, (0.5, 0.5))
    assert [same[name] for name in benchmark.gain_columns("bag_auc", "f1")] == [0.0] * 6
    perfect = benchmark.score_by(lambda bag: [1.0, 0.75 if bag.label else 0.25], bags)
    gains = benchmark.intervals(perfect, coin, bags, (0.5, 0.5))
    assert gains["same_position_auc_gain"] == gains["same_position_auc_gain_low"] == 0.5
    assert gains["bag_auc_gain_low"] > 0
    assert gains["f1_gain_low"] > 0


# What is published ----------------------------------------------------------------------------------------------------


def test_the_tables_of_the_readme_are_those_of_the_rows():
    document = (RECIPE / "README.md").read_text(encoding="utf-8")
    assert benchmark.with_tables(document, read_results(RESULTS)) == document


def test_every_arm_has_its_rows():
    expected = set(product(benchmark.ARMS, benchmark.DATASETS)) - {("floor_copy", "gsm8k_solutions")}
    assert arms(RESULTS) == expected
