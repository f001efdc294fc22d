"""The machine of `test_ownership_machine.py` can fail: it finds defects that were made on purpose."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from simulated.mutants import MUTANTS, USUAL, Mutant

from .test_ownership_machine import EXAMPLES, STEPS, Ownership


@pytest.mark.parametrize(
    "mutant",
    MUTANTS if EXAMPLES > 1 else USUAL,
    ids=lambda mutant: mutant.__name__,
)
def test_a_defect_is_found(mutant: Mutant, monkeypatch, capsys):
    mutant(monkeypatch)
    search = settings(
        max_examples=400 * EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(Exception) as found:
        run_state_machine_as_test(Ownership, settings=search)
    assert not isinstance(found.value, TypeError | AttributeError | NameError | KeyError)
