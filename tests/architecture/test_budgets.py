"""The size budgets hold. Run with -s, or `make budgets`, to see the table."""

from __future__ import annotations

import budgets
import pytest


@pytest.mark.parametrize("what", budgets.BUDGETS.keys())
def test_budget_is_kept(what: str) -> None:
    budget = budgets.budget(what)
    print(f"{what}: {budget.value:g} (limit {budget.limit:g})")
    worst = sorted(budgets.function_lengths().items(), key=lambda item: -item[1])[:5] if "function" in what else ""
    assert budget.kept, f"{what}: {budget.value:g} is more than {budget.limit:g} {worst}"
