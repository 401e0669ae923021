"""Texts of the machine: what is held out is not in what is trained on."""

from tools.machine_text import without_runs_of


def test_texts_that_repeat_a_run_of_words_are_left_out():
    held_out = ["one two three four five six", "a b c"]
    texts = ["zero two three\n four five seven", "two three four seven", "a b c", "a b c d", ""]
    assert without_runs_of(texts, held_out, words=4) == texts[1:]
    assert without_runs_of(texts, held_out, words=3) == [""]
