import pickle

import pytest

from cpt_mega.errors import CheckpointError, InputError


@pytest.mark.parametrize("kind", [InputError, CheckpointError])
def test_an_input_error_comes_back_whole_from_a_worker(kind):
    back = pickle.loads(pickle.dumps(kind("--input", "x", "no such file")))
    assert type(back) is kind and (back.field, back.value, back.fix) == ("--input", "x", "no such file")
    assert str(back) == "--input = 'x': no such file"
