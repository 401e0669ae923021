"""Fixtures that every room's tests share."""

import pytest
from hypothesis import settings

from tests.helpers.jobsite import Jobsite, make_jobsite
from tests.helpers.matrix import Matrix, write_table
from tests.helpers.workers import Workers

settings.register_profile("suite", deadline=None)  # an example that took long on a busy machine is no failure
settings.load_profile("suite")


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


def pytest_addoption(parser):
    parser.addoption("--write-matrix", action="store_true", help="write the README's table of layouts from what passed")


def pytest_configure(config):
    if config.getoption("--write-matrix"):
        config.pluginmanager.register(_MatrixWriter())


class _MatrixWriter:
    def __init__(self):
        self.matrix = Matrix()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.matrix.add(report.nodeid, report.passed)

    def pytest_sessionfinish(self, session):
        write_table(self.matrix)
