"""What `make coverage` makes of a report of coverage.py."""

import json

from benchmarks.coverage import by_room, coverage_table, main
from fractal_rm.evaluation.results import read_results


def summary(*counts: int) -> dict[str, dict[str, int]]:
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {"summary": dict(zip(names, counts, strict=True))}


REPORT = {
    "meta": {"version": "7.17"},
    "files": {
        "fractal_rm/data/bag.py": summary(8, 6, 2, 1),
        "fractal_rm/fractal_rm/data/formats/index.py": summary(2, 2, 2, 2),
        "fractal_rm/files.py": summary(10, 10, 0, 0),
    },
}


def test_shares_are_of_the_sums_of_a_rooms_files():
    assert by_room(REPORT) == {
        "data": {"statements": 10, "lines": 0.8, "branches": 0.75},
        "files": {"statements": 10, "lines": 1.0, "branches": 1.0},
        "all": {"statements": 20, "lines": 0.9, "branches": 0.75},
    }


def test_a_report_becomes_rows_and_the_table_shows_the_last_run(tmp_path):
    report, results = tmp_path / "coverage.json", tmp_path / "rows.jsonl"
    for covered in (1, 6):
        files = REPORT["files"] | {"fractal_rm/data/bag.py": summary(8, covered, 2, 1)}
        report.write_text(json.dumps(REPORT | {"files": files}))
        main(["--report", str(report), "--results", str(results)])
    rows = read_results(results)
    assert [row["arm"] for row in rows] == ["data", "files", "all"] * 2
    lines = coverage_table(rows).splitlines()[2:]
    assert [line.split("|")[1].strip(" `") for line in lines] == ["data", "files", "all"]
    assert "0.800" in lines[0]
