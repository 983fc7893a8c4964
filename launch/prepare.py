"""Tokenise the corpora of a configuration into the cache, so that training starts at once.

usage: python -m launch.prepare [+experiment=NAME] [data=NAME] [KEY=VALUE …]

examples:
  python -m launch.prepare +experiment=quickstart
  python -m launch.prepare data=files data.corpora.files.path='/corpus/*.jsonl' data.tokenizer.vocab_size=16384
"""

from __future__ import annotations

import json
import sys

from train.cli import composed_data, guard


def main(arguments: list[str] | None = None) -> None:
    """Prepare, with a progress bar, and say what was made."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(guard(lambda: _prepare(arguments)))


def _prepare(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    data = composed_data(arguments)

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from data.prepare import prepare

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()) as bar:
        tasks: dict[str, int] = {}

        def progress(description: str, done: int, total: int | None) -> None:
            if description not in tasks:
                tasks[description] = bar.add_task(description, total=total)
            bar.update(tasks[description], completed=done, total=total)  # type: ignore[arg-type]

        prepared = prepare(data.corpora, data.tokenizer, data.cache_dir, progress)

    print(f"tokenizer  {prepared.tokenizer_folder}")
    for name, folder in prepared.folders.items():
        print(f"{name}  {folder}")
        facts = json.loads((folder / "corpus.json").read_text())
        for split, numbers in facts["splits"].items():
            print(
                f"  {split}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens, "
                f"{numbers['bytes']:,} bytes of text"
            )
        for kind, skipped in facts["skipped"].items():
            print(f"  left out, {kind}: {skipped['count']:,}, the first {', '.join(skipped['first'])}")
    return 0


if __name__ == "__main__":
    main()
