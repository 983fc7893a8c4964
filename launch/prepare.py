"""Tokenise the corpora of a configuration into the cache, so that training starts at once.

usage: powertrain prepare [+experiment=NAME] [data=NAME] [KEY=VALUE …] [--inspect]

examples:
  powertrain prepare +experiment=quickstart
  powertrain prepare data=files data.corpora.files.path='/corpus/*.jsonl.zst' data.tokenizer.vocab_size=16384
  powertrain prepare --config-dir DIR data=mine data.workers=8 --inspect

  data.workers=N   processes that tokenise; default: one for each core

After a kill the same command resumes where the preparation was.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.data.loader import sequences_in
from powertrain.data.order import Stage, epochs
from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard
from powertrain.train.compose import composed_data
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.hardware import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from powertrain.data.prepare import Prepared
    from powertrain.data.tokens import TokenFile
    from powertrain.train.config import DataConfig

VOCABULARY_MULTIPLE = 128  # of Megatron-LM's --make-vocab-size-divisible-by, for GPUs' matrix products
SAMPLES, SAMPLE_TOKENS = 3, 96
BOUNDARY = "┃end of document┃"


def main(arguments: list[str] | None = None) -> None:
    """Prepare, with a progress bar, and print what was made."""
    parser = verb_parser("prepare", __doc__)
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="also print each corpus's lengths of documents, skipped records, and samples of text",
    )
    options, overrides = parser.parse_known_args(arguments)
    sys.exit(guard(lambda: _prepare(overrides, options.inspect)))


def _prepare(overrides: list[str], inspect: bool) -> int:
    data, budget = composed_data(overrides)
    if not data.corpora:
        raise ConfigError("There is no corpus to prepare: data=NAME chooses some, as data=stdlib (see docs/data.md).")
    try:
        prepared = _with_progress(data)
    except KeyboardInterrupt:
        print("powertrain: interrupted; the same command resumes where it was.", file=sys.stderr)
        return 130

    if prepared.tokenizer_folder is not None:
        _print_tokenizer(prepared.tokenizer_folder)
    for name in data.corpora:
        _print_corpus(name, data, prepared, inspect)
    _print_epochs(data, prepared, budget)
    return 0


def _with_progress(data: DataConfig) -> Prepared:
    from rich import progress as shown

    from powertrain.data.prepare import prepare
    from powertrain.train.console import progress_lines

    def prepared(progress: Callable[[str, int, int | None], None]) -> Prepared:
        workers = data.workers or available_cores()
        return prepare(data.corpora, data.tokenizer, data.cache_dir, progress, workers)

    bar = shown.Progress(
        shown.TextColumn("{task.description}"),
        shown.BarColumn(),
        shown.DownloadColumn(),
        shown.TransferSpeedColumn(),
        shown.TimeRemainingColumn(elapsed_when_finished=True),
    )
    if not bar.console.is_terminal:
        return prepared(progress_lines(lambda line: print(line, flush=True)))
    tasks: dict[str, Any] = {}

    def progress(description: str, done: int, total: int | None) -> None:
        if description not in tasks:
            tasks[description] = bar.add_task(description, total=total, completed=done)
        bar.update(tasks[description], completed=done, total=total)

    with bar:
        return prepared(progress)


def _print_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer

    from powertrain.data.tokenizer import rows_needed

    size = rows_needed(Tokenizer.from_file(str(folder / "tokenizer.json")))
    padded = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    print(f"tokenizer  {folder}")
    if padded == size:
        print(f"  {size:,} tokens: model.vocab_size={size}")
    else:
        print(
            f"  {size:,} tokens: model.vocab_size={padded}, the next multiple of {VOCABULARY_MULTIPLE}, has "
            f"{padded - size:,} rows of padding; {size} has none"
        )


def _print_epochs(data: DataConfig, prepared: Prepared, budget: int | None) -> None:
    """Print the epochs of each corpus in the budget, or the tokens of an epoch."""
    length = data.sequence_length
    sequences = {name: sequences_in(file.num_tokens, length) for name, file in prepared.train.items()}
    if short := [name for name, count in sequences.items() if count < 1]:
        print(
            f"Warning: {', '.join(short)}: fewer tokens than one sequence takes, {length + 1:,} "
            "(data.sequence_length + 1); a run refuses that"
        )
    for name, file in prepared.validation.items():
        if file.num_tokens <= length:
            print(
                f"Warning: {name}: its validation split has {file.num_tokens:,} tokens, fewer than one "
                f"sequence takes, {length + 1:,} (data.sequence_length + 1); a run does not evaluate it"
            )
    if short:
        return
    if budget is None:
        print(f"an epoch, in sequences of data.sequence_length={length:,}:", end=" ")
        print(", ".join(f"{name} {count * length:,} tokens" for name, count in sequences.items()))
    else:
        stages = tuple(Stage(*stage) for stage in Config(data=data).stages())
        times = epochs(stages, sequences, -(-budget // length))
        print(f"epochs in run.tokens={budget:,}:", ", ".join(f"{name} {number:.2f}" for name, number in times.items()))


def _print_corpus(name: str, data: DataConfig, prepared: Prepared, inspect: bool) -> None:
    from powertrain.data.prepare import corpus_facts, skipped_records

    folder = prepared.folders.get(name)
    empty: dict[str, Any] = {"splits": {}, "skipped": {}}
    facts = corpus_facts(folder) if folder else empty
    print(f"{name}  {folder or data.corpora[name].path}")
    for split, files in (("train", prepared.train), ("validation", prepared.validation)):
        if name in files:
            file = files[name]
            numbers = facts["splits"].get(split, {"documents": file.num_documents, "tokens": file.num_tokens})
            text = f", {numbers['bytes']:,} bytes of text" if "bytes" in numbers else ""
            print(f"  {split}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens{text}")
            if inspect:
                _inspect(file, numbers.get("bytes"), data, prepared.tokenizer_folder)
    if folder and (found := skipped_records(name, folder))[2]:
        print(f"  Warning: {found[1]}")
    for kind, skipped in facts["skipped"].items():
        print(f"  skipped, {kind}: {skipped['count']:,}, the first {', '.join(skipped['first'])}")
    if folder and (folder / "skipped.jsonl").exists():
        print(f"  listed in {folder / 'skipped.jsonl'}")


def _inspect(file: TokenFile, size: int | None, data: DataConfig, tokenizer_folder: Path | None) -> None:
    """Print statistics of a split, and samples of it, the same ones each time."""
    import numpy as np

    length = data.sequence_length
    if file.num_documents:
        lengths = np.diff(np.append(file.document_starts, file.num_tokens))
        quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 0.99, 1], method="lower")
        named = zip(("shortest", "10%", "median", "90%", "99%", "longest"), quantiles, strict=True)
        print("    tokens a document: " + ", ".join(f"{name} {value:,}" for name, value in named))
        longer = lengths > length
        share = lengths[longer].sum() / max(file.num_tokens, 1)
        print(f"    longer than a sequence of {length:,}: {longer.mean():.1%} of documents, with {share:.1%} of tokens")
        if empty := int((lengths == 0).sum()):
            print(f"    without any token: {empty:,} documents")
    if tokenizer_folder is None:
        print("    name data.tokenizer.path to see text")
        return
    from powertrain.data.tokenizer import bytes_of_tokens, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    draw = random.Random(0)

    def text(begin: int, end: int) -> str:
        return str(tokenizer.decode(file.tokens[begin:end].tolist()))

    def places(count: int) -> list[tuple[int, int]]:
        begins = sorted(draw.randrange(max(1, file.num_tokens - SAMPLE_TOKENS)) for _ in range(count))
        return [(begin, min(begin + SAMPLE_TOKENS, file.num_tokens)) for begin in begins]

    about, a_token = "", (size or 0) / max(1, file.num_tokens)
    by_token = bytes_of_tokens(tokenizer.backend_tokenizer.to_str())
    if size is None and by_token is not None:  # a token file does not record it, so a sample has to tell
        sampled = np.concatenate([file.tokens[begin:end] for begin, end in places(1000)])
        about, a_token = "about ", by_token[sampled[sampled < len(by_token)]].sum() / max(1, len(sampled))
    if a_token:
        print(f"    {about}{a_token:.2f} bytes a token, {1 / a_token:.3f} tokens a byte")
    for begin, end in places(SAMPLES):
        cuts = [begin, *sorted({*file.starts_between(begin + 1, end).tolist()}), end]
        print(f"    tokens {begin:,} to {end:,}:")
        for line in f"{BOUNDARY}\n".join(text(*cut) for cut in itertools.pairwise(cuts)).split("\n"):
            print(f"      │{line}")


if __name__ == "__main__":
    main()
