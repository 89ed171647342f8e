"""A test of the parity tests: with a deliberate fault, they fail."""

from __future__ import annotations

import pytest
from support.parity import faults
from support.parity.compare import assert_same, reference, results
from support.parity.parity_runs import small_recipe
from support.pool import Pool


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_a_deliberate_fault_is_seen(pool: Pool, corpus: str, fault: faults.Callable[[faults.Patch], None]) -> None:
    ranks, sections = faults.FAULTS[fault]
    recipe = small_recipe(corpus, **sections).model_dump_json()
    expected = reference(corpus, **sections)
    try:
        found = results(pool.run(faults.train, ranks, fault.__name__, recipe))[0]
    except AssertionError as error:
        assert "different values" in str(error), "copies that drifted apart are a find too"
        return
    with pytest.raises(AssertionError):
        assert_same(found, expected)
