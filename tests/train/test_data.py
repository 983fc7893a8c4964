"""What a run says and records of its data: what was skipped, what is not evaluated, how many bytes were predicted."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from powertrain.data.prepare import prepare
from powertrain.data.tokens import TokenFile
from powertrain.launch.estimate.problems import data_problems
from powertrain.launch.prepare import _print_epochs
from powertrain.train.compose import load
from powertrain.train.track import read_lines

SHORT = ("run.tokens=512", "schedule.warmup_tokens=0", "schedule.decay.tokens=0")


@pytest.fixture
def unknown_words(words: Path, tmp_path: Path) -> str:
    """The setting of a tokenizer that knows half of the made-up words."""
    text = " ".join(path.read_text() for path in sorted(words.glob("*.txt")))
    known = sorted(set(re.findall(r"\w+", text)))[::2]
    vocab = {token: number for number, token in enumerate(["<end>", "[UNK]", ".", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="[UNK]")
    wrapped.save_pretrained(tmp_path / "unknown")
    return f"data.tokenizer.path={tmp_path}/unknown"


def test_bits_per_byte_count_unknown_words(run: Callable[..., Path], words: Path, unknown_words: str, tmp_path: Path):
    cache = tmp_path / "cache"  # its own: whatever else has been tested, there is one file to find
    folder = run(*SHORT, unknown_words, f"data.cache_dir={cache}", "evaluation.sequences=1000", "model.vocab_size=64")
    line = read_lines(folder / "evals.jsonl")[-1]
    # Every sequence and its last target, 33 tokens: the texts again, word by word, each with the white space before it.
    file = TokenFile(next(cache.glob("words-*/validation.bytes")).with_name("validation"))
    wanted: list[int | None] = []
    lengths = np.diff([*file.document_starts, file.num_tokens])
    held = [text for text in map(Path.read_text, sorted(words.glob("*.txt"))) if is_held_out(text)]
    assert len(held) == len(lengths)
    for text in held:
        ends = [0, *(word.end() for word in re.finditer(r"\w+|[^\w\s]+", text)), len(text)]
        wanted += [None, *np.diff(ends)[1:].tolist()]  # a document's first token is no target
    sequences = (file.num_tokens - 1) // 32
    targets = [size for size in wanted[1 : sequences * 32 + 1] if size is not None]
    assert line["targets"] == len(targets)
    assert line["bits_per_byte"] == pytest.approx(line["loss"] * len(targets) / math.log(2) / sum(targets), rel=1e-9)


def is_held_out(text: str) -> bool:
    import hashlib

    raw = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "big") >> 11) / (1 << 53) < 0.2


def test_bits_per_byte_that_are_not_known(
    run: Callable[..., Path], unknown_words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = f"data.cache_dir={tmp_path}/cache"
    run(*SHORT, unknown_words, mine)
    counts = next((tmp_path / "cache").glob("words-*/validation.bytes"))
    counts.unlink()  # as an earlier version left it
    capsys.readouterr()
    folder = run(*SHORT, unknown_words, mine, "run.name=earlier")
    assert [line["bits_per_byte"] for line in read_lines(folder / "evals.jsonl")] == [None, None]
    said = capsys.readouterr().out
    assert "no bits per byte: its tokenizer does not keep all of a text" in said and f"delete {counts.parent}" in said
    assert "bits a byte" not in said
    assert (
        "no bits per byte" in json.loads((folder / "run.json").read_text())["starts"][0]["data"]["words"]["evaluation"]
    )


def test_skipped_records_are_said_at_every_start(
    run: Callable[..., Path], words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"content": path.read_text()} for path in sorted(words.glob("*.txt"))]
    records[::20] = [{"text": path.read_text()} for path in sorted(words.glob("*.txt"))[::20]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = f"data.corpora={{lines: {{source: jsonl, path: {tmp_path}/a.jsonl}}}}"
    for name in ("first", "from_the_cache"):
        folder = run(*SHORT, corpus, f"run.name={name}", "data.sequence_length=8")
        said = capsys.readouterr().out
        assert "Warning: lines: 57 of 60 records (95.00%) were skipped: 57 missing_field." in said
        assert "The field read is 'text'." in said
        data = json.loads((folder / "run.json").read_text())["starts"][0]["data"]["lines"]
        assert (data["documents"], data["skipped"]) == (3, {"missing_field": 57})
        assert "No validation split, so not evaluated: lines." in said


def test_few_skipped_records_are_no_warning(
    run: Callable[..., Path], words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [path.read_text() for path in sorted(words.glob("*.txt"))] * 2
    lines = [json.dumps({"text": text}) for text in texts] + ['{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run(*SHORT, f"data.corpora={{lines: {{source: jsonl, path: {tmp_path}/a.jsonl, deduplicate: true}}}}")
    said = capsys.readouterr().out
    assert "\nlines: 61 of 121 records (50.41%) were skipped: 60 duplicate, 1 null." in said


def test_a_validation_split_that_is_shorter_than_a_window(
    run: Callable[..., Path], words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    more = [
        f"+data.corpora.few={{source: text, path: {words}/0*.txt, validation_path: {tmp_path}/short.txt}}",
        f"+data.corpora.none={{source: text, path: {words}/1*.txt}}",
        "data.tokenizer.vocab_size=290",
    ]
    folder = run(*SHORT, *more, "evaluation.every=1")
    said = capsys.readouterr().out
    assert re.search(r"Warning: few is not evaluated: its validation split has \d+ tokens, and a sequence", said)
    assert "No validation split, so not evaluated: none." in said
    data = json.loads((folder / "run.json").read_text())["starts"][0]["data"]
    assert "33" in data["few"]["evaluation"] and data["none"]["evaluation"] == "no validation split"
    assert "evaluation" not in data["words"]
    assert {line["corpus"] for line in read_lines(folder / "evals.jsonl")} == {"words", "overall"}
    # And before a run: the same corpora, which are in the cache now.
    config = load(folder / "config.yaml")
    _, warnings = data_problems(config, Console())
    assert any(re.match(r"The validation split of few has \d+ tokens, fewer than the 33 that", w) for w in warnings)
    _print_epochs(config.data, prepare(config.data.corpora, config.data.tokenizer, config.data.cache_dir), None)
    said = capsys.readouterr().out
    assert said.count("a run does not evaluate it") == 1 and "Warning: few: its validation split has" in said
    run(*SHORT, "evaluation.every=1", "run.name=long", "data.sequence_length=1000", "run.tokens=8000")
    assert "Warning: evaluation.every is 1, but no corpus has a validation split that" in capsys.readouterr().out


def test_overall_names_no_corpus(run: Callable[..., Path], words: Path) -> None:
    from powertrain.data import DataError

    with pytest.raises(DataError, match="'overall' cannot name a corpus"):
        run(f"+data.corpora.overall={{source: text, path: {words}/*.txt}}")


def test_fault_07_a_signal_while_the_tokenizer_is_trained(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from powertrain.data import bpe

    script = tmp_path / "endless.py"
    script.write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(600)")
    monkeypatch.setattr(bpe, "__file__", str(script))
    with pytest.raises(KeyboardInterrupt):
        run(*SHORT, f"data.cache_dir={tmp_path}/cache")
    assert json.loads((tmp_path / "tiny/exit.json").read_text()) == {
        "code": 130,
        "reason": "SIGINT, when no step was under way",
        "step": 0,
    }


def test_fault_07_the_file_stop_while_the_tokenizer_is_trained(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from powertrain.data import bpe

    script = tmp_path / "endless.py"
    stop = tmp_path / "tiny/stop"
    script.write_text(f"import pathlib, time\npathlib.Path({str(stop)!r}).touch()\ntime.sleep(600)")
    monkeypatch.setattr(bpe, "__file__", str(script))
    monkeypatch.setattr("powertrain.train.assemble.SHORT_PREPARATION", 0.0)
    folder = run(*SHORT, f"data.cache_dir={tmp_path}/cache")
    assert json.loads((folder / "exit.json").read_text()) == {
        "code": 0,
        "reason": "the file 'stop' in the run folder",
        "step": 0,
    }
    assert "while the corpora were prepared. The same command continues" in capsys.readouterr().out
    assert not (folder / "run.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("powertrain.train.report.runs_page", lambda folders: "not drawn")
    assert run(*SHORT, f"data.cache_dir={tmp_path}/cache") == folder
    assert json.loads((folder / "exit.json").read_text())["reason"] == "finished"
