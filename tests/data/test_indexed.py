import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from cpt_mega.data.indexed import DTYPES, HEADER, IndexedCorpus, mask_path, token_dtype
from cpt_mega.data.indexed_writer import IndexedCorpusWriter
from cpt_mega.errors import FaultError, InputError
from tests.helpers.corpora import write_corpus

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_round_trip(tmp_path, dtype):
    corpus = write_corpus(tmp_path / "c", DOCUMENTS, dtype)
    assert (corpus.documents, corpus.tokens, corpus.dtype) == (3, 9, np.dtype(dtype))
    assert corpus.document_lengths.tolist() == [3, 1, 5]
    for number, document in enumerate(DOCUMENTS):
        read = corpus.read(number, 0, len(document))
        assert read.tolist() == document and read.dtype == np.int64
    assert corpus.read(2, 1, 2).tolist() == [6, 7]


def test_add_many_is_add_repeated(tmp_path):
    one = write_corpus(tmp_path / "one", DOCUMENTS)
    with IndexedCorpusWriter(tmp_path / "many", np.int32) as writer:
        writer.add_many(np.concatenate(DOCUMENTS), np.array([3, 1, 5]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"many{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    assert one.documents == writer.documents


def test_token_dtype_changes_where_core_changes():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


@pytest.mark.parametrize(("start", "length"), [(0, 4), (-1, 1), (3, 1), (0, -1)])
def test_reading_outside_a_document_is_refused(tmp_path, start, length):
    corpus = write_corpus(tmp_path / "c", DOCUMENTS)
    with pytest.raises(InputError, match="document 0 holds 3 tokens"):
        corpus.read(0, start, length)


def test_reading_an_absent_document_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "c", DOCUMENTS)
    with pytest.raises(InputError, match="holds 3 documents"):
        corpus.read(3, 0, 1)


def test_an_empty_corpus_and_empty_documents_can_be_opened(tmp_path):
    assert write_corpus(tmp_path / "none", []).documents == 0
    corpus = write_corpus(tmp_path / "gaps", [[], [1, 2], []])
    assert corpus.document_lengths.tolist() == [0, 2, 0]
    assert corpus.read(2, 0, 0).size == 0


def test_nothing_is_left_after_an_error(tmp_path):
    write_corpus(tmp_path / "c", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedCorpusWriter(tmp_path / "c", np.int32) as writer:
        writer.add([1])
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("token", [-1, 70000])
def test_a_token_that_does_not_fit_is_refused(tmp_path, token):
    with pytest.raises(InputError, match="does not fit uint16"):
        write_corpus(tmp_path / "c", [[1, token]], np.uint16)
    assert not list(tmp_path.iterdir())


def test_a_float_corpus_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="dtype"):
        IndexedCorpusWriter(tmp_path / "c", np.float32)


def test_lengths_must_fit_the_tokens(tmp_path):
    with pytest.raises(InputError, match="sum"), IndexedCorpusWriter(tmp_path / "c", np.int32) as writer:
        writer.add_many(np.arange(3), np.array([1, 1]))


def index_bytes(lengths=(3, 1, 5), offsets=(0, 12, 16), documents=(0, 1, 2, 3), **header):
    """An index over the .bin of DOCUMENTS (int32), with what a test wants to be wrong."""
    values = {"magic": b"MMIDIDX\0\0", "version": 1, "code": 4, "sequences": len(lengths), "indices": len(documents)}
    packed = HEADER.pack(*(values | header).values())
    return packed + struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(documents)}q", *lengths, *offsets, *documents)


LIES = {
    "magic": (index_bytes(magic=b"NOTANIDX\0"), "not a Megatron .idx"),
    "empty file": (b"", "not a Megatron .idx"),
    "short header": (index_bytes()[:20], "cut short"),
    "version": (index_bytes(version=2), "version"),
    "float tokens": (index_bytes(code=7), "integer codes"),
    "unknown dtype": (index_bytes(code=99), "integer codes"),
    "wrong dtype": (index_bytes(code=8), "sequence 1 does not begin"),
    "too many sequences": (index_bytes(sequences=4), "asks for"),
    "absurd count": (index_bytes(sequences=2**60), "asks for"),
    "cut": (index_bytes()[:-8], "asks for"),
    "longer": (index_bytes() + b"\0", "asks for"),
    "modes": (index_bytes() + b"\0\0\0", "multimodal"),
    "negative length": (index_bytes(lengths=(3, -1, 7)), "sequence 1 has a negative length"),
    "offset": (index_bytes(offsets=(0, 8, 16)), "sequence 1 does not begin"),
    "first offset": (index_bytes(offsets=(4, 16, 20)), "sequence 0 does not begin"),
    "past the end": (index_bytes(lengths=(3, 1, 6)), "describes 40 bytes"),
    "before the end": (index_bytes(lengths=(3, 1, 4)), "describes 32 bytes"),
    "documents backward": (index_bytes(documents=(0, 2, 1, 3)), "document 1 ends before"),
    "documents not from 0": (index_bytes(documents=(1, 2, 3)), "must run from 0"),
    "documents beyond": (index_bytes(documents=(0, 1, 4)), "must run from 0"),
    "documents not closed": (index_bytes(documents=(0,)), "must run from 0"),
    "no document index": (index_bytes(documents=()), "must run from 0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_index_is_refused(tmp_path, lie):
    write_corpus(tmp_path / "c", DOCUMENTS)
    content, message = LIES[lie]
    (tmp_path / "c.idx").write_bytes(content)
    with pytest.raises(InputError, match=message):
        IndexedCorpus(tmp_path / "c")


def test_the_honest_index_is_accepted(tmp_path):
    write_corpus(tmp_path / "c", DOCUMENTS)
    assert (tmp_path / "c.idx").read_bytes() == index_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, suffix):
    write_corpus(tmp_path / "c", DOCUMENTS)
    (tmp_path / f"c{suffix}").unlink()
    with pytest.raises(InputError, match=f"c{suffix}.*no such file"):
        IndexedCorpus(tmp_path / "c")


@pytest.mark.parametrize("size", [0, 1, 35, 37])
def test_a_bin_that_was_cut_or_grew_is_refused(tmp_path, size):
    write_corpus(tmp_path / "c", DOCUMENTS)
    os.truncate(tmp_path / "c.bin", size)
    with pytest.raises(InputError, match=rf"c\.bin = '{size} bytes': the index describes 36 bytes"):
        IndexedCorpus(tmp_path / "c")


READ_WHAT_WAS_CUT = """
import os, sys
import numpy as np
from cpt_mega.data.indexed import IndexedCorpus, mask_path
from cpt_mega.data.indexed_writer import IndexedCorpusWriter
from cpt_mega.errors import FaultError
prefix = sys.argv[1]
with IndexedCorpusWriter(prefix, np.int32) as writer:
    writer.add(np.arange(100_000))
mask_path(prefix).write_bytes(bytes(100_000))
corpus = IndexedCorpus(prefix)
os.truncate(prefix + ".bin", 4096)
os.truncate(mask_path(prefix), 4096)
for read in (corpus.read, corpus.read_mask, lambda *place: list(corpus.blocks()), lambda *place: corpus.digest_part(0, 1)):
    try:
        read(0, 90_000, 10)
    except FaultError as error:
        print(error)
"""


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path):
    """In a process of its own: what looked there through a mapping was ended by SIGBUS."""
    words = [sys.executable, "-c", READ_WHAT_WAS_CUT, str(tmp_path / "c")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("was cut while it was read" in line for line in lines)
    assert [".mask.bin" in line for line in lines] == [False, True, False, False]


def _replace(path):
    path.with_name("beside").write_bytes(path.read_bytes())
    os.replace(path.with_name("beside"), path)


CHANGES = {
    "replaced": _replace,
    "written to": lambda path: os.utime(path, ns=(0, 1)),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask.bin"])
def test_a_file_that_is_another_than_was_opened_is_noticed(tmp_path, suffix, how):
    write_corpus(tmp_path / "c", DOCUMENTS)
    mask_path(tmp_path / "c").write_bytes(bytes(9))
    corpus = IndexedCorpus(tmp_path / "c")
    corpus.check_unchanged()
    CHANGES[how](tmp_path / f"c{suffix}")
    with pytest.raises(FaultError, match=rf"c\{suffix} is (gone|not the file)"):
        corpus.check_unchanged()


@pytest.fixture
def core_indexed_dataset():
    pytest.importorskip("torch")  # before megatron: it needs torch's libraries loaded
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_is_written_here(tmp_path, core_indexed_dataset, dtype):
    write_corpus(tmp_path / "c", DOCUMENTS, dtype)
    dataset = core_indexed_dataset.IndexedDataset(str(tmp_path / "c"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset[0].dtype == dtype


def test_what_megatron_writes_is_read_here(tmp_path, core_indexed_dataset):
    import torch

    builder = core_indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    builder.add_item(torch.tensor([1, 2, 3]))
    builder.add_item(torch.tensor([4]))
    builder.end_document()  # one document of two sequences
    builder.add_item(torch.tensor([5, 6]))
    builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = IndexedCorpus(tmp_path / "c")
    assert corpus.document_lengths.tolist() == [4, 2]
    assert corpus.read(0, 0, 4).tolist() == [1, 2, 3, 4]
    assert corpus.read(1, 0, 2).tolist() == [5, 6]
