"""Training a tokenizer: words without end, and being interrupted."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from powertrain.data import bpe
from powertrain.data.prepare import TokenizerSpec, prepare
from powertrain.data.sources import Corpus
from powertrain.data.tokenizer import as_text, encode

END = "<|endoftext|>"


def plainly(texts: list[str], vocab_size: int) -> str:
    """tokenizer.json of a byte-level BPE trained as the library's own examples do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def test_ordinary_text_gives_the_tokenizer_that_it_always_gave() -> None:
    letters = random.Random(0).choices("abc de語\n", k=20_000)
    texts = ["".join(letters[begin : begin + 500]) for begin in range(0, len(letters), 500)]
    texts.append("x" * bpe.LONGEST_WORD)
    assert bpe.train(texts, 400, END).to_str() == plainly(texts, 400)


@pytest.mark.parametrize("kind", ["a", "\0", "語", " ", "letters"])
def test_a_word_without_end_is_learned_from_in_parts(kind: str) -> None:
    count, part = 262_144, bpe.LONGEST_WORD
    text = kind * count if kind != "letters" else "".join(random.Random(0).choices("acgt", k=20_000))
    tokenizer = bpe.train([text, "the cat sat"], 300, END)
    if kind in ("a", "letters"):
        parts = [text[begin : begin + part] for begin in range(0, len(text), part)]
        assert tokenizer.to_str() == plainly([*parts, "the cat sat"], 300)
    ids = encode(as_text(tokenizer.to_str()), text)
    assert tokenizer.decode(ids) == text
    if kind != "letters":
        assert len(ids) < count / 100  # nor does the tokenizer cut it in parts of a few bytes


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)")
    monkeypatch.setattr(bpe, "__file__", str(script))
    (tmp_path / "a.txt").write_text("a text" * 100_000)
    with pytest.raises(ChildProcessError, match="exited with status -9"):
        prepare({"a": Corpus("text", str(tmp_path / "a.txt"))}, TokenizerSpec(vocab_size=300), tmp_path / "cache")


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[psutil.Process]]:
    """Training takes for ever; which processes do."""
    script = tmp_path / "endless.py"
    script.write_text("import sys, time\nsys.stdin.buffer.read(1)\ntime.sleep(600)")
    monkeypatch.setattr(bpe, "__file__", str(script))
    return lambda: [child for child in psutil.Process().children() if str(script) in child.cmdline()]


def test_fault_07_a_signal_ends_the_training_of_a_tokenizer(
    tmp_path: Path, endless: Callable[[], list[psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a text")
    corpora = {"a": Corpus("text", str(tmp_path / "a.txt"))}
    training: list[bool] = []

    def interrupt() -> None:
        while not endless():
            time.sleep(0.01)
        training.append(True)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        prepare(corpora, TokenizerSpec(vocab_size=300), tmp_path / "cache")
    assert training and not endless()
    monkeypatch.undo()
    prepare(corpora, TokenizerSpec(vocab_size=300), tmp_path / "cache")


def test_what_progress_raises_ends_it(tmp_path: Path, endless: Callable[[], list[psutil.Process]]) -> None:
    (tmp_path / "a.txt").write_text("a text")

    def progress(description: str, done: int, total: int | None) -> None:
        if description == "training the tokenizer":
            assert endless()
            raise StopIteration

    with pytest.raises(StopIteration):
        prepare(
            {"a": Corpus("text", str(tmp_path / "a.txt"))}, TokenizerSpec(vocab_size=300), tmp_path / "cache", progress
        )
    assert not endless()
