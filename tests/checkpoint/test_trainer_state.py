"""What a checkpoint says of its health."""

import pytest

from cpt_mega.checkpoint.trainer_state import TrainerState


@pytest.mark.parametrize(
    ("looks", "health"),
    [
        ([], "not judged"),
        ([(3, "continue")], "not judged"),
        ([(4, "none")], "not judged"),  # looked at, and no gate was armed
        ([(3, "stop"), (4, "continue")], "perplexity only"),
        ([(4, "continue", "general_perplexity_limit", "domain_gain")], "perplexity only"),
        ([(3, "stop"), (4, "continue", "general_perplexity_limit", "general")], "healthy"),
        ([(4, "warn", "general")], "warned"),
        ([(3, "continue"), (4, "stop")], "unhealthy"),
    ],
)
def test_health_is_what_the_gates_said_at_this_step(looks, health):
    history = [
        {"step": step, "tokens": 0, "perplexity": {}, "action": action, "judged_by": rules}
        for step, action, *rules in looks
    ]
    assert TrainerState("run", "base", step=4, gate_history=history).health == health
