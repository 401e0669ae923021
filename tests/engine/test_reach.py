"""Machines that reach each other, and one that waits in vain."""

import pytest

from tests.helpers.workers import JobFailed


def test_machines_that_reach_each_other_tell_how_fast(workers):
    rates = workers(2).run("reach", world=2, wait_s=30)
    assert len(rates) == 2 and min(rates) > 0


def test_a_machine_that_nobody_joins_is_a_fault_in_time(workers):
    with pytest.raises(JobFailed, match="2 machines do not reach each other at 127.0.0.1:") as failure:
        workers(1).run("reach", world=2, wait_s=2)
    assert failure.value.kind == "FaultError"
