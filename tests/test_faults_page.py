"""docs/faults.md promises a test for every fault; the tests it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text())))


def test_every_row_names_a_test():
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| What it does")]
    assert len(rows) > 25 and all("::test_" in row.rsplit("|", 2)[1] for row in rows)


@pytest.mark.parametrize("file, test", NAMED)
def test_named_test_exists(file, test):
    assert f"def {test}(" in (ROOT / file).read_text()
