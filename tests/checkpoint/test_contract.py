"""The classes of options, and a contract that shows everything before anything is refused."""

import pytest

from cpt_mega.checkpoint.contract import ASKED, CLASSES, EFFECT, FATAL, HARMLESS, Contract, class_of
from cpt_mega.config.load import describe_options
from cpt_mega.errors import InputError


def test_every_option_has_a_class_and_every_class_an_option():
    names = [name.partition("[]")[0] for name, *_ in describe_options()]
    assert {class_of(name) for name in names} == {FATAL, ASKED, EFFECT, HARMLESS}
    for entry in CLASSES:
        known = entry.startswith("core.") or any(f"{name}.".startswith(f"{entry}.") for name in names)
        assert known, f"{entry} is no option"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.tokens", ASKED),
        ("train.seed", ASKED),
        ("train.global_batch_size", ASKED),
        ("train.micro_batch_size", HARMLESS),
        ("train.distributed_optimizer", FATAL),
        ("optimizer.beta2", ASKED),
        ("schedule.decay_tokens", ASKED),
        ("data.sources", ASKED),
        ("data.curriculum", ASKED),
        ("data.row_checks.max_run", EFFECT),
        ("data.exclude.web", EFFECT),
        ("eval.sets", ASKED),
        ("eval.interval_tokens", EFFECT),
        ("gates.max_overlap", EFFECT),
        ("parallel.tp", HARMLESS),
        ("core.overlap_grad_reduce", HARMLESS),
        ("core.decoupled_lr", ASKED),
    ],
)
def test_classes(name, expected):
    assert class_of(name) == expected


def test_all_refusals_are_collected_and_the_first_is_raised_with_their_number():
    contract = Contract(accept=("schedule",))
    before = {
        "optimizer": {"lr": 1e-5},
        "schedule": {"kind": "wsd"},
        "train": {"seed": 1, "distributed_optimizer": True},
    }
    now = {
        "optimizer": {"lr": 2e-5},
        "schedule": {"kind": "cosine"},
        "train": {"seed": 2, "distributed_optimizer": False},
    }
    contract.differences(before, now, {})
    assert {row.item: row.what for row in contract.rows} == {
        "optimizer.lr": "refused",
        "schedule.kind": "accepted",
        "train.seed": "refused",
        "train.distributed_optimizer": "refused",
    }
    with pytest.raises(InputError) as refusal:
        contract.check()
    assert refusal.value.field == "optimizer.lr" and refusal.value.value == 2e-5
    assert (
        "--accept optimizer.lr" in refusal.value.fix and "(2 more in the table above; what can be" in refusal.value.fix
    )
    assert refusal.value.fix.endswith("--accept optimizer.lr --accept train.seed)")


def test_what_cannot_change_is_not_accepted():
    contract = Contract(accept=("train",))
    contract.differences({"train": {"distributed_optimizer": True}}, {"train": {"distributed_optimizer": False}}, {})
    with pytest.raises(InputError, match="can only go on so"):
        contract.check()


def test_a_contract_without_refusals_says_nothing():
    contract = Contract(accept=())
    contract.differences({"logging": {"interval_steps": 1}}, {"logging": {"interval_steps": 2}}, {})
    contract.check()
    assert contract.rows == [("logging.interval_steps", "harmless", "1 is now 2")]
