import shutil

import numpy as np
import pytest

from cpt_mega.data.encode import EncodedBatch
from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.manifest import CorpusManifest
from cpt_mega.data.parts import Joiner, PartFolder
from cpt_mega.data.readers import Document
from cpt_mega.data.rejects import Reject
from cpt_mega.errors import InputError

PARTS = 4


def opened(tmp_path, recipe="recipe", with_mask=True):
    return PartFolder(str(tmp_path / "c"), recipe, np.dtype(np.uint16), with_mask, True)


def write(folder, part, finish=True):
    """Part n holds n documents, of 1 to n tokens that are n."""
    lengths = np.arange(1, part + 1)
    tokens = np.full(lengths.sum(), part, np.uint16)
    kept = [Document(f"file{part}", 1, "x")] * part
    rejects = [Reject("in", 1, f"bad: {part}", "")] * (part % 2)
    batch = EncodedBatch(tokens, lengths, (tokens % 2).astype(np.uint8), kept, 5, rejects, 7, 9)
    with folder.write(part) as writer:
        writer.add(batch)
        if finish:
            writer.finish("0" * 64)


def finish(folder):
    """What a process does that finds the folder as it is: makes what is missing, and the corpus."""
    with Joiner(folder, PARTS) as joiner:
        made = joiner.to_do()
        for part in made:
            write(folder, part)
        joiner.join_ready()
        counts = joiner.collect_rejects([0, 100, 200, 300])
        assert [reject.line for reject in counts.first] == [101, 301]
        tokens, documents = (
            sum(getattr(report, name) for report in joiner.reports) for name in ("tokens", "documents")
        )
        manifest = CorpusManifest("t", 9, 1, None, "uint16", documents, tokens, "c", [], [], "0", loss_mask="assistant")
        joiner.install(manifest)
    return made


def check(tmp_path):
    corpus = IndexedCorpus(tmp_path / "c")
    expected = [np.full(length, part) for part in range(PARTS) for length in range(1, part + 1)]
    assert corpus.documents == len(expected)
    for document, tokens in enumerate(expected):
        assert corpus.read(document, 0, len(tokens)).tolist() == tokens.tolist()
        assert corpus.read_mask(document, 0, len(tokens)).tolist() == (tokens % 2).tolist()
    assert len((tmp_path / "c.documents.jsonl").read_text().splitlines()) == len(expected)
    assert len((tmp_path / "c.rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "c.parts").exists()


def join_two(folder):
    for part in (0, 1, 3):
        write(folder, part)
    with Joiner(folder, PARTS) as joiner:
        joiner.join_ready()
        assert len(joiner.reports) == 2 and joiner.to_do() == [2]


def crash_while_appending(folder):
    """Half of a part's tokens are appended."""
    join_two(folder)
    write(folder, 2)
    with open(folder.joined_file("tokens"), "ab") as stream:
        stream.write(b"\1\0\1")


def crash_while_removing(folder):
    """A part is appended, and one of its files is removed."""
    join_two(folder)
    write(folder, 2)
    for kind in ("tokens", "mask"):
        with open(folder.joined_file(kind), "ab") as stream:
            stream.write(folder._file(2, kind).read_bytes())
    folder._file(2, "mask").unlink()


def crash_in_a_part(folder):
    join_two(folder)
    write(folder, 2, finish=False)


def power_cut_in_a_part(folder):
    """Its report reached the disk, its tokens did not."""
    join_two(folder)
    write(folder, 2)
    folder._file(2, "tokens").write_bytes(b"")


def power_cut_in_the_joined(folder):
    join_two(folder)
    folder.joined_file("tokens").write_bytes(b"")


def crash_after_installing_tokens(folder):
    """The tokens have their final name, the index has not."""
    join_two(folder)
    folder.joined_file("tokens").rename(folder.path.parent / "c.bin")


def torn_report(folder):
    join_two(folder)
    folder._file(3, "json").write_text('{"documents": 1')


def power_cut_in_the_rejects(folder):
    """Of a part that is appended and of one that is not."""
    join_two(folder)
    for part in (1, 3):
        folder._file(part, "rejects").write_bytes(b"")


def killed_while_removing(folder):
    join_two(folder)
    folder._empty()


CRASHES = {
    power_cut_in_the_rejects: [1, 2, 3],
    killed_while_removing: [0, 1, 2, 3],
    join_two: [2],
    crash_while_appending: [],
    crash_while_removing: [2],
    crash_in_a_part: [2],
    power_cut_in_a_part: [2],
    power_cut_in_the_joined: [1, 2],  # part 0 is empty
    crash_after_installing_tokens: [1, 2],
    torn_report: [2, 3],
}


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__)
def test_whatever_it_died_of_the_corpus_is_the_same(tmp_path, crash):
    with opened(tmp_path) as folder:
        crash(folder)
    with opened(tmp_path) as folder:
        assert finish(folder) == CRASHES[crash]
    check(tmp_path)


def test_parts_of_another_recipe_are_made_anew(tmp_path):
    with opened(tmp_path) as folder:
        join_two(folder)
    with opened(tmp_path, "other") as folder:
        assert finish(folder) == [0, 1, 2, 3]
    check(tmp_path)


def test_two_cannot_hold_it(tmp_path):
    with opened(tmp_path), pytest.raises(InputError, match="another process is making this corpus"), opened(tmp_path):
        pass


def test_an_old_mask_goes_with_the_old_corpus(tmp_path):
    with opened(tmp_path) as folder:
        finish(folder)
    shutil.copy(tmp_path / "c.mask.bin", tmp_path / "kept")
    with opened(tmp_path, with_mask=False) as folder:
        finish(folder)
    assert not (tmp_path / "c.mask.bin").exists() and not IndexedCorpus(tmp_path / "c").has_mask


def test_a_folder_of_something_else_is_not_emptied(tmp_path):
    (tmp_path / "c.parts").mkdir()
    (tmp_path / "c.parts" / "thesis.tex").touch()
    with pytest.raises(InputError, match="c.parts.*holds what is not of a corpus"), opened(tmp_path):
        pass
    assert (tmp_path / "c.parts" / "thesis.tex").exists()
