def test_swiglu_has_the_bits_of_autograd(workers):
    assert workers(1).run("swiglu_as_autograd_has_it") == [{"output": True, "gradient": True}]


def test_adam_is_torchs(workers):
    assert workers(1).run("adam_beside_torchs", steps=5)[0] < 1e-6
