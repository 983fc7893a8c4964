import errno
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from powertrain import data
from powertrain.data import DataError
from powertrain.data.prepare import TokenizerSpec, prepare
from powertrain.data.sources import Corpus
from powertrain.data.tokens import TokenWriter

TEXT = "the cat sat on a mat while café prices rose 12.5% in 2024 😀 def main(): return None"
END = 0


def write_texts(folder: Path, count: int = 60, seed: int = 0) -> list[str]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        words = rng.choice(TEXT.split(), size=rng.integers(1, 200))
        texts.append("".join(word + str(rng.choice([" ", "  ", "\n", "\n    ", "\t", ", "])) for word in words))
        (folder / f"{number:03}.txt").write_bytes(texts[-1].encode())
    return texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return folder, write_texts(folder)


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    """A tokenizer's folder, trained once for the tests that do not train one."""
    cache = tmp_path_factory.mktemp("tokenizer")
    return prepare({"a": corpus_of(texts[0])}, TokenizerSpec(vocab_size=300), cache).tokenizer_folder


def corpus_of(folder: Path, fraction: float = 0.2) -> Corpus:
    return Corpus("text", str(folder / "*.txt"), validation_fraction=fraction)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(prepared, name: str) -> dict[str, list[str]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    result = {}
    for split, file in (("train", prepared.train[name]), ("validation", prepared.validation.get(name))):
        if file is not None:
            ends = [*file.document_starts[1:], file.num_tokens]
            documents = [file.tokens[a:b].tolist() for a, b in zip(file.document_starts, ends, strict=True)]
            assert all(ids[-1] == END and END not in ids[:-1] for ids in documents)
            result[split] = [tokenizer.decode(ids[:-1]) for ids in documents]
    return result


def test_twice_the_same_bytes_and_lossless(texts, tmp_path):
    folder, written = texts
    first = prepare({"a": corpus_of(folder)}, TokenizerSpec(vocab_size=300), tmp_path / "1")
    again = prepare({"a": corpus_of(folder)}, TokenizerSpec(vocab_size=300), tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and first.folders["a"].name == again.folders["a"].name
    assert sorted(os.listdir(first.folders["a"])) == [
        "corpus.json", "tokenizer", "train.bin", "train.idx", "validation.bin", "validation.idx",
    ]  # fmt: skip
    splits = decoded(first, "a")
    assert sorted(splits["train"] + splits["validation"]) == sorted(written)
    assert [text for text in written if text in splits["train"]] == splits["train"]  # in the files' order
    summary = json.loads((first.folders["a"] / "corpus.json").read_text())
    for split, documents in splits.items():
        facts = summary["splits"][split]
        assert (facts["documents"], facts["bytes"]) == (len(documents), sum(len(d.encode()) for d in documents))
    assert summary["splits"]["train"]["tokens"] == first.train["a"].num_tokens
    first.train["a"].check(300)


def test_the_tokenizer_is_one_that_transformers_loads(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == ("<|endoftext|>", END, 300)
    encoded = loaded("  Hello\n\tworld ☃ ' s .")
    assert set(encoded) == {"input_ids", "attention_mask"}  # what a model's forward takes
    assert loaded.decode(encoded["input_ids"]) == "  Hello\n\tworld ☃ ' s ."


def test_a_second_call_reads_the_cache(texts, tokenizer, tmp_path, monkeypatch):
    specification = TokenizerSpec(str(tokenizer))
    first = prepare({"a": corpus_of(texts[0])}, specification, tmp_path)
    monkeypatch.setattr(data.tokenizer, "documents", None)
    again = prepare({"a": corpus_of(texts[0])}, specification, tmp_path)
    assert again.folders == first.folders


def test_changed_files_or_settings_are_prepared_again(tokenizer, tmp_path):
    write_texts(tmp_path / "texts", 30)
    specification = TokenizerSpec(str(tokenizer))
    folders = [prepare({"a": corpus_of(tmp_path / "texts")}, specification, tmp_path / "cache").folders["a"]]
    (tmp_path / "texts" / "000.txt").write_text("Something else.")
    folders.append(prepare({"a": corpus_of(tmp_path / "texts")}, specification, tmp_path / "cache").folders["a"])
    folders.append(prepare({"a": corpus_of(tmp_path / "texts", 0.3)}, specification, tmp_path / "cache").folders["a"])
    assert len(set(folders)) == 3


def test_the_split_follows_the_text_not_its_place(texts, tokenizer, tmp_path):
    folder, written = texts
    for number, text in enumerate(written * 2):  # every text twice, under other names
        (tmp_path / f"copy{number * 7919 % 1000}.txt").write_bytes(text.encode())
    specification = TokenizerSpec(str(tokenizer))
    once = decoded(prepare({"a": corpus_of(folder)}, specification, tmp_path / "cache"), "a")
    twice = decoded(prepare({"b": corpus_of(tmp_path)}, specification, tmp_path / "cache"), "b")
    for split in ("train", "validation"):
        assert sorted(twice[split]) == sorted(once[split] * 2)
    assert 3 <= len(once["validation"]) <= 24  # of 60, at 0.2


def test_the_tokenizer_never_sees_validation_documents(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    seen = []
    real = data.tokenizer.pieces
    monkeypatch.setattr(data.tokenizer, "pieces", lambda text: seen.append(text) or real(text))
    folder = data.tokenizer.train_tokenizer({"a": corpus_of(tmp_path / "texts")}, {}, 300, tmp_path, lambda *_: None)
    prepared = prepare({"a": corpus_of(tmp_path / "texts")}, TokenizerSpec(str(folder)), tmp_path / "cache")
    assert seen[: len(decoded(prepared, "a")["train"])] == decoded(prepared, "a")["train"]


def test_validation_path(texts, tokenizer, tmp_path):
    held = write_texts(tmp_path / "held", 3, seed=1)
    corpus = Corpus("text", str(texts[0] / "*.txt"), validation_fraction=0.5, validation_path=str(tmp_path / "held/*"))
    splits = decoded(prepare({"a": corpus}, TokenizerSpec(str(tokenizer)), tmp_path / "cache"), "a")
    assert splits == {"train": texts[1], "validation": held}


def test_fault_19_long_documents_give_the_same_tokens_in_pieces(texts, tokenizer, tmp_path, monkeypatch):
    specification = TokenizerSpec(str(tokenizer))
    (tmp_path / "odd").mkdir()
    for name, text in {"spaces": " " * 500 + "x", "none": "x" * 500, "mixed": "ab \n  cd" * 100}.items():
        (tmp_path / "odd" / f"{name}.txt").write_text(text)
    whole = prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "whole")
    monkeypatch.setattr(data.tokenizer, "PIECE", 256)
    monkeypatch.setattr(data.encode, "BATCH", 1000)
    pieces = prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "pieces")
    assert pieces.train["a"].fingerprint() == whole.train["a"].fingerprint()
    odd = prepare({"odd": corpus_of(tmp_path / "odd", 0)}, specification, tmp_path / "pieces")
    assert decoded(odd, "odd")["train"] == ["ab \n  cd" * 100, "x" * 500, " " * 500 + "x"]


def test_the_end_of_text_written_in_a_document_does_not_end_it(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("before<|endoftext|>after")
    prepared = prepare({"a": corpus_of(tmp_path, 0)}, TokenizerSpec(str(tokenizer)), tmp_path / "cache")
    assert decoded(prepared, "a")["train"] == ["before<|endoftext|>after"]
    assert prepared.validation == {}


def test_fault_19_bad_records_are_reported(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": null}\n{"text": ""}\n{broken\n{"text": null}\n')
    prepared = prepare({"a": Corpus("jsonl", str(path))}, TokenizerSpec(str(tokenizer)), tmp_path / "cache")
    assert json.loads((prepared.folders["a"] / "corpus.json").read_text())["skipped"] == {
        "empty": {"count": 1, "first": [f"{path}:3"]},
        "invalid_json": {"count": 1, "first": [f"{path}:4"]},
        "null": {"count": 2, "first": [f"{path}:2", f"{path}:5"]},
    }


def test_token_files_are_used_as_they_are(tmp_path):
    for name in ("train", "held"):
        with TokenWriter(tmp_path / name, np.uint16) as writer:
            writer.add([1, 2, 3])
    corpus = Corpus("tokens", str(tmp_path / "train"), validation_path=str(tmp_path / "held"))
    prepared = prepare({"a": corpus}, TokenizerSpec(), tmp_path / "cache")
    assert prepared.train["a"].tokens.tolist() == prepared.validation["a"].tokens.tolist() == [1, 2, 3]
    assert prepared.folders == {} and prepared.tokenizer_folder is None


def test_bytes_changed_after_preparation(texts, tokenizer, tmp_path):
    specification = TokenizerSpec(str(tokenizer))
    folder = prepare({"a": corpus_of(texts[0])}, specification, tmp_path).folders["a"]
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[100] ^= 1
    (folder / "train.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"train\.bin.*changed.*Delete"):
        prepare({"a": corpus_of(texts[0])}, specification, tmp_path)


def test_fault_18_any_changed_byte_is_noticed_and_files_are_read_once(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.tokens, "BLOCK", 64)  # a large file, of which a sample was looked at once
    monkeypatch.setattr(data.tokens, "SAMPLED_BLOCKS", 4)
    corpora = {"a": corpus_of(texts[0], 0)}
    specification = TokenizerSpec(str(tokenizer))
    first = prepare(corpora, specification, tmp_path)
    path = first.folders["a"] / "train.bin"
    assert first.fingerprints["a"] == first.train["a"].fingerprint() != first.train["a"].sampled_fingerprint()
    (tmp_path / "theirs.bin").write_bytes(path.read_bytes())
    (tmp_path / "theirs.idx").write_bytes(path.with_suffix(".idx").read_bytes())
    corpora["theirs"] = Corpus("tokens", str(tmp_path / "theirs"))

    reads = []
    real = data.tokens.TokenFile._digest
    monkeypatch.setattr(data.tokens.TokenFile, "_digest", lambda *a: reads.append(a[0].prefix) or real(*a))
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 9)  # as if some seconds had passed since
    for expected in (2, 0):
        reads.clear()
        again = prepare(corpora, specification, tmp_path)
        assert again.fingerprints == {"a": first.fingerprints["a"], "theirs": first.fingerprints["a"]}
        assert len(reads) == expected
    for changed in (tmp_path / "theirs.bin", path):
        times = os.stat(changed)
        with open(changed, "r+b") as file:
            file.seek(200)
            byte = file.read(1)
            file.seek(200)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # which nobody is taken in by
        if changed == path:
            with pytest.raises(DataError, match=r"train\.bin.*changed.*Delete"):
                prepare(corpora, specification, tmp_path)
        else:
            now = prepare(corpora, specification, tmp_path)
            assert now.fingerprints["theirs"] != now.fingerprints["a"] == first.fingerprints["a"]
            sampled = {file.sampled_fingerprint() for file in now.train.values()}
            assert len(sampled) == 1  # so this is what the sample did not see


def test_a_corpus_with_the_fingerprint_of_an_earlier_version(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.tokens, "BLOCK", 64)
    monkeypatch.setattr(data.tokens, "SAMPLED_BLOCKS", 4)
    corpora, specification = {"a": corpus_of(texts[0], 0)}, TokenizerSpec(str(tokenizer))
    first = prepare(corpora, specification, tmp_path)
    described = first.folders["a"] / "corpus.json"
    described.write_text(described.read_text().replace(first.fingerprints["a"], first.train["a"].sampled_fingerprint()))
    again = prepare(corpora, specification, tmp_path)
    assert again.folders == first.folders and again.fingerprints == first.fingerprints


def test_a_killed_preparation_is_not_believed(texts, tokenizer, tmp_path):
    code = f"""
import os, pathlib, signal
from powertrain.data.prepare import *
pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # everything is written, nothing renamed
prepare({{"a": Corpus("text", {str(texts[0] / "*.txt")!r}, validation_fraction=0.2)}},
        TokenizerSpec({str(tokenizer)!r}), {str(tmp_path)!r})
"""
    specification = TokenizerSpec(str(tokenizer))
    whole = prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "other")
    assert whole.tokenizer_folder is not None
    os.symlink(whole.tokenizer_folder, tmp_path / whole.tokenizer_folder.name)  # so that the corpus is the one killed
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.glob(".a-*")]
    assert len(left) == 1 and not list(tmp_path.glob("a-*"))
    folder = prepare({"a": corpus_of(texts[0])}, specification, tmp_path).folders["a"]
    assert contents(folder) == contents(whole.folders["a"])
    (folder / "corpus.json").unlink()  # nor is a folder that lost its last file
    (folder / "train.bin").write_bytes(b"")
    assert contents(prepare({"a": corpus_of(texts[0])}, specification, tmp_path).folders["a"]) == contents(folder)


class Killed(BaseException):
    """Ends a preparation as a signal does."""


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few documents, after each of which the state is saved."""
    monkeypatch.setattr(data.sources, "BLOCK", 4000)
    monkeypatch.setattr(data.sources, "ROWS", 4)
    monkeypatch.setattr(data.prepare, "SAVE_SECONDS", 0.0)


def written(folder: Path, texts: list[str], kind: str) -> Corpus:
    """A corpus of `texts` and records that are none, some of the texts twice, in two files of a kind."""
    folder.mkdir()
    values: list = [*texts, None, *texts[10:30], "", *texts[5:8]]
    for number, part in enumerate((values[:50], values[50:])):
        path = folder / f"{number}.{kind}"
        if kind.startswith("jsonl"):
            raw = "".join(json.dumps({"text": value}) + "\n" for value in part).encode()
            path.write_bytes(gzip.compress(raw) if kind == "jsonl.gz" else raw)
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=11)
        else:
            for index, value in enumerate(part):
                (folder / f"{number}-{index:02}.txt").write_text(value or "")
    held = folder / f"held.{kind}.held"
    held.write_text(json.dumps({"text": "held " + texts[0]}) + "\n" + json.dumps({"text": texts[0]}) + "\n")
    return Corpus(kind.partition(".")[0].replace("txt", "text"), str(folder / f"*.{kind}"), validation_fraction=0.2)


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_killed_preparation_resumes(kind, deduplicate, texts, tokenizer, tmp_path, small_blocks, monkeypatch):
    specification = TokenizerSpec(str(tokenizer))
    corpus = replace(written(tmp_path / "files", texts[1], kind), deduplicate=deduplicate)
    if kind == "jsonl":
        corpus = replace(corpus, validation_path=str(tmp_path / "files" / "*.held"))
    whole = contents(prepare({"a": corpus}, specification, tmp_path / "whole").folders["a"])
    encoded = []
    real = data.encode.Encoder.__call__

    def encode(self, part, block, validation):
        encoded.append((block.path, block.first, str(block.content)))
        if len(encoded) in kills:
            raise Killed
        return real(self, part, block, validation)

    monkeypatch.setattr(data.encode.Encoder, "__call__", encode)
    kills: set[int] = set()
    prepare({"a": corpus}, specification, tmp_path / "counted")
    blocks = list(encoded)
    assert len(blocks) > 5 and len(set(blocks)) == len(blocks)

    # Killed at the first block, at each later one when it is met again, and after everything.
    encoded.clear()
    kills = {1, *range(3, 2 * len(blocks), 2)}
    cache = tmp_path / "cache"
    for _ in blocks:
        with pytest.raises(Killed):
            prepare({"a": corpus}, specification, cache)
        for path in cache.glob(".a-*/*.lengths"):  # what was written after the state does not count
            with open(path, "ab") as file:
                file.write(b"more")
        for path in cache.glob(".a-*/whole/*"):
            with open(path, "ab") as file:
                file.write(b"more")
    folder = prepare({"a": corpus}, specification, cache).folders["a"]
    assert contents(folder) == whole
    assert encoded == [block for block in blocks for _ in range(2)]  # none was made again
    assert not list(cache.glob(".*"))


KILLED = """
import multiprocessing, os, signal, sys
from powertrain import data
from powertrain.data.prepare import *
if __name__ == "__main__":
    path, tokenizer, cache = sys.argv[1:]
    data.sources.BLOCK, data.prepare.SAVE_SECONDS, data.prepare.ALONE = 4000, 0.0, 0
    seen = []
    def progress(description, done, total):
        seen.append(done)
        if len(seen) == 5:
            print(*(process.pid for process in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    corpus = Corpus("text", path, validation_fraction=0.2)
    prepare({"a": corpus}, TokenizerSpec(tokenizer), cache, progress, workers=2)
"""


def test_several_processes_give_the_same_bytes_also_when_killed(texts, tokenizer, tmp_path, small_blocks, monkeypatch):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    whole = prepare({"a": corpus_of(texts[0])}, TokenizerSpec(str(tokenizer)), tmp_path / "whole").folders["a"]
    command = [sys.executable, str(script), str(texts[0] / "*.txt"), str(tokenizer), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(Path(data.prepare.__file__).parent.parent)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    children = list(map(int, killed.stdout.split()))
    assert len(children) == 2
    state = json.loads(next((tmp_path / "cache").glob(".a-*/state.json")).read_text())
    assert 0 < sum(facts["documents"] for facts in state["statistics"].values()) < 60
    monkeypatch.setattr(data.prepare, "ALONE", 0)
    again = prepare({"a": corpus_of(texts[0])}, TokenizerSpec(str(tokenizer)), tmp_path / "cache", workers=2)
    assert contents(again.folders["a"]) == contents(whole)
    assert not list((tmp_path / "cache").glob(".*"))
    for _ in range(100):
        if left := [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
            time.sleep(0.1)
    assert not left  # they ended with their parent


def die(*_):
    os._exit(1)


def test_a_killed_worker_is_reported(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, "ALONE", 0)
    monkeypatch.setattr(data.encode, "_encode_here", die)
    with pytest.raises(ChildProcessError, match=r"data\.workers"):
        prepare({"a": corpus_of(texts[0])}, TokenizerSpec(str(tokenizer)), tmp_path, workers=2)


def test_a_full_disk_keeps_what_is_done_and_bad_data_nothing(texts, tokenizer, tmp_path, small_blocks, monkeypatch):
    specification = TokenizerSpec(str(tokenizer))
    whole = contents(prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "whole").folders["a"])
    real = data.prepare.Output.add
    for error, message, left in (
        (OSError(errno.ENOSPC, "No space left on device"), r"No space is left for .*a-\w+\. Free some", 1),
        (DataError("The file is cut."), "The file is cut", 0),
    ):
        calls = []

        def add(*arguments, error=error, calls=calls):
            calls.append(None)
            if len(calls) == 3:
                raise error
            real(*arguments)

        cache = tmp_path / type(error).__name__
        with monkeypatch.context() as patch:
            patch.setattr(data.prepare.Output, "add", add)
            with pytest.raises(type(error), match=message):
                prepare({"a": corpus_of(texts[0])}, specification, cache)
        assert len(list(cache.glob(".a-*"))) == left
        assert contents(prepare({"a": corpus_of(texts[0])}, specification, cache).folders["a"]) == whole
        assert not list(cache.glob(".*"))


@pytest.mark.parametrize("state", ["", "{}", "[]", '{"sizes": {}}'])
def test_an_unreadable_state_starts_over(state, texts, tokenizer, tmp_path):
    specification = TokenizerSpec(str(tokenizer))
    whole = prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "whole").folders["a"]
    slot = tmp_path / "cache" / f".{whole.name}.0"
    slot.mkdir(parents=True)
    (slot / "state.json").write_text(state)
    (slot / "whole").mkdir()
    for name in ("train", "validation"):
        (slot / "whole" / f"{name}.bin").write_bytes(b"left")
        (slot / f"{name}.lengths").write_bytes(b"left")
    (slot / "hashes").touch()
    (slot / "whole" / "skipped.jsonl").touch()
    assert contents(prepare({"a": corpus_of(texts[0])}, specification, slot.parent).folders["a"]) == contents(whole)


def test_what_others_left_is_removed_when_the_corpus_is_whole(texts, tokenizer, tmp_path):
    specification = TokenizerSpec(str(tokenizer))
    name = prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "whole").folders["a"].name
    for number in (0, 1, 2):
        (tmp_path / "cache" / f".{name}.{number}").mkdir(parents=True)
    with open(tmp_path / "cache" / f".{name}.1" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [f".{name}.1"]


def test_caches_of_earlier_versions_stay_valid(tmp_path, monkeypatch):
    """The hash was computed by version 0.1.0 as it first was."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    os.utime(tmp_path / "a.jsonl", (1_700_000_000, 1_700_000_000))
    monkeypatch.chdir(tmp_path)

    def name(**more) -> str:
        corpus = Corpus("jsonl", "*.jsonl", validation_fraction=0.25, **more)
        return data.cache.short_hash([data.cache.describe(corpus), "identity"])

    assert name() == "df41307b5765"
    assert name(deduplicate=True) != name()


def test_equal_texts_are_kept_once(texts, tokenizer, tmp_path):
    corpus = replace(written(tmp_path / "files", texts[1], "jsonl"), deduplicate=True)
    specification = TokenizerSpec(str(tokenizer))
    prepared = prepare({"a": corpus}, specification, tmp_path / "cache")
    once = prepare({"a": corpus_of(texts[0])}, specification, tmp_path / "cache")
    assert decoded(prepared, "a") == decoded(once, "a")
    skipped = json.loads((prepared.folders["a"] / "corpus.json").read_text())["skipped"]["duplicate"]
    first, second = (str(tmp_path / "files" / f"{number}.jsonl") for number in (0, 1))
    # 60 texts, 50 records in the first file, then a null, twenty of them again, an empty one, and three more.
    assert skipped["count"] == 23 and skipped["first"] == [f"{second}:{number}" for number in range(12, 17)]
    lines = (prepared.folders["a"] / "skipped.jsonl").read_text().splitlines()
    listed = [tuple(json.loads(line).values()) for line in lines]
    assert sorted(listed) == sorted(
        [("null", f"{second}:11"), ("empty", f"{second}:32")]
        + [("duplicate", f"{second}:{number}") for number in (*range(12, 32), 33, 34, 35)]
    )
    assert first not in str(listed)
    # A validation document whose text training has is skipped, too.
    apart = replace(corpus, validation_path=str(tmp_path / "files" / "*.held"))
    splits = decoded(prepare({"a": apart}, specification, tmp_path / "cache"), "a")
    assert splits == {"train": texts[1], "validation": ["held " + texts[1][0]]}


def test_hashes_are_known_again_and_no_others():
    draw = np.random.default_rng(0)
    kept, seen = data.prepare.Kept(), set()
    for _ in range(200):
        # Of few different values, some with zeros at their ends, which numpy's byte strings would lose on their own.
        hashes = np.frombuffer(
            (draw.integers(0, 4, (50, 16)) * (draw.integers(0, 9, (50, 16)) > 6)).astype("u1"), "S16"
        )
        new = []
        for value in map(np.ndarray.tobytes, hashes.reshape(-1, 1)):
            new.append(value not in seen)
            seen.add(value)
        assert kept.new(hashes).tolist() == new
    assert 100 < len(seen) < 10_000


def test_the_list_of_skipped_records_is_bounded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, "LISTED", 10)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + "{}\n" * 100)
    folder = prepare({"a": Corpus("jsonl", str(path))}, TokenizerSpec(str(tokenizer)), tmp_path / "cache").folders["a"]
    assert json.loads((folder / "corpus.json").read_text())["skipped"]["missing_field"]["count"] == 100
    assert len((folder / "skipped.jsonl").read_text().splitlines()) == 10


def test_two_at_once_the_first_to_finish_wins(texts, tokenizer, tmp_path):
    specification, inner = TokenizerSpec(str(tokenizer)), []

    def progress(description, done, total):
        if description.startswith("tokenising") and not inner:
            inner.append(None)
            inner[0] = prepare({"a": corpus_of(texts[0])}, specification, tmp_path)

    outer = prepare({"a": corpus_of(texts[0])}, specification, tmp_path, progress)
    assert outer.folders == inner[0].folders
    assert not list(tmp_path.glob(".*"))


def test_progress_reaches_the_total(texts, tokenizer, tmp_path):
    calls = []
    prepare({"a": corpus_of(texts[0])}, TokenizerSpec(str(tokenizer)), tmp_path, lambda *call: calls.append(call))
    size = sum(len(text.encode()) for text in texts[1])
    assert calls[-1] == ("tokenising a", size, size)


def test_splits_without_a_document(tokenizer, tmp_path):
    def message(fraction: float) -> str:
        with pytest.raises(DataError) as error:
            prepare({"a": corpus_of(tmp_path, fraction)}, TokenizerSpec(str(tokenizer)), tmp_path / "cache")
        return str(error.value)

    (tmp_path / "a.txt").write_text("  ")
    assert "train split of corpus 'a' has no document, out of 0 (skipped: 1 empty)" in message(0)
    (tmp_path / "a.txt").write_text("one")
    assert "Set it to 0, or name other documents" in message(0.01)
    (tmp_path / "b.txt").write_text("two")
    assert "Lower it" in message(0.999)
    advice = float(message(0.001).split("Raise it to ")[1].split()[0])
    specification = TokenizerSpec(str(tokenizer))
    prepared = prepare({"a": corpus_of(tmp_path, advice)}, specification, tmp_path / "cache")
    assert {split: len(documents) for split, documents in decoded(prepared, "a").items()} == {
        "train": 1,
        "validation": 1,
    }


def test_documents_that_are_all_too_long(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources, "LONGEST", 3)
    (tmp_path / "a.txt").write_text("abcd")
    with pytest.raises(DataError, match=r"skipped: 1 too_long\)\. A document may have 134,217,728 bytes: split longer"):
        prepare({"a": corpus_of(tmp_path, 0)}, TokenizerSpec(str(tokenizer)), tmp_path / "cache")


def test_nothing_to_train_a_tokenizer_on(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no document"):
        prepare({"a": corpus_of(tmp_path, 0)}, TokenizerSpec(vocab_size=300), tmp_path / "cache")
    with pytest.raises(DataError, match=r"vocab_size is 256.*at least 257"):
        prepare({"a": corpus_of(tmp_path, 0)}, TokenizerSpec(vocab_size=256), tmp_path / "cache")


def test_tokenizers_that_cannot_serve(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text("text")
    headless = AutoTokenizer.from_pretrained(tokenizer)
    headless.eos_token = None
    headless.save_pretrained(tmp_path / "no end")
    for path, words in ((tmp_path / "no end", "no end-of-text token.*eos_token"), (tmp_path / "none", "No tokenizer")):
        with pytest.raises(DataError, match=words):
            prepare({"a": corpus_of(tmp_path, 0)}, TokenizerSpec(str(path)), tmp_path / "cache")


@pytest.mark.parametrize("name", ["../a", ".a", "a/b", "", "-a"])
def test_names_that_are_no_file_names(name, tmp_path):
    with pytest.raises(DataError, match="cannot name a corpus"):
        prepare({name: Corpus("stdlib")}, TokenizerSpec(), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"splits": {"train": {}}}', '{"splits": 3}', "[" * 100_000])
def test_a_damaged_description_of_a_prepared_corpus_is_a_paragraph(texts, tokenizer, tmp_path, text):
    corpora, spec = {"a": corpus_of(texts[0])}, TokenizerSpec(path=str(tokenizer))
    folder = prepare(corpora, spec, tmp_path).folders["a"]
    (folder / "corpus.json").write_text(text)
    with pytest.raises(DataError, match=r"corpus\.json is damaged\. Delete .* to prepare the corpus again"):
        prepare(corpora, spec, tmp_path)
