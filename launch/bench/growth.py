"""How the cost of a step grows with tokens seen, corpus, experts and layers, and that of records with a run's steps.

usage: python -m powertrain.launch.bench.growth FOLDER

Writes FOLDER/growth.json and growth.png. What is compared is measured in turn, round by round, in one process; a
value is the median of its rounds. Corpora are simulated: an index of documents of a million tokens, and in place of
their tokens the same few again and again, so that no disk is measured. Records take 0.8 GB while they are measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powertrain.data.cache import fingerprint, known_fingerprint
from powertrain.data.loader import Batches, num_sequences
from powertrain.data.order import Order, Stage
from powertrain.data.tokens import HEADER, MAGIC, VERSION, TokenFile
from powertrain.launch import bench
from powertrain.launch.bench.worker import Ours, assemble
from powertrain.train.compose import composed
from powertrain.train.config import Config
from powertrain.train.redact import settings_text
from powertrain.train.report import runs_page
from powertrain.train.resume import check_steps_taken
from powertrain.train.state import State
from powertrain.train.step import loss_terms, to_device, total_loss, train_step
from powertrain.train.track import cut_after, read_back

ROUNDS, STEPS = 3, 3
DOCUMENT = 1_000_000  # tokens
CORPORA = tuple(10**power for power in range(7, 14))  # tokens
SEEN = (0, 10**9, 10**10, 10**11, 10**12, 9 * 10**12)  # tokens
EXPERTS = (8, 16, 32, 64, 128)
LAYERS = (2, 4, 8, 16)
RECORDED = (10**3, 10**4, 10**5, 10**6)  # steps
LOST = 100  # steps after the checkpoint that a run resumes from
BASE = (*bench.SHAPES["hidden 256"], *bench.RUN)
SMALL = (*BASE, "model.hidden_size=64", "model.intermediate_size=32", "model.num_hidden_layers=2")


def main() -> None:
    """Measure, write, and print."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        found = measured(Path(temporary))
    (folder / "growth.json").write_text(
        json.dumps({"hardware": bench.hardware(), **found}, indent=1) + "\n", encoding="utf-8"
    )
    picture(found, folder / "growth.png")
    for name, values in found.items():
        print(name, {size: f"{1e3 * seconds:.2f} ms" for size, seconds in values.items()})


def measured(folder: Path) -> dict[str, dict[int, float]]:
    """Seconds: by tokens of the corpus to open it, to read a batch and for a step; by tokens seen for a step; by
    experts and by layers for the forward and backward pass; and those of `records`."""
    corpora = {tokens: simulated_corpus(folder / str(tokens), tokens) for tokens in CORPORA}
    words = folder / "words"
    bench.write_tokens(words, composed([*BASE]), 10 * 4096)
    small = composed([*SMALL])
    stepping = {tokens: Stepping(small, filled(prefix, words)) for tokens, prefix in corpora.items()}
    later = {seen: Stepping(small, filled(corpora[max(CORPORA)], words), seen) for seen in SEEN}
    return {
        "opening a corpus, by its tokens": in_turn({n: opening(prefix) for n, prefix in corpora.items()}),
        "a batch, by tokens of the corpus": in_turn({n: each.read for n, each in stepping.items()}),
        "a step, by tokens of the corpus": in_turn({n: each.step for n, each in stepping.items()}),
        "a step, by tokens seen": in_turn({n: each.step for n, each in later.items()}),
        "forward and backward, by experts": in_turn(
            {n: passing(composed([*BASE, f"model.num_local_experts={n}"]), TokenFile(words)) for n in EXPERTS}
        ),
        "forward and backward, by layers": in_turn(
            {n: passing(composed([*BASE, f"model.num_hidden_layers={n}"]), TokenFile(words)) for n in LAYERS}
        ),
        **records(folder),
    }


def records(folder: Path) -> dict[str, dict[int, float]]:
    """Seconds, by steps that a run has taken: to resume with its records, for its report, and for `check run` to find
    the steps that it replays."""
    runs = {steps: recorded(folder / f"run-{steps}", steps) for steps in RECORDED}
    return {
        "resuming with records, by steps": in_turn({n: resuming(run, n) for n, run in runs.items()}),
        "a report, by steps": in_turn({n: timed(partial(runs_page, [run])) for n, run in runs.items()}),
        "steps to replay, by steps": in_turn({n: timed(partial(last_steps, run)) for n, run in runs.items()}),
    }


def in_turn(tasks: Mapping[int, Callable[[], float]]) -> dict[int, float]:
    """The median of each task's seconds over the rounds; one round more, the first, is discarded."""
    rounds = [{size: task() for size, task in tasks.items()} for _ in range(ROUNDS + 1)][1:]
    return {size: statistics.median(each[size] for each in rounds) for size in tasks}


def simulated_corpus(prefix: Path, tokens: int) -> Path:
    """A token file of zeros, a byte each, that takes no disk space but its index's."""
    count = tokens // DOCUMENT
    with open(f"{prefix}.idx", "wb") as index:
        index.write(MAGIC + HEADER.pack(VERSION, 1, count, count + 1))
        index.write(np.full(count, DOCUMENT, "<i4").tobytes())
        index.write((np.arange(count, dtype="<i8") * DOCUMENT).tobytes())
        index.write(np.arange(count + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(count * DOCUMENT)
    known = known_fingerprint(TokenFile(prefix), prefix.parent)  # because reading the largest would take hours
    known.parent.mkdir(exist_ok=True)
    known.write_text("0" * 64, encoding="utf-8")
    return prefix


class Repeated:
    """The first `size` tokens of an endless repetition of `tokens`; only slices are read."""

    def __init__(self, tokens: npt.NDArray[Any], size: int) -> None:
        self.tokens, self.size = tokens, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        return self.tokens[np.arange(part.start, part.stop) % len(self.tokens)]


def filled(prefix: Path, words: Path) -> TokenFile:
    """The simulated corpus with tokens of the file `words`."""
    file: Any = TokenFile(prefix)
    file.tokens = Repeated(TokenFile(words).tokens[: 10 * 4096], file.num_tokens)
    found: TokenFile = file
    return found


def opening(prefix: Path) -> Callable[[], float]:
    """What a run does with a prepared corpus when it starts or resumes, up to its first batch. The corpus was hashed
    when it was made."""

    def task() -> float:
        begin = time.perf_counter()
        file = TokenFile(prefix)
        fingerprint(file, prefix.parent)
        sequences = {"corpus": num_sequences(file.num_tokens, 4096)}
        Batches({"corpus": file}, Order(0, (Stage(0, {"corpus": 1.0}),), sequences), 4096).batch(0, 8)
        return time.perf_counter() - begin

    return task


class Stepping:
    """A run that has `seen` so many tokens; seconds of its steps, and of reading their batches."""

    def __init__(self, config: Config, file: TokenFile, seen: int = 0) -> None:
        self.config, self.ours = config, assemble(config, file)
        length = config.data.sequence_length
        self.state = State(samples=seen // length, tokens=seen // length * length)

    def step(self) -> float:
        ours, seconds = self.ours, []
        for _ in range(STEPS):
            begin = time.perf_counter()
            train_step(self.config, ours.engine, ours.schedule, ours.batches, ours.balance, self.state)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def read(self) -> float:
        begin = time.perf_counter()
        self.ours.batches.batch(self.state.samples, self.config.batch.sequences)
        self.state.samples += self.config.batch.sequences
        return time.perf_counter() - begin


def passing(config: Config, file: TokenFile) -> Callable[[], float]:
    """Forward and backward passes without an optimizer step, of a model that is built again in each round."""

    def task() -> float:
        ours = assemble(config, file)
        forward_backward(config, ours)
        seconds = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            forward_backward(config, ours)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    return task


def forward_backward(config: Config, ours: Ours) -> None:
    """A forward and a backward pass of the first batch."""
    ours.engine.optimizer.zero_grad()
    sequences = config.batch.sequences
    batch = to_device(ours.batches.batch(0, sequences), ours.engine.device)
    outputs = ours.engine.forward(batch, last=True)
    terms = loss_terms(outputs, ours.balance, outputs.targets, sequences * config.data.sequence_length)
    ours.engine.backward(total_loss(terms, config.balance))


def recorded(folder: Path, steps: int) -> Path:
    """The folder of a run that has taken so many steps, with what it has recorded of them."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings_text(composed([*BASE])), encoding="utf-8")
    with open(folder / "metrics.jsonl", "wb") as file:
        file.writelines(line(step) for step in range(1, steps + 1))
    with open(folder / "evals.jsonl", "w", encoding="utf-8") as file:
        for step in range(LOST, steps + 1, LOST):
            scores = {"corpus": "overall", "loss": 3.0, "bits_per_byte": 1.0, "targets": 4096}
            file.write(json.dumps({"step": step, "tokens": step * 4096, **scores}) + "\n")
    return folder


def line(step: int) -> bytes:
    """A line of metrics.jsonl, as long as one of a GraniteMoe with 32 layers."""
    places = b'"step": %d, "tokens": %d, "loss": %.12f' % (step, (step - 1) * 4096, 3.0 + 7.0 / step**0.5)
    return _LINE.replace(b'"step": 0, "tokens": 0, "loss": 0', places)


_LINE = (
    json.dumps(
        {
            **{"step": 0, "tokens": 0, "loss": 0, "samples": 0, "lm_loss": 3.25, "balance_loss": 32.0, "z_loss": 11.0},
            **{"lr": 0.01, "lr_per_group": {"embedding": 0.01, "matrix": 0.001, "router": 0.001, "norm": 0.01}},
            **{"batch": 1.0, "gamma": 0.01, "at_cap": False, "phase": "trunk", "grad_norm": 1.25, "skipped": False},
            "expert_load": {"max_over_mean": 1.5, "entropy": 0.98, "layer_entropy": [0.9876] * 32, "idle": 0},
            **{"tokens_per_second": 4567.891, "data_seconds": 0.0001, "mfu": None},
        }
    ).encode()
    + b"\n"
)


def resuming(folder: Path, steps: int) -> Callable[[], float]:
    """What a start does with the records of LOST steps after its checkpoint, and with settings that have changed."""
    then, now = composed([*BASE]), composed([*BASE, "run.tokens=2_000_000_000_000_000"])
    state = State(step=steps, tokens=steps * 4096)
    lost = b"".join(line(step) for step in range(steps + 1, steps + 1 + LOST))

    def task() -> float:
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(lost)
        begin = time.perf_counter()
        cut_after(folder / "metrics.jsonl", steps)
        check_steps_taken(then, now, state, {})
        return time.perf_counter() - begin

    return task


def last_steps(folder: Path) -> None:
    """The ten that `check run` replays."""
    for _ in zip(range(10), read_back(folder / "metrics.jsonl"), strict=False):
        pass


def timed(task: Callable[[], object]) -> Callable[[], float]:
    """The seconds that it takes."""

    def run() -> float:
        begin = time.perf_counter()
        task()
        return time.perf_counter() - begin

    return run


def picture(found: dict[str, dict[int, float]], path: Path) -> None:
    """One panel for each comparison; what should be flat is drawn over a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(3, 3)
    for axis, (name, values) in zip(axes.flat, found.items(), strict=True):
        sizes, milliseconds = [max(size, 1) for size in values], [1e3 * seconds for seconds in values.values()]
        axis.plot(sizes, milliseconds, "o-")
        axis.set(title=name, ylabel="ms", ylim=(0, 1.3 * max(milliseconds)))
        if "layers" not in name:
            axis.set_xscale("log")  # where none are shown as one
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
