"""A call into a library that seeds generators and sets variables, of which nothing remains."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts Python's, numpy's and torch's generators and the environment back as they were, whatever happens meanwhile."""
    environment, python, numbers = dict(os.environ), random.getstate(), np.random.get_state()
    host = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(host)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        _restore(environment)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
