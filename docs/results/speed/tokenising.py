"""data.prepare beside datasets.map: the same documents, tokenizer and cores. `python docs/results/speed/tokenising.py`

The documents are Python's standard library, four times over. Both read one jsonl file and leave tokens on the disk;
datasets.map is tried with one process (the tokenizer has threads of its own) and with one for each core. Each is
measured in a new process, because a fork takes the tokenizer its threads.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from powertrain.data.prepare import TokenizerSpec, prepare
from powertrain.data.sources import Corpus, documents

ROUNDS, COPIES, CORES = 3, 4, len(os.sched_getaffinity(0))


def ours(file: Path, tokenizer: Path, cache: Path) -> int:
    spec = TokenizerSpec(str(tokenizer))
    return prepare({"corpus": Corpus("jsonl", str(file))}, spec, cache).train["corpus"].num_tokens


def theirs(file: Path, tokenizer: Path, cache: Path, processes: int) -> int:
    encode = AutoTokenizer.from_pretrained(tokenizer)
    texts = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    tokens = texts.map(
        lambda rows: {"input_ids": encode(rows["text"])["input_ids"]},
        batched=True,
        remove_columns=texts.column_names,
        num_proc=processes,
    )
    return sum(map(len, tokens.with_format("numpy")["input_ids"]))


def timed(way: Callable[..., int], *arguments: object) -> tuple[int, float]:
    datasets.disable_progress_bars()
    begin = time.perf_counter()
    return way(*arguments), time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = [text for _, text in documents(Corpus("stdlib"))] * COPIES
        file = folder / "corpus.jsonl"
        # A number in front keeps the copies apart.
        file.write_text(
            "".join(json.dumps({"text": f"# {i}\n{text}"}) + "\n" for i, text in enumerate(texts)), encoding="utf-8"
        )
        tokenizer = prepare({"stdlib": Corpus("stdlib")}, TokenizerSpec(vocab_size=8192), folder / "first")
        ways = {
            "data.prepare": (ours,),
            "datasets.map, 1 process": (theirs, 1),
            f"datasets.map, {CORES} processes": (theirs, CORES),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(ROUNDS):
            for name, (way, *rest) in ways.items():
                cache = folder / f"cache-{number}-{len(rest)}-{rest}"
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                    tokens, took = alone.submit(timed, way, file, tokenizer.tokenizer_folder, cache, *rest).result()
                seconds[name].append(took)
                print(f"{name:<28} {tokens:,} tokens  {took:.2f} s", flush=True)
        size = file.stat().st_size
        for name, of in seconds.items():
            middle = statistics.median(of)
            print(f"{name:<28} median {middle:.2f} s ({min(of):.2f} … {max(of):.2f}), {size / middle / 1e6:.1f} MB/s")


if __name__ == "__main__":
    main()
