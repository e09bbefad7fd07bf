"""docs/results.md shows the numbers of docs/simulated.json, and its pictures are there."""

import json
import re
from pathlib import Path

import pytest

from configs import study

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
RESULTS = json.loads((DOCS / "simulated.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("title", list(RESULTS["tables"]))
def test_the_page_shows_every_row_of_the_published_results(title):
    table = RESULTS["tables"][title]
    for row in (table["header"], *table["rows"]):
        assert f"| {' | '.join(row)} |" in PAGE


def test_the_page_says_that_the_study_is_simulated_and_names_its_deviations():
    assert RESULTS["note"] in PAGE
    assert all(sentence in " ".join(PAGE.split()) for sentence in RESULTS["deviations"])


def test_the_page_holds_the_pictures_that_it_names():
    named = re.findall(r"\]\((images/[\w/.]+)\)", PAGE)
    assert named and all((DOCS / name).stat().st_size < 150_000 for name in named)


def test_the_published_results_have_every_arm_and_fault_of_the_config():
    config = study.get_config("simulated")
    rows = {row[0] for row in RESULTS["tables"]["Comparison"]["rows"]}
    assert {f"target test, {arm}" for arm in (*config.arms, "zero_shot")} <= rows
    faults = [row[0] for row in RESULTS["tables"]["Faults of the released study"]["rows"]]
    assert all(any(found.startswith(fault) for found in faults) for fault in config.ablations)
