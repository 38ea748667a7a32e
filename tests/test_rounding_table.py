"""The table of rounding and sparsity together: what is beyond the sum of either alone, in pairs by sequence."""

from typing import Any

import pytest
from helpers import random_tokens, tiny_model, tiny_plan
from rounding_table import rounding_table

from teal.evaluation import Evaluation, evaluate, mean_and_error


def measured(**options: Any) -> Evaluation:
    model = tiny_model()
    return evaluate(model, random_tokens(3, 24), tiny_plan(model), (0.25, 0.6), **options)


def test_against_plain_sums() -> None:
    exact, rounded = measured(), measured(simulate_bits=3)
    _, rows = rounding_table(exact, [rounded])
    assert [row[0] for row in rows] == ["as they are", "", "", "int3 (simulated)", "", ""]
    both, sparse = rounded.measurements[1].nll, exact.measurements[1].nll
    excess = [
        together - dense - (only_sparse - dense) - (only_rounded - dense)
        for together, only_sparse, only_rounded, dense in zip(
            both, sparse, rounded.dense_nll, exact.dense_nll, strict=True
        )
    ]
    mean, error = mean_and_error(excess)
    found = [float(value) for value in rows[5][7].split(" ± ")]
    assert found == pytest.approx([mean, error], abs=1e-4)
    alone, only_sparse, together, beyond = (float(cell.split(" ± ")[0]) for cell in rows[5][4:])
    assert beyond == pytest.approx(together - alone - only_sparse, abs=2e-4)
    assert rows[3][4] == rows[3][6] == rows[4][4]
