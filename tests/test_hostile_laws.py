"""The laws of hostile.py on random hostile problems: a few here, many more with `make fuzz`."""

import pytest
from hypothesis import given, settings

from tests.hostile import JOBS, run
from tests.hostile_problems import recipes
from tests.hostile_transport import draw_problem, solve


@pytest.mark.parametrize(("check", "name"), JOBS)
@settings(max_examples=6)
@given(recipe=recipes)
def test_law(check, name, recipe):
    run(check, name, recipe)


@pytest.mark.parametrize("part", range(4))
def test_solver(part):
    for seed in range(60 * part, 60 * (part + 1)):
        solve(draw_problem(seed))
