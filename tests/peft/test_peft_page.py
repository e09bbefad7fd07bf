"""docs/peft.md says what the methods cost: the figures that do not depend on a machine are those computed here."""

import re
from pathlib import Path

import pytest

from mednext_jax import peft
from mednext_jax.nn.mednext import create_mednext

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
COMPARED = slice(1, 7)  # trains, parameters, %, file, step FLOPs, predict FLOPs; memory and time are a machine's


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_costs_is_what_the_methods_cost():
    _, table = PAGE.read_text(encoding="utf-8").split("| method | trains |")
    shown = [cells(line) for line in table.split("\n\n")[0].splitlines()[2:]]
    methods = []
    for title, *_ in shown:
        name, options = re.fullmatch(r"\*?`(\w+)`((?: \w+=\w+)*)\*?", title).groups()
        methods.append(peft.create(name, **dict(option.split("=") for option in options.split())))
    assert {method.name for method in methods} == peft.METHODS.keys()
    costs = peft.costs(methods, create_mednext("S", n_classes=4), (64, 64, 64))
    for row, line in zip(shown, peft.markdown(costs).splitlines()[2:], strict=True):
        trains, *counts, step, predict = row[COMPARED]
        expected_trains, *expected, expected_step, expected_predict = cells(line)[COMPARED]
        assert trains in (expected_trains, "the same in the decoder alone")
        assert counts == expected, row[0]
        # The last digit may turn with how a version of JAX writes a sum.
        assert float(step) == pytest.approx(float(expected_step), abs=0.011), row[0]
        assert float(predict) == pytest.approx(float(expected_predict), abs=0.011), row[0]
