"""Runs of tests in full form that are recorded: the tests they name, and their figures."""

import re
from pathlib import Path

import pytest
from benchmarks.endurance import ROOT, RUNS, Run, lines_of, read

REPORT = """<testsuites><testsuite>
<testcase name="test_one[pgbouncer session 200]"/>
<testcase name="test_one[pgbouncer transaction 0]">
  <properties><property name="changes" value="3"/></properties>
</testcase>
<testcase name="test_two[x-pgbouncer transaction 0-y]">
  <properties><property name="changes" value="4"/><property name="took" value="1 s"/></properties>
</testcase>
</testsuite></testsuites>
"""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_names_tests_that_exist(name: str) -> None:
    """Each word of its filter is in one of its files, or in the name of a case."""
    run = RUNS[name]
    files = [ROOT / each for each in run.tests if each.startswith("tests/")]
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for file in files
        for path in (file.rglob("*.py") if file.is_dir() else [file])
    )

    assert files
    assert all(file.exists() for file in files)
    if "-k" in run.tests:
        wanted = run.tests[run.tests.index("-k") + 1]
        assert all(word in text for word in re.split(r" (?:or|and) ", wanted))


def test_tests_are_counted_by_a_part_of_their_names(tmp_path: Path) -> None:
    """Beside the figures that they record: numbers are added, texts are joined."""
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    run = Run("They pass.", ("tests/contracts",), {"SOAK": "1"}, r"pgbouncer \w+ \d+")
    lines = list(lines_of(run, read(report, run.counted_by), 2.0))

    assert lines[lines.index("They pass.") + 2 :] == [
        "| what | figure |",
        "| --- | ---: |",
        "| tests passed | 3 |",
        "| tests of pgbouncer session 200 | 1 |",
        "| tests of pgbouncer transaction 0 | 2 |",
        "| changes | 7 |",
        "| took | 1 s |",
        "| seconds | 2 |",
    ]
