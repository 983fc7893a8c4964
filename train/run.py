"""What a run is, top to bottom. Read this first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from data import DataError, expand
from data.loader import Batches, num_windows
from data.order import Order, Stage
from data.prepare import Prepared, prepare, rows_needed
from data.tokens import TokenFile
from train import checkpoint, environment, init_from, report, resume
from train.balance import Balance
from train.config import Config, ConfigError, Diverged, RunFailed, check_batch
from train.console import Progressing, human, progress_lines
from train.engine import Engine
from train.evaluate import Validation
from train.export import check_target, export, generate, in_working_precision
from train.loop import Stop, train_loop
from train.loss import LanguageModelLoss
from train.metrics import count_parameters, flops_per_token, peak_flops
from train.model import granite, mup
from train.state import State
from train.track import Tracker
from train.watchdog import Watchdog

Say = Callable[[str], None]


@dataclass
class Outcome:
    """How a run ended: `reason` is "finished", or why it stopped before."""

    reason: str
    step: int


def train(config: Config, command: list[str]) -> Outcome:
    """Train as configured, from the beginning or from the newest checkpoint of the run's folder.

    Raises:
        ConfigError, data.DataError: something the user can mend.
    """
    engine, state = Engine(config), State(tokens=config.run.tokens_seen)
    folder = config.run_folder
    with environment.claimed(folder, engine), leaving_exit_json(folder, engine, state) as ended:
        try:
            outcome = _train(config, engine, state, command)
        except (ConfigError, DataError) as error:
            if engine.world_size > 1 and error is not engine.error_of_first:
                error.add_note(f"rank {engine.rank}:")  # it may be the only one
            raise
        except RuntimeError as error:
            if not engine.lost_a_rank(error):
                raise
            raise RunFailed(
                f"Another rank is gone; this one had come to step {state.step}. What ended it is in its own last lines "
                "or its machine's log. The same command goes on from the newest checkpoint."
            ) from error
        ended |= {"code": 0, "reason": outcome.reason, "step": outcome.step}
        return outcome


def _train(config: Config, engine: Engine, state: State, command: list[str]) -> Outcome:
    folder = config.run_folder
    checkpoints = folder / "checkpoints"

    # ---- where to begin
    start_from, changes, tokens = engine.first_rank_decides(lambda: where_to_begin(config))
    engine.first_rank_decides(lambda: check_batch(config, engine.world_size, tokens - config.run.tokens_seen))
    benchmarks = None
    if config.evaluation.tasks:
        from train.tasks import Benchmarks  # with lm-eval, which takes seconds and may not be installed

        benchmarks = Benchmarks(config, engine)

    with Progressing(config, engine, state) as progress:
        say = progress.say
        parts = assemble(config, engine, state, start_from, say)
        if engine.is_main:
            # Only now: what cannot begin leaves no trace in the records of what has run.
            if start_from is None or not (folder / "tokenizer").exists():
                environment.replace_folder(folder / "tokenizer", parts.tokenizer.save_pretrained)
            (folder / "exit.json").unlink(missing_ok=True)
            environment.replace_text(folder / "config.yaml", environment.settings_text(config))
            environment.write(folder / "run.json", engine, command, start_from, changes, parts.counts)
        flops, peak = flops_per_token(config, parts.counts), peak_flops(engine.device)
        tracker = Tracker(folder, config, engine, state, say)
        saver = checkpoint.Saver(checkpoints, engine, parts.data_fingerprint, say)
        own = start_from is not None and start_from.parent == checkpoints  # and not another run's
        if own:
            saver.saved_step = state.step

        # ---- train
        watchdog = Watchdog(folder, engine, state)

        def on_step(record: dict[str, Any]) -> None:
            watchdog.alive()
            per_device = flops * record["tokens_per_second"] / engine.world_size
            record["mfu"] = per_device / peak if peak else None
            tracker.step(record)
            progress.step(record, state)

        def evaluate() -> list[dict[str, Any]]:
            lines = parts.validation.evaluate(engine, state)
            watchdog.alive()
            scores = []
            if benchmarks is not None:
                with watchdog.paused():  # thousands of forward passes
                    scores = benchmarks.evaluate(parts.tokenizer, state)
            for line in (*lines, *scores):
                tracker.evaluation(line)
            said = [f"validation loss {lines[-1]['loss']:.4f}"] if lines else []
            for line in scores:
                said += [
                    f"{line['corpus']} {metric} {line[metric]:.4f}" for metric in ("acc", "acc_norm") if metric in line
                ]
            if said:
                say(f"step {state.step:,}: {', '.join(said)}")
            return lines

        def save() -> None:
            with watchdog.paused():  # a disk may be slow
                saver.save(state, parts.balance)

        def finish_saving() -> None:
            with watchdog.paused():
                saver.finish()

        with watchdog:
            with Stop(folder, engine) as stop:
                due = config.evaluation.every and state.step and state.step % config.evaluation.every == 0
                if due and own and not engine.first_rank_decides(lambda: tracker.has_evaluated(state.step)):
                    evaluate()  # the stop had come before it
                try:
                    reason = train_loop(
                        config, engine, parts.batches, parts.balance, state, stop, on_step, evaluate, save
                    )
                except Diverged:  # on all ranks
                    finish_saving()
                    raise
                if saver.saved_step != state.step:
                    save()
                finish_saving()
                lines = evaluate() if reason is None else []
            if reason is None:
                probe = parts.batches.batch(0, 1)["input_ids"]
                logits = engine.logits(probe)
                whole = engine.full_parameters()
                weights = {name: in_working_precision(config, tensor) for name, tensor in whole if engine.is_main}
        tracker.close()
        if reason is not None:
            say(
                f"\nStopped by {reason} at step {state.step:,}, saved in {folder}. The same command goes on from there."
            )
            return Outcome(reason, state.step)

    # ---- what is left to the user
    if engine.is_main:
        picture = folder / "report.html"
        environment.replace_text(picture, report.runs_page([folder]))
        facts: dict[str, Any] = {"tokens": f"{state.tokens:,}", "steps": f"{state.step:,}"}
        if lines:
            facts |= {
                "validation loss": f"{lines[-1]['loss']:.4f} nats a token",
                "bits per byte": f"{lines[-1]['bits_per_byte']:.4f}",
            }
        difference = export(config, weights, logits, probe, folder / "tokenizer", folder / "model", facts)
        say_result(config, folder, parts, lines, picture, difference, say)
    return Outcome("finished", state.step)


@dataclass
class Parts:
    """What a step needs beside the engine and the state."""

    batches: Batches
    balance: Balance
    validation: Validation
    train_files: dict[str, TokenFile]
    tokenizer: Any
    data_fingerprint: dict[str, str]
    counts: dict[str, int]


def assemble(config: Config, engine: Engine, state: State, start_from: Path | None, say: Say) -> Parts:
    """Data, model and optimizer of a run, as they are at its beginning or in the checkpoint `start_from`.

    Collective. Puts the model into `engine`, and the checkpoint's progress into `state`.
    """
    # ---- data: prepared once, then memory-mapped; sample i is a function of the seed and i
    if start_from is not None and config.data.tokenizer.path is None:
        trained_with = start_from.parent.parent / "tokenizer"
        if trained_with.is_dir():
            config.data.tokenizer.path = str(trained_with)  # or another corpus would mean another tokenizer
    prepared = prepare_data(config, engine, say)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    check_vocabulary(config, tokenizer, prepared, say)
    batches = Batches(prepared.train, order_of(config, prepared), config.data.sequence_length)
    data_fingerprint = {name: file.fingerprint() for name, file in prepared.train.items()}
    vocabulary = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    )
    data_fingerprint[resume.TOKENIZER] = hashlib.sha256(vocabulary.encode()).hexdigest()

    # ---- model
    torch.manual_seed(config.run.seed)
    with engine.building():
        model = granite.build(config, engine.device)
    rows = mup.table(config)
    engine.prepare(LanguageModelLoss(model), rows)
    if start_from is None and config.run.init_from is not None:
        engine.load(init_from.reader(config.run.init_from, engine.shapes))
    elif start_from is None:
        engine.load(mup.initial_values(engine.shapes, rows, config.run.seed))
    moe = config.model.model_type == "granitemoe"
    balance = Balance(
        config.balance,
        config.model.num_hidden_layers if moe else 0,
        config.model.num_local_experts if moe else 0,
        engine.reduce,
    )
    if unlike := mup.unlike_the_law(config):
        say(
            f"Warning: the law of this schedule belongs to another parametrisation ({'; '.join(unlike)}), and the best "
            "rate may be another one here."
        )
    counts = count_parameters(engine.shapes, config)
    say(
        f"{type(model).__name__}: {counts['total']:,} parameters, {counts['active']:,} active besides the embedding, "
        f"m_width {mup.width_multiplier(config):g}, {config.precision}, {engine.kind} on {engine.world_size} × "
        f"{engine.device.type}, {', '.join(granite.kernels(config, engine.device))}"
    )

    # ---- progress
    if start_from is not None:
        resume.check_fingerprints(start_from, data_fingerprint)
        checkpoint.load(start_from, engine, state, balance)
        say(f"Going on from {start_from}: step {state.step:,}, {human(state.tokens)} tokens.")
        kind, ranks = checkpoint.trained_by(start_from)
        if (kind, ranks) != (engine.kind, engine.world_size):
            say(f"It was trained as {kind} on {ranks} rank(s); it goes on as {engine.kind} on {engine.world_size}.")
    validation = Validation(config, prepared.validation, tokenizer)
    return Parts(batches, balance, validation, prepared.train, tokenizer, data_fingerprint, counts)


def where_to_begin(config: Config) -> tuple[Path | None, dict[str, list[Any]], int]:
    """The checkpoint to go on from, the settings that have changed since, and the tokens seen until then.

    What an interrupted save left is removed, and what is not valid is put aside.

    Raises:
        ConfigError: there is none that is valid, a changed setting affects what is already trained, or something
            else is in the way.
    """
    environment.check_no_secrets(config)
    check_target(config.run_folder / "model")
    checkpoints, wanted = config.run_folder / "checkpoints", config.run.resume
    chosen = None
    if wanted == "never":
        if checkpoint.available(checkpoints):
            raise ConfigError(
                f"run.resume=never, but {config.run_folder} holds checkpoints of an earlier run. Choose another "
                "run.name, or move that folder away."
            )
    elif wanted == "auto" or Path(wanted).resolve().parent != checkpoints.resolve():
        chosen = checkpoint.newest_valid(checkpoints)
        if chosen is None and wanted != "auto":  # the beginning of a branch off another run
            chosen = checkpoint.verified(Path(wanted))
        elif wanted != "auto" and environment.parent(config.run_folder / "run.json") != Path(wanted).resolve():
            raise ConfigError(
                f"{config.run_folder} has checkpoints of its own and did not begin from run.resume={wanted}. To branch "
                "off that one choose another run.name; to go on with this run leave run.resume out."
            )
    else:
        chosen = checkpoint.verified(Path(wanted))
        if newer := [path for path in checkpoint.available(checkpoints) if path.name > chosen.name]:
            raise ConfigError(
                f"{config.run_folder} has gone further than run.resume={wanted}: it holds {newer[-1].name}. Move the "
                "newer checkpoints away to go on from there, or choose another run.name to branch off."
            )
    saved = config.run_folder / checkpoint.SAVED
    if wanted != "never" and saved.exists() and not checkpoint.available(checkpoints):
        step = saved.read_text(encoding="utf-8").strip()
        raise ConfigError(
            f"{config.run_folder} had saved step {step}, but there is no checkpoint in "
            f"{checkpoints}. Bring them back to go on; to begin again choose another run.name, or run.resume=never."
        )
    checkpoint.clean(checkpoints)
    checkpoint.set_aside(checkpoints, chosen if chosen and chosen.parent == checkpoints else None)
    if chosen is None:
        return None, {}, config.run.tokens_seen
    return chosen, resume.changes(chosen, config), checkpoint.load_state(chosen).tokens


def prepare_data(config: Config, engine: Engine, say: Say) -> Prepared:
    """Tokenised corpora, made by the first rank when they are not in the cache yet."""
    if not config.data.corpora:
        raise ConfigError(
            "There is nothing to train on: data.corpora is empty. Add data=stdlib, or describe your own corpora "
            "in a file configs/data/NAME.yaml."
        )
    # Ranks of another machine, without this one's cache, would have as many processes each.
    workers = (config.data.workers or environment.available_cores()) if engine.is_main else 1

    def prepared_data() -> Prepared:
        progress = progress_lines(say)
        return prepare(config.data.corpora, config.data.tokenizer, config.data.cache_dir, progress, workers)

    first: list[Prepared] = []
    engine.first_rank_decides(lambda: first.append(prepared_data()))
    prepared = first[0] if first else prepared_data()  # from the cache; on a machine with one of its own not yet
    if prepared.tokenizer_folder is None:
        raise ConfigError(
            "All corpora are token files, which do not say how they were made: name the tokenizer, a folder or a "
            "Hugging Face name, in data.tokenizer.path."
        )
    return prepared


def check_vocabulary(config: Config, tokenizer: Any, prepared: Prepared, say: Say) -> None:
    """There is a tokenizer, and every token id has a row in the embedding."""
    used = rows_needed(tokenizer)
    if used > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer in {prepared.tokenizer_folder} has {used} tokens and model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size to {used} or more."
        )
    if padding := config.model.vocab_size - used:
        size = config.model.vocab_size
        say(f"vocab_size {size:,}, of which the tokenizer uses {used:,}: {padding:,} rows are padding")
    cache = Path(expand(config.data.cache_dir))
    for files in (prepared.train, prepared.validation):
        for name, file in files.items():
            if name in prepared.folders:
                continue  # made by this very tokenizer
            # Reading a whole corpus at every start would make a start as long as the corpus is large.
            checked = cache / f"{name}-{file.fingerprint()[:12]}-within-{config.model.vocab_size}"
            if not checked.exists():
                file.check(config.model.vocab_size)
                checked.touch()


def order_of(config: Config, prepared: Prepared) -> Order:
    """The order of samples: the mixture, then the stages that replace it, at sample numbers."""
    length = config.data.sequence_length
    windows = {name: num_windows(file.num_tokens, length, name) for name, file in prepared.train.items()}
    stages = tuple(Stage(start, mixture) for start, mixture in config.stages())
    return Order(config.run.seed, stages, windows)


def say_result(
    config: Config,
    folder: Path,
    parts: Parts,
    lines: list[dict[str, Any]],
    picture: Path,
    difference: float,
    say: Say,
) -> None:
    """The last words of a run: how good, a sample, and where everything is."""
    if lines:
        unigram, last = parts.validation.unigram(parts.train_files), lines[-1]
        say(
            f"\nvalidation loss {last['loss']:.4f} nats a token, {last['bits_per_byte']:.4f} bits a byte "
            f"({last['targets']:,} targets)\n"
            f"unigram model   {unigram['loss']:.4f} nats a token, {unigram['bits_per_byte']:.4f} bits a byte"
        )
    if config.sample_prompt:
        say(f"\n{generate(folder / 'model', config.sample_prompt, 64, seed=config.run.seed)}\n")
    checkpoints = checkpoint.available(folder / "checkpoints")
    say(
        f"checkpoint  {checkpoints[-1]}\n"
        f"model       {folder / 'model'} (logits within {difference:.1e} of the trainer's)\n"
        f"metrics     {folder / 'metrics.jsonl'}\n"
        f"report      {picture}"
    )


@contextlib.contextmanager
def leaving_exit_json(folder: Path, engine: Engine, state: State) -> Iterator[dict[str, Any]]:
    """Write exit.json {code, reason, step}: launchers flatten a rank's exit status, so it is also written down."""
    ended: dict[str, Any] = {}
    try:
        yield ended
    except BaseException as error:
        code = environment.status_of(error)
        ended |= {"code": code, "reason": f"{type(error).__name__}: {error}", "step": state.step}
        if code > 128:
            ended["reason"] = f"{signal.Signals(code - 128).name}, when no step was under way"
        raise
    finally:
        if engine.is_main:
            try:
                environment.replace_text(folder / "exit.json", json.dumps(environment.without_secrets(ended)) + "\n")
            except OSError as error:
                print(f"powertrain: exit.json cannot be written: {error}", file=sys.stderr)
