"""What a foreign library does to generators and the environment is undone."""

import os
import random

import numpy as np
import pytest
import torch

from cpt_mega.gates.undisturbed import undisturbed


@pytest.mark.parametrize("fails", [False, True])
def test_generators_and_environment_are_as_before(fails, monkeypatch):
    monkeypatch.setenv("OWN_CHANGED", "1")
    monkeypatch.setenv("OWN_REMOVED", "1")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    try:
        with undisturbed():
            random.seed(1), np.random.seed(1), torch.manual_seed(1)
            os.environ |= {"OWN_CHANGED": "2", "OWN_ADDED": "2"}
            del os.environ["OWN_REMOVED"]
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert states == (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    )  # fmt: skip
