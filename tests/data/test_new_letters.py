import pytest

from cpt_mega.data.new_letters import is_new, texts_with_new_letters


@pytest.mark.parametrize("letter", ["a", "é", "北", "🙂", "𝐀", "\U00020000", "\ud7fb", "\U0010ffff", "\U0001fae9"])
def test_what_every_library_classes_alike_is_not_new(letter):
    assert not is_new(letter)


@pytest.mark.parametrize("letter", ["\u0378", "\U00016ec2", "\U000323b0"])
def test_what_has_no_class_yet_is_new(letter):
    assert is_new(letter)


def test_texts_are_found_by_their_letters():
    texts = ["ascii", "naïve 𝐀 🙂", "x\U00016ec2", "", "北\u0378"]
    assert texts_with_new_letters(texts) == [2, 4]
    assert texts_with_new_letters(texts[:2]) == texts_with_new_letters([]) == []
    # 𝐀 and a new one share the first half of their pairs
    assert texts_with_new_letters(["\U0001d455", "𝐀"]) == [0]
