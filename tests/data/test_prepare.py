import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.prepare
from data import DataError
from data.prepare import TokenizerSpec, prepare
from data.sources import Corpus
from data.tokens import TokenWriter

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
    monkeypatch.setattr(data.prepare, "documents", None)
    again = prepare({"a": corpus_of(texts[0])}, specification, tmp_path)
    assert again.folders == first.folders


def test_changed_files_or_settings_are_prepared_anew(tokenizer, tmp_path):
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
    real = data.prepare._pieces
    monkeypatch.setattr(data.prepare, "_pieces", lambda text: seen.append(text) or real(text))
    folder = data.prepare._train_tokenizer({"a": corpus_of(tmp_path / "texts")}, {}, 300, tmp_path, lambda *_: None)
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
    monkeypatch.setattr(data.prepare, "PIECE", 256)
    monkeypatch.setattr(data.prepare, "BATCH", 1000)
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


def test_a_killed_preparation_is_not_believed(texts, tokenizer, tmp_path):
    code = f"""
import os, pathlib, signal
from data.prepare import *
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


def test_an_error_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", 5)
    monkeypatch.setattr(TokenWriter, "add", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="space"):
        prepare({"a": corpus_of(tmp_path / "texts", 0)}, TokenizerSpec(str(tokenizer)), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if "tokenizer" not in path.name] == []


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
    assert "train split of corpus 'a' has no document, out of 0 (left out: 1 empty)" in message(0)
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
