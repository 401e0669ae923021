import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.inspection import find_problems
from cpt_mega.data.manifest import load_manifest
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.lineage import file_digest
from tests.helpers.corpora import TEXTS, write_bpe_tokenizer, write_jsonl

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def command(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def run(folder, *arguments):
    """Runs the tool from a folder that is not the repository."""
    return subprocess.run(command(*arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def files_of(folder, prefix="c"):
    """The corpus; ``PREFIX.parts`` is none of it."""
    found = (path for path in folder.iterdir() if path.name.lstrip(".").startswith(prefix + "."))
    return {path.name: path.read_bytes() for path in found if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "in.jsonl", TEXTS)


def test_text_comes_back_with_one_eos(tmp_path, tokenizer_folder, source):
    done = run(tmp_path, "--input", source, "--tokenizer", tokenizer_folder, "--output", "c", "--workers", 1)
    assert done.returncode == 0, done.stderr
    corpus, tokenizer = IndexedCorpus(tmp_path / "c"), TextTokenizer.load(tokenizer_folder)
    documents = [corpus.read(i, 0, length).tolist() for i, length in enumerate(corpus.document_lengths)]
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == TEXTS
    assert all(ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id for ids in documents)
    assert "documents in = documents out + rejects: 5 = 5 + 0\n" in done.stdout
    assert f"- {{name: c, path: {tmp_path / 'c'}, role: domain}}" in done.stdout
    assert set(files_of(tmp_path)) == {"c.bin", "c.idx", "c.manifest.json"}


def test_the_manifest_accounts_for_everything(tmp_path, tokenizer_folder, source):
    run(tmp_path, "--input", source, source, "--tokenizer", tokenizer_folder, "--output", "c", "--workers", 1)
    manifest, corpus = load_manifest(tmp_path / "c"), IndexedCorpus(tmp_path / "c")
    manifest.check_against(corpus)
    assert manifest.documents == 10 and manifest.rejects == 0 and manifest.dtype == "uint16"
    assert manifest.token_bytes == 2 * sum(len(text.encode()) for text in TEXTS)
    assert find_problems(corpus) == []
    measured = {"path": str(source), "field": "text", "bytes": source.stat().st_size, "sha256": file_digest(source)}
    assert manifest.sources == [measured] * 2
    assert (manifest.bos_id, manifest.eos_id) == (None, 1)


def test_workers_do_not_change_the_result(tmp_path, tokenizer_folder):
    lines = [f"{text} {number}" for number in range(9000) for text in TEXTS]  # several units
    lines[7], lines[40000] = b"{broken", ""
    source = write_jsonl(tmp_path / "in.jsonl", lines)
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        arguments = ("--input", source, "--tokenizer", tokenizer_folder, "--output", "c", "--workers", workers)
        done = run(tmp_path / str(workers), *arguments)
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    rejects = [json.loads(line) for line in (tmp_path / "1" / "c.rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"].split(":")[0]) for reject in rejects] == [
        (8, "not JSON"),
        (40001, "empty"),
    ]
    assert len(load_manifest(tmp_path / "1" / "c").parts) > 3
    assert "45,000 = 44,998 + 2" in done.stdout
    assert f"rejected {source}:8: not JSON" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x"}', "no field 'text'"),
        (b"{}", "no field 'text'"),
        (b'{"text": 1}', "field 'text' is not text"),
        (b'{"text": ""}', "empty"),
    ],
)
def test_rejects_are_told_apart(tmp_path, tokenizer_folder, line, reason):
    """Through the library: one process less per case."""
    from cpt_mega.data.preprocess import PreprocessOptions, preprocess

    source = write_jsonl(tmp_path / "in.jsonl", ["good", line, b"", b"  ", "good"])
    options = PreprocessOptions((str(source),), str(tokenizer_folder), str(tmp_path / "c"), max_reject_share=0.5)
    report = preprocess(options)
    assert (report.manifest.documents_in, report.manifest.documents) == (3, 2)
    assert report.rejects_by_reason == {reason: 1}
    assert (report.first_rejects[0].path, report.first_rejects[0].line) == (str(source), 2)


def test_nul_bytes_and_literal_special_tokens_are_kept(tmp_path, tokenizer_folder):
    from cpt_mega.data.preprocess import PreprocessOptions, preprocess

    source = write_jsonl(tmp_path / "in.jsonl", ["a\0b", "one<|eos|>two", "<|eos|>"])
    preprocess(PreprocessOptions((str(source),), str(tokenizer_folder), str(tmp_path / "c")))
    corpus, tokenizer = IndexedCorpus(tmp_path / "c"), TextTokenizer.load(tokenizer_folder)
    documents = [corpus.read(i, 0, length).tolist() for i, length in enumerate(corpus.document_lengths)]
    assert [tokenizer.decode(ids) for ids in documents] == ["a\0b<|eos|>", "one<|eos|>two<|eos|>", "<|eos|><|eos|>"]
    assert [ids.count(tokenizer.eos_id) for ids in documents] == [1, 1, 1]  # the literal ones are spelt out


def test_too_many_rejects_make_no_corpus_until_they_are_allowed(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", ["good", b"bad", ""])
    arguments = ("--input", source, "--tokenizer", tokenizer_folder, "--output", "c", "--workers", 2)
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "--max-reject-share = 0.001: 1 of 3 documents" in done.stderr and f"{source}:2: not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(files_of(tmp_path)) == set()
    assert len((tmp_path / "c.parts" / "all.rejects").read_text().splitlines()) == 2
    done = run(tmp_path, *arguments, "--max-reject-share", 0.4)
    assert done.returncode == 0 and "going on: 100% was encoded before" in done.stderr
    assert set(files_of(tmp_path)) == {"c.bin", "c.idx", "c.manifest.json", "c.rejects.jsonl"}
    assert not (tmp_path / "c.parts").exists()


def test_empty_documents_are_counted_but_no_fault(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", ["good", "", ""])
    done = run(tmp_path, "--input", source, "--tokenizer", tokenizer_folder, "--output", "c")
    assert done.returncode == 0 and "3 = 1 + 2\n" in done.stdout
    assert (load_manifest(tmp_path / "c").rejects, load_manifest(tmp_path / "c").harmless_rejects) == (2, 2)


def test_a_failure_leaves_the_corpus_that_was_there(tmp_path, tokenizer_folder, source):
    arguments = ("--tokenizer", tokenizer_folder, "--output", "c", "--workers", 1, "--input")
    run(tmp_path, *arguments, source)
    before = files_of(tmp_path)
    refused = run(tmp_path, *arguments, source)
    assert (
        refused.returncode == 2 and "--output = 'c': a corpus stands there; --overwrite replaces it" in refused.stderr
    )
    bad = write_jsonl(tmp_path / "bad.jsonl", [b"bad"])
    assert run(tmp_path, *arguments, bad, "--overwrite").returncode == 2
    assert files_of(tmp_path) == before
    other = write_jsonl(tmp_path / "other.jsonl", ["other"])
    assert run(tmp_path, *arguments, other, "--overwrite").returncode == 0
    assert load_manifest(tmp_path / "c").documents == 1


def test_an_old_reject_file_goes_when_nothing_is_rejected(tmp_path, tokenizer_folder, source):
    (tmp_path / "c.rejects.jsonl").write_text("{}\n")
    run(tmp_path, "--input", source, "--tokenizer", tokenizer_folder, "--output", "c", "--workers", 1)
    assert "c.rejects.jsonl" not in files_of(tmp_path)


@pytest.mark.parametrize("policy", ["auto", "always", "never"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_policies(tmp_path, policy, adds_bos):
    from cpt_mega.data.preprocess import PreprocessOptions, preprocess

    folder = write_bpe_tokenizer(tmp_path / "t", adds_bos=adds_bos)
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    manifest = preprocess(PreprocessOptions((str(source),), str(folder), str(tmp_path / "c"), bos=policy)).manifest
    expected = {"auto": adds_bos, "always": True, "never": False}[policy]
    corpus = IndexedCorpus(tmp_path / "c")
    assert manifest.bos_id == (0 if expected else None)
    assert all((corpus.read(number, 0, 1)[0] == 0) == expected for number in range(corpus.documents))


def test_reuse_keeps_only_what_the_same_recipe_made(tmp_path, tokenizer_folder, source):
    from cpt_mega.data.preprocess import PreprocessOptions, preprocess

    def reused(**changes):
        values = {"inputs": (str(source),), "tokenizer": str(tokenizer_folder), "output": str(tmp_path / "c")}
        return preprocess(PreprocessOptions(**values | {"reuse": True} | changes)).reused

    assert [reused(), reused(), reused(reuse=False, overwrite=True), reused()] == [False, True, False, True]
    assert [reused(bos="always"), reused(bos="always")] == [False, True]
    content = bytearray((tmp_path / "c.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "c.bin").write_bytes(content)
    assert [reused(bos="always"), reused(bos="always")] == [False, True]
    write_jsonl(source, ["changed"])
    assert [reused(bos="always"), reused(bos="always")] == [False, True]
    (tmp_path / "c.manifest.json").write_text("{")
    assert [reused(bos="always"), reused(bos="always")] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "absent.jsonl"}, "--input = 'absent.jsonl': no such file or folder"),
        ({"--input": "in.xml"}, "end in one of .jsonl"),
        ({"--tokenizer": "absent"}, "tokenizer = 'absent'"),
        ({"--workers": "0"}, "--workers = 0"),
        ({"--max-reject-share": "2"}, "--max-reject-share = 2.0"),
        ({"--output": "in.jsonl/c"}, "in.jsonl"),
        ({"--output": "c.bin"}, "--output = 'c.bin'"),
        ({"--bos": "sometimes"}, "--bos"),
        ({"--shard": "3/3"}, "--shard = '3/3'"),
        ({"--shard": "one"}, "--shard"),
        ({"--loss-mask": "assistant"}, "--loss-mask = 'assistant'"),
    ],
)
def test_bad_arguments_exit_2_with_a_line(tmp_path, tokenizer_folder, source, change, message):
    (tmp_path / "in.xml").touch()
    values = {"--input": "in.jsonl", "--tokenizer": tokenizer_folder, "--output": "c", "--workers": 1} | change
    done = run(tmp_path, *[word for pair in values.items() for word in pair])
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not files_of(tmp_path)


def test_bos_always_needs_a_bos(tmp_path, source):
    from cpt_mega.data.preprocess import PreprocessOptions, preprocess
    from cpt_mega.errors import InputError

    folder = write_bpe_tokenizer(tmp_path / "t", bos=False)
    with pytest.raises(InputError, match="--bos = 'always'"):
        preprocess(PreprocessOptions((str(source),), str(folder), str(tmp_path / "c"), bos="always"))


@pytest.fixture(scope="module")
def long_work(tmp_path_factory, tokenizer_folder):
    """Arguments that take a few seconds, and the files that they make."""
    folder = tmp_path_factory.mktemp("whole")
    texts = [f"{line} " + " ".join(map(str, range(4000))) for line in range(400)]
    texts[300] = b"{broken"
    source = write_jsonl(folder / "in.jsonl", texts)
    arguments = ("--input", source, "--tokenizer", tokenizer_folder, "--output", "c", "--encoder", "reference")
    assert run(folder, *arguments, "--max-reject-share", 0.01).returncode == 0
    return (*arguments, "--max-reject-share", 0.01), files_of(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_stopped_it_goes_on_and_ends_with_the_same_bytes(tmp_path, long_work, number):
    arguments, whole = long_work
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # where the suite itself runs in the background, Ctrl-C is ignored
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command(*arguments, "--workers", 2), **options)
    while len(list((tmp_path / "c.parts").glob("*.json"))) < 4:  # the recipe, and three parts
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in errors
    assert number == signal.SIGKILL or "the same command goes on from here" in errors
    assert not files_of(tmp_path)
    again = run(tmp_path, *arguments, "--workers", 1)
    assert again.returncode == 0 and "was encoded before" in again.stderr
    assert files_of(tmp_path) == whole
    assert not (tmp_path / "c.parts").exists()


def test_shards_make_the_corpus_that_one_machine_makes(tmp_path, tokenizer_folder):
    lines = [f"{text} {number}" for number in range(6000) for text in TEXTS]
    lines[3], lines[20000] = b"{broken", b"[1]"
    source = write_jsonl(tmp_path / "in.jsonl", lines)
    arguments = ("--input", source, source, "--tokenizer", tokenizer_folder, "--workers", 1)
    assert run(tmp_path, *arguments, "--output", "whole").returncode == 0
    for index in range(3):
        done = run(tmp_path, *arguments, "--output", "c", "--shard", f"{index}/3")
        assert done.returncode == 0 and "next: python tools/merge_shards.py c\n" in done.stdout
    words = [sys.executable, str(TOOL.parent / "merge_shards.py"), "c"]
    merged = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert merged.returncode == 0 and f"path: {tmp_path / 'c'}, role: domain" in merged.stdout
    assert (tmp_path / "c.manifest.json").read_bytes() == (tmp_path / "whole.manifest.json").read_bytes()
    corpus, whole = IndexedCorpus(tmp_path / "c"), IndexedCorpus(tmp_path / "whole")
    assert corpus.document_lengths.tolist() == whole.document_lengths.tolist()
    assert b"".join(block.tobytes() for block in corpus.blocks()) == (tmp_path / "whole.bin").read_bytes()
    for document in (0, 1, 29997, 29998, 59995):
        assert corpus.read(document, 0, 2).tolist() == whole.read(document, 0, 2).tolist()
    assert find_problems(corpus) == []
    texts = [path.read_text() for path in sorted(tmp_path.glob("c.shard*.rejects.jsonl"))]
    rejects = [json.loads(line)["line"] for line in "".join(texts).splitlines()]
    assert rejects == [4, 20001, 4, 20001]  # as the file counts them, also where a shard begins within it


def test_a_folder_of_code_keeps_its_paths(tmp_path, tokenizer_folder):
    for name, content in (("b.py", "b = 1"), ("sub/a.py", "a = 1"), ("empty.py", ""), ("picture.png", "\0")):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(content)
    done = run(tmp_path, "--input", "code", "--include", "*.py", "--tokenizer", tokenizer_folder, "--output", "c")
    assert done.returncode == 0, done.stderr
    paths = [json.loads(line)["path"] for line in (tmp_path / "c.documents.jsonl").read_text().splitlines()]
    assert paths == [str(tmp_path / "code" / "b.py"), str(tmp_path / "code" / "sub" / "a.py")]
    assert find_problems(IndexedCorpus(tmp_path / "c")) == []
    (tmp_path / "code" / "b.py").write_text("b = 2")
    assert find_problems(IndexedCorpus(tmp_path / "c")) == [f"source {tmp_path / 'code'} has changed since"]


def test_a_document_that_goes_on_through_several_units(tmp_path, tokenizer_folder):
    texts = ["before", "giant " * 600_000, "after"]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    done = run(tmp_path, "--input", source, "--tokenizer", tokenizer_folder, "--output", "c", "--workers", 2)
    assert done.returncode == 0, done.stderr
    corpus, tokenizer = IndexedCorpus(tmp_path / "c"), TextTokenizer.load(tokenizer_folder)
    documents = [corpus.read(i, 0, int(length)).tolist() for i, length in enumerate(corpus.document_lengths)]
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts
    assert [part["documents"] for part in load_manifest(tmp_path / "c").parts] == [2, 0, 0, 1]


@pytest.mark.parametrize(
    ("lines", "options", "advice"),
    [
        ([b'{"body": "x", "id": 1}'], [], "no field 'text': its keys are body, id"),
        ([b'{"body": "x", "id": 1}'], [], "Name the field by --field; is it chats (--chat)?"),
        ([b"{broken"], [], "or raise the limit and run again"),
    ],
)
def test_what_to_change_is_said(tmp_path, tokenizer_folder, lines, options, advice):
    source = write_jsonl(tmp_path / "in.jsonl", lines * 5)
    done = run(tmp_path, "--input", source, "--tokenizer", tokenizer_folder, "--output", "c", *options)
    assert done.returncode == 2 and advice in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.count(f"{source}:") == 3  # not all five


def test_a_folder_with_another_encoding_says_how_to_choose(tmp_path, tokenizer_folder):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_bytes(b"\xe9")
    arguments = ("--input", "code", "--tokenizer", tokenizer_folder, "--output", "c")
    assert "--include '*.py'" in run(tmp_path, *arguments).stderr
    done = run(tmp_path, "--input", write_jsonl(tmp_path / "in.jsonl", ["x"]), *arguments[2:], "--include", "*.py")
    assert done.returncode == 2 and "no input is one" in done.stderr


def test_a_corpus_does_not_lie_in_its_own_input(tmp_path, tokenizer_folder):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a = 1")
    done = run(tmp_path, "--input", "code", "--tokenizer", tokenizer_folder, "--output", "code/c")
    assert done.returncode == 2 and "would be read the next time" in done.stderr


def test_an_input_that_changes_meanwhile_is_refused(tmp_path, tokenizer_folder, source):
    from cpt_mega.data.preprocess import NoProgress, PreprocessOptions, preprocess
    from cpt_mega.errors import InputError

    class Meanwhile(NoProgress):
        def advance(self, done_bytes, tokens):
            os.utime(source, (1, 1))

    options = PreprocessOptions((str(source),), str(tokenizer_folder), str(tmp_path / "c"))
    with pytest.raises(InputError, match="changed while it was read"):
        preprocess(options, Meanwhile())
    assert not files_of(tmp_path)


def test_two_processes_do_not_make_one_corpus(tmp_path, tokenizer_folder, source):
    import fcntl

    (tmp_path / "c.parts").mkdir()
    with open(tmp_path / "c.parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(tmp_path, "--input", source, "--tokenizer", tokenizer_folder, "--output", "c")
    assert done.returncode == 2 and "another process is making this corpus" in done.stderr
