"""Tables of real words, from rows with known numbers."""

from benchmarks.evidence import words_page


def run(arm, seed, solved, dataset="gsm_symbolic"):
    """Rows of a finished run: right answers to two problems, of four draws each, at three points."""
    return [
        {
            "benchmark": "words",
            "arm": arm,
            "dataset": dataset,
            "seed": seed,
            "split": "held_out",
            "config": {"last": point == len(solved) - 1, "trial": None},
            "metrics": {
                "rollouts": 64 * point,
                "accuracy": sum(right) / 8,
                "solved": right,
                "draws": 4,
                "step_accuracy": 0.25 * point,
                "kl": 0.5 * seed + point,
            },
        }
        for point, right in enumerate(solved)
    ]


def test_the_study_shows_means_and_paired_differences():
    rows = [
        *run("dense_outcome", 0, [[0, 0], [2, 2], [4, 4]]),
        *run("dense_outcome", 1, [[0, 0], [2, 2], [4, 4]]),
        *run("outcome_grpo", 0, [[0, 0], [1, 1], [4, 4]]),
        *run("outcome_grpo", 1, [[0, 0], [1, 1], [2, 2]]),
        *run("outcome_ppo", 0, [[0, 0], [1, 1], [4, 4]])[:2],  # not finished
    ]
    table = words_page.study(rows)
    assert "| `gsm_symbolic` | `dense_outcome` | 2 | 128 | 0.0 | 50.0 | 100.0 | 50.0 | 2.25 |" in table
    assert "outcome_ppo" not in table
    (line,) = words_page.differences(rows).splitlines()[2:]
    # Every problem is 25 points ahead half-way, whichever are drawn.
    assert "| `dense_outcome` - `outcome_grpo` | 2 | +25.0 [+25.0, +25.0] | +25.0 [+0.0, +50.0] |" in line


def test_without_rows_the_page_says_so_and_other_documents_stay():
    document = "<!-- table: words study -->\nold\n<!-- end of table: words study -->"
    assert words_page.NONE_YET in words_page.page(document, [])
    assert words_page.page("no table", []) == "no table"


def test_the_last_row_of_an_arm_counts():
    rows = [
        {
            "arm": "sft",
            "dataset": name,
            "seed": 0,
            "metrics": {"prompts": 60, "accuracy": value, "right_through_a_wrong_line": 0.1},
        }
        for name, value in (("gsm_symbolic_unseen", 0.1), ("gsm_symbolic", 0.2), ("gsm_symbolic", 0.3))
    ]
    lines = words_page.policies(rows).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == ["30.0", "10.0"]
