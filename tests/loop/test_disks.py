"""Run folders and corpora on disks that are full or cannot be written."""

import pytest

from tests.helpers.corpora import counting_corpus, write_bpe_tokenizer, write_jsonl
from tests.helpers.mounts import FULL, READ_ONLY, run_on

CLAIM = """
import sys
from cpt_mega.loop.run_folder import RunFolder
print(RunFolder(sys.argv[1], writes=True).claim())
"""


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path):
    done = run_on(READ_ONLY, tmp_path, CLAIM)
    assert done.stdout.strip() == "cannot be written (Read-only file system); name another", done.stderr


WRITE = """
import sys
from cpt_mega.errors import FaultError
from cpt_mega.loop.run_folder import RunFolder
folder = RunFolder(sys.argv[1], writes=True)
assert folder.claim() is None
folder.open("", [], [], None)
write = {"metrics": folder.metric, "ledger": folder.decide}[sys.argv[2]]
try:
    for step in range(10_000):
        write({"step": step, "kind": "train"})
except FaultError as error:
    print(error)
try:
    folder.status("fault", "x" * 10_000, 1, 1, "id", "command")
except FaultError as error:
    print(error)
folder.close()
import os
print(sorted(name for name in os.listdir(sys.argv[1]) if name.startswith((".status", ".ranks"))))
"""


@pytest.mark.parametrize("what", ["metrics", "ledger"])
def test_a_full_disk_is_a_fault_that_names_the_file(tmp_path, what):
    done = run_on(FULL, tmp_path, WRITE, what)
    first, second, left = done.stdout.splitlines()
    assert f"{what}.jsonl cannot be written (No space left on device)" in first and "is intact" in first, done.stderr
    assert "status.json cannot be written (No space left on device)" in second
    assert left == "[]"  # nothing half written takes room


READ = """
import sys
from cpt_mega.data import plan_store
from cpt_mega.data.indexed import IndexedCorpus
plan_store.KEPT_FROM_DOCUMENTS = 1
corpus = IndexedCorpus(sys.argv[1] + "/c")
print(plan_store.open_plan(corpus, 8, "best_fit").rows, corpus.tokens)
"""


def test_a_corpus_that_cannot_be_written_is_read(tmp_path):
    """Its plan would be kept beside it; there every process packs for itself."""
    counting_corpus(tmp_path / "c", [8] * 50)
    done = run_on(READ_ONLY, tmp_path, READ)
    assert done.stdout.split() == ["50", "400"], done.stderr


PREPROCESS = """
import runpy, sys
sys.argv = ["preprocess_data.py", "--input", sys.argv[2], "--tokenizer", sys.argv[3], "--output", sys.argv[1] + "/c"]
runpy.run_path("tools/preprocess_data.py", run_name="__main__")
"""


@pytest.mark.parametrize(("mount", "said"), [(FULL, "No space left on device"), (READ_ONLY, "Read-only file system")])
def test_a_corpus_for_which_there_is_no_room_is_an_error_in_one_line(tmp_path, mount, said):
    (tmp_path / "out").mkdir()
    texts = write_jsonl(tmp_path / "in.jsonl", ["some text " * 50] * 2000)
    tokenizer = write_bpe_tokenizer(tmp_path / "tokenizer")
    done = run_on(mount, tmp_path / "out", PREPROCESS, str(texts), str(tokenizer))
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
