"""What a step needs, from a configuration: data, model, optimizer, and the progress of a checkpoint."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from powertrain.data import expand
from powertrain.data.cache import fingerprint
from powertrain.data.loader import Batches, num_sequences
from powertrain.data.order import Order, Stage
from powertrain.data.prepare import Prepared, prepare, skipped_records
from powertrain.data.tokenizer import load_tokenizer, rows_needed
from powertrain.data.tokens import TokenFile
from powertrain.schedulers import Schedule
from powertrain.train import checkpoint, init_from, resume
from powertrain.train.average import Average
from powertrain.train.balance import Balance
from powertrain.train.check import batch_doubts, doubts
from powertrain.train.config import Config
from powertrain.train.console import human, progress_lines
from powertrain.train.engine import Engine
from powertrain.train.errors import ConfigError
from powertrain.train.evaluate import Validation
from powertrain.train.hardware import available_cores
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.metrics import count_parameters
from powertrain.train.model import blockwise, granite, mup
from powertrain.train.state import AVERAGE, State

Log = Callable[[str], None]

SHORT_PREPARATION = 2.0  # seconds; a shorter one is finished, and a step is trained and saved, before a stop


class StoppedEarly(Exception):
    """The file `stop` appeared while the corpora were prepared."""


@dataclass
class Parts:
    """What a step needs beside the engine and the state."""

    schedule: Schedule
    batches: Batches
    balance: Balance
    average: Average | None
    validation: Validation
    train_files: dict[str, TokenFile]
    tokenizer: Any
    data_fingerprint: dict[str, str]
    counts: dict[str, int]
    data: dict[str, Any]


def assemble(config: Config, engine: Engine, state: State, start_from: Path | None, log: Log) -> Parts:
    """Data, model and optimizer of a run, as they are at its beginning or in the checkpoint `start_from`.

    Collective. Puts the model into `engine`, and the checkpoint's progress into `state`.

    Raises:
        ConfigError: data, tokenizer, `run.init_from` or the checkpoint do not fit the configuration.
        data.DataError: a corpus cannot be read.
        StoppedEarly: see `prepare_data`.
    """
    # ---- data: prepared once, then memory-mapped; sequence i is a function of the seed and i
    named = config.data.tokenizer.path
    gone = named is not None and Path(named).is_absolute() and not Path(named).exists()  # a branch's parent has moved
    if start_from is not None and (named is None or gone):
        trained_with = start_from.parent.parent / "tokenizer"
        if trained_with.is_dir():
            config.data.tokenizer.path = str(trained_with)  # or another corpus would mean another tokenizer
            if gone:
                log(f"{named} does not exist; the tokenizer is that in {trained_with}.")
    prepared = prepare_data(config, engine, log)
    assert prepared.tokenizer_folder is not None
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    check_vocabulary(config, tokenizer, prepared, log)
    batches = Batches(prepared.train, order_of(config, prepared), config.data.sequence_length)
    data_fingerprint = dict(prepared.fingerprints)
    data_fingerprint[resume.TOKENIZER] = resume.tokenizer_fingerprint(tokenizer)

    # ---- model
    torch.manual_seed(config.run.seed)
    with engine.building():
        model = granite.build(config, engine.device)
    rows = mup.table(config)
    engine.prepare(LanguageModelLoss(model), rows)
    if start_from is None and config.run.init_from is not None:
        log(f"Weights, sizes and multipliers are those of {config.run.init_from}, whatever the experiment says.")
        engine.load(init_from.reader(config.run.init_from, engine.shapes))
    elif start_from is None:
        engine.load(mup.initial_values(engine.shapes, rows, config.run.seed))
    seed_rank(config.run.seed, engine.rank, 0 if start_from is None else checkpoint.step_of(start_from))
    balance = Balance(config, engine.reduce)
    if mismatches := mup.parametrisation_mismatches(config):
        log(
            f"Warning: the law of this schedule belongs to another parametrisation ({'; '.join(mismatches)}), and the "
            "best learning rate may be another one here."
        )
    for doubt in (*doubts(config), *batch_doubts(config)):
        log(f"Warning: {doubt}")
    why = blockwise.refusal(engine.device, config.model.attention_dropout)
    if why and config.model.attn_implementation == "auto" and engine.device.type == "cpu":
        log(f"Attention is SDPA, not {blockwise.NAME}: {why}.")
    counts = count_parameters(engine.shapes, config)
    count = torch.get_num_threads()
    threads = f" with {count} thread{'s' * (count > 1)}" if engine.device.type == "cpu" else ""
    log(
        f"{type(model).__name__}: {counts['total']:,} parameters, {counts['active']:,} active besides the embedding, "
        f"m_width {mup.width_multiplier(config):g}, {config.precision}, {engine.kind} on {engine.world_size} × "
        f"{engine.device.type}{threads}, {', '.join(granite.kernels(config, engine.device))}"
    )
    if threads and config.threads is None and (load := os.getloadavg()[0]) > 1.5 * available_cores():
        log(
            f"This machine is busy (load {load:.1f} on {available_cores()} cores). With threads=1 a small model trains "
            "many times faster beside other work."
        )

    # ---- progress
    if start_from is not None:
        resume.check_fingerprints(start_from, data_fingerprint, prepared.train)
        checkpoint.load(start_from, engine, state, balance)
        log(f"Resuming from {start_from}: step {state.step:,}, {human(state.tokens)} tokens.")
        kind, ranks = checkpoint.trained_by(start_from)
        if (kind, ranks) != (engine.kind, engine.world_size):
            log(f"It was trained as {kind} on {ranks} rank(s); it continues as {engine.kind} on {engine.world_size}.")
        if why := resume.why_losses_differ(start_from, config, engine.world_size):
            log(f"Warning: {why}")
    average = make_average(config, engine, start_from, log)
    validation = Validation(config, prepared, tokenizer)
    data = log_data(config, prepared, validation, log)
    return Parts(
        config.make_schedule(),
        batches,
        balance,
        average,
        validation,
        prepared.train,
        tokenizer,
        data_fingerprint,
        counts,
        data,
    )


def make_average(config: Config, engine: Engine, start_from: Path | None, log: Log) -> Average | None:
    """The running average that the configuration asks for: that in the checkpoint, or one that begins there."""
    window, then = config.average.window, None if start_from is None else checkpoint.average_window(start_from)
    if start_from is not None and window != then:
        if then is None:
            log(f"A running average (average.window {window:g}) begins with the weights as they are here.")
        elif window is None:
            log(
                "The running average ends here: average.window is null. Earlier checkpoints have it until they are "
                "removed, and a folder model-average of the run stays as it is."
            )
        else:
            log(f"The running average continues with average.window {window:g}; it was {then:g}.")
    if window is None:
        return None
    read = None
    if start_from is not None and then is not None:
        read = checkpoint.Stored(start_from, AVERAGE, engine.shapes).read
    return Average(engine, window, read)


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Seed dropout differently on every rank, once the model is the same on all. The first keeps `seed`, as a single
    process does. A rank with a random state in the checkpoint resumes with that one; a new rank begins with this."""
    if rank:
        key = hashlib.blake2b(f"{seed}/rank {rank}/step {step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(key, "little") >> 1)


def prepare_data(config: Config, engine: Engine, log: Log) -> Prepared:
    """Tokenised corpora, made by the first rank when they are not in the cache yet. Collective.

    Raises:
        ConfigError: there is no corpus, or no tokenizer.
        data.DataError: a corpus cannot be read.
        StoppedEarly: on all ranks, when the file `stop` appears in the run's folder meanwhile.
    """
    if not config.data.corpora:
        raise ConfigError(
            "There is nothing to train on: data.corpora is empty. Add data=stdlib, or describe your own corpora "
            "in a file configs/data/NAME.yaml."
        )
    # Ranks of another machine, without this one's cache, would have as many processes each.
    workers = (config.data.workers or available_cores()) if engine.is_main else 1

    shown = progress_lines(log)

    def prepared_data(progress: Callable[[str, int, int | None], None] = shown) -> Prepared:
        return prepare(config.data.corpora, config.data.tokenizer, config.data.cache_dir, progress, workers)

    def until_stopped(description: str, done: int, total: int | None) -> None:
        if time.monotonic() - begun > SHORT_PREPARATION and (config.run_folder / "stop").exists():
            raise StoppedEarly
        shown(description, done, total)

    first: list[Prepared] = []
    begun = time.monotonic()

    def stopped_before_prepared() -> bool:
        try:
            first.append(prepared_data(until_stopped))
        except StoppedEarly:
            return True
        return False

    if engine.first_rank_decides(stopped_before_prepared):
        raise StoppedEarly
    prepared = first[0] if first else prepared_data()  # from the cache; on a machine with one of its own not yet
    if prepared.tokenizer_folder is None:
        raise ConfigError(
            "All corpora are token files, which do not say how they were made: name the tokenizer, a folder or a "
            "Hugging Face name, in data.tokenizer.path."
        )
    return prepared


def check_vocabulary(config: Config, tokenizer: Any, prepared: Prepared, log: Log) -> None:
    """Check that every token id has a row in the embedding.

    Raises:
        ConfigError: the tokenizer has more tokens than model.vocab_size.
        data.DataError: a token file has an id beyond it.
    """
    used = rows_needed(tokenizer)
    if used > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer in {prepared.tokenizer_folder} has {used} tokens and model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size to {used} or more."
        )
    if added := tokenizer.num_special_tokens_to_add():
        log(
            f"The tokenizer itself adds {added} special token(s) to a text. Training text has none of them, but "
            f"{tokenizer.eos_token} after each document."
        )
    if padding := config.model.vocab_size - used:
        size = config.model.vocab_size
        log(f"vocab_size {size:,}, of which the tokenizer uses {used:,}: {padding:,} rows are padding")
    cache = Path(expand(config.data.cache_dir))
    for files in (prepared.train, prepared.validation):
        for name, file in files.items():
            if name in prepared.folders:
                continue  # made by this very tokenizer
            # Reading a whole corpus at every start would make a start as long as the corpus is large.
            checked = cache / f"{name}-{fingerprint(file, cache)[:12]}-within-{config.model.vocab_size}"
            if not checked.exists():
                file.check(config.model.vocab_size)
                checked.touch()


def log_data(config: Config, prepared: Prepared, validation: Validation, log: Log) -> dict[str, Any]:
    """Log what of the corpora is not trained on or not evaluated.

    Returns:
        The record of it, by corpus, for run.json.
    """
    record: dict[str, Any] = {}
    for name, file in prepared.train.items():
        record[name] = {"documents": file.num_documents, "tokens": file.num_tokens}
        if name in prepared.folders:
            record[name]["skipped"], sentence, many = skipped_records(name, prepared.folders[name])
            if sentence:
                log(f"Warning: {sentence}" if many else sentence)
        if name in validation.problems:
            record[name]["evaluation"] = validation.problems[name]
            if name in prepared.validation:
                what = "has" if name in validation.corpora else "is not evaluated:"
                log(f"Warning: {name} {what} {validation.problems[name]}.")
    if not validation.corpora:
        asked = f"evaluation.every is {config.evaluation.every}, but " if config.evaluation.every else ""
        log(
            f"Warning: {asked}no corpus has a validation split that a sequence fits in, so there will be no validation "
            "loss. Give one a validation_fraction or a validation_path."
        )
    elif without := [name for name in record if name not in prepared.validation]:
        log(f"No validation split, so not evaluated: {', '.join(without)}.")
    return record


def order_of(config: Config, prepared: Prepared) -> Order:
    """The order of sequences: the mixture, then the stages that replace it, each from its first sequence on."""
    length = config.data.sequence_length
    available = {name: num_sequences(file.num_tokens, length, name) for name, file in prepared.train.items()}
    stages = tuple(Stage(start, mixture) for start, mixture in config.stages())
    return Order(config.run.seed, stages, available)
