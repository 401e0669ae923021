"""Fixtures that every room's tests share."""

import pytest

from tests.helpers.jobsite import Jobsite, make_jobsite
from tests.helpers.workers import Workers


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    """``workers(n)``: a group of n processes that lives as long as the session."""
    logs = tmp_path_factory.mktemp("workers")
    groups: dict[int, Workers] = {}

    def group(world: int) -> Workers:
        return groups.setdefault(world, Workers(world, logs))

    yield group
    for running in groups.values():
        running.stop()


@pytest.fixture(scope="session")
def jobsite(tmp_path_factory) -> Jobsite:
    """A model, corpora and a configuration; tests write into run folders of their own."""
    return make_jobsite(tmp_path_factory.mktemp("jobsite"))
