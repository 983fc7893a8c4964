"""What a run is, top to bottom. Read this first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from powertrain.data import DataError, expand
from powertrain.data.loader import Batches, num_windows
from powertrain.data.order import Order, Stage
from powertrain.data.prepare import Prepared, fingerprint, prepare, rows_needed, skipped_records
from powertrain.data.tokenizer import load_tokenizer, save_tokenizer
from powertrain.data.tokens import TokenFile
from powertrain.train import checkpoint, environment, init_from, report, resume
from powertrain.train.balance import Balance
from powertrain.train.config import Config, ConfigError, Diverged, RunFailed, batch_doubts, check_batch, doubts
from powertrain.train.console import Progressing, human, progress_lines
from powertrain.train.engine import Engine
from powertrain.train.evaluate import Validation
from powertrain.train.export import check_target, export, facts_of, generate, in_units, in_working_precision, loss_text
from powertrain.train.loop import Stop, train_loop
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.metrics import count_parameters, flops_per_token, peak_flops
from powertrain.train.model import granite, mup
from powertrain.train.state import State
from powertrain.train.track import Tracker
from powertrain.train.watchdog import Watchdog

Say = Callable[[str], None]


@dataclass
class Outcome:
    """How a run ended: `reason` is "finished", or why it stopped before."""

    reason: str
    step: int


SHORT_PREPARATION = 2.0  # seconds; one that takes no longer is finished, and a step saved, whoever asks to stop


class StoppedEarly(Exception):
    """The file `stop` came while the corpora were prepared."""


def train(config: Config, command: list[str]) -> Outcome:
    """Train as configured, from the beginning or from the newest checkpoint of the run's folder.

    Raises:
        ConfigError, data.DataError: something the user can mend.
    """
    engine, state = Engine(config), State(tokens=config.run.tokens_seen)
    folder = config.run_folder
    with (
        environment.claimed(folder, engine) as check_ours,
        leaving_exit_json(folder, engine, state, check_ours) as ended,
    ):
        try:
            outcome = _train(config, engine, state, command, check_ours)
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


def _train(config: Config, engine: Engine, state: State, command: list[str], check_ours: Callable[[], None]) -> Outcome:
    folder = config.run_folder
    checkpoints = folder / "checkpoints"

    # ---- where to begin
    start_from, changes, tokens = engine.first_rank_decides(lambda: where_to_begin(config, engine.world_size))
    engine.first_rank_decides(lambda: check_batch(config, engine.world_size, tokens - config.run.tokens_seen))
    benchmarks = None
    if config.evaluation.tasks:
        from powertrain.train.tasks import Benchmarks  # with lm-eval, which takes seconds and may not be installed

        benchmarks = Benchmarks(config, engine)

    with Progressing(config, engine, state) as progress:
        say = progress.say
        try:
            parts = assemble(config, engine, state, start_from, say)
        except StoppedEarly:
            stopped_by = "the file 'stop' in the run folder"
            say(f"\nStopped by {stopped_by} while the corpora were prepared. The same command goes on from there.")
            return Outcome(stopped_by, state.step)
        engine.first_rank_decides(check_ours)  # hours may have gone by
        if engine.is_main:
            # Only now: what cannot begin leaves no trace in the records of what has run.
            if start_from is None or not (folder / "tokenizer").exists():
                environment.replace_folder(folder / "tokenizer", lambda to: save_tokenizer(parts.tokenizer, to))
            (folder / "exit.json").unlink(missing_ok=True)
            environment.replace_text(folder / "config.yaml", environment.settings_text(config))
            environment.write(folder / "run.json", engine, command, start_from, changes, parts.counts, parts.data, say)
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
            said = [f"validation loss {of_each_corpus(lines)}"] if lines else []
            for line in scores:
                said += [
                    f"{line['corpus']} {metric} {line[metric]:.4f}" for metric in ("acc", "acc_norm") if metric in line
                ]
            if said:
                say(f"step {state.step:,}: {', '.join(said)}")
            return lines

        def save() -> None:
            with watchdog.paused():  # a disk may be slow
                engine.first_rank_decides(check_ours)
                saver.save(state, parts.balance)

        def finish_saving() -> None:
            with watchdog.paused():
                saver.finish()

        with watchdog:
            with Stop(folder, engine, check_ours) as stop:
                recorded = engine.first_rank_decides(lambda: tracker.evaluations(state.step)) if own else []
                over = state.tokens >= config.end_tokens
                evaluated = over and recorded and not any(name.startswith("evaluation.") for name in changes)
                if evaluated:
                    say("The run had finished: nothing is trained or evaluated again.")
                due = config.evaluation.every and state.step % config.evaluation.every == 0
                # What training begins with, or an evaluation that the stop had come before.
                if due and (start_from is None or (own and not recorded and not over)):
                    evaluate()
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
                if evaluated:
                    lines = [line for line in recorded if "bits_per_byte" in line]
                else:
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
    engine.first_rank_decides(check_ours)
    if engine.is_main:
        facts = facts_of(state, lines)
        if not (folder / "tokenizer").is_dir():  # somebody has removed it
            environment.replace_folder(folder / "tokenizer", lambda to: save_tokenizer(parts.tokenizer, to))
        difference = export(config, weights, logits, probe, folder / "tokenizer", folder / "model", facts)
        picture = folder / "report.html"
        try:
            environment.replace_text(picture, report.runs_page([folder]))
        except Exception as error:  # whatever it is, the model is more than its picture
            say(f"Warning: {picture} could not be drawn: {type(error).__name__}: {error}")
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
    data: dict[str, Any]


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
    assert prepared.tokenizer_folder is not None
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    check_vocabulary(config, tokenizer, prepared, say)
    batches = Batches(prepared.train, order_of(config, prepared), config.data.sequence_length)
    data_fingerprint = dict(prepared.fingerprints)
    data_fingerprint[resume.TOKENIZER] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    # ---- model
    torch.manual_seed(config.run.seed)
    with engine.building():
        model = granite.build(config, engine.device)
    rows = mup.table(config)
    engine.prepare(LanguageModelLoss(model), rows)
    if start_from is None and config.run.init_from is not None:
        say(f"Weights, sizes and multipliers are those of {config.run.init_from}, whatever the experiment says.")
        engine.load(init_from.reader(config.run.init_from, engine.shapes))
    elif start_from is None:
        engine.load(mup.initial_values(engine.shapes, rows, config.run.seed))
    seed_rank(config.run.seed, engine.rank, 0 if start_from is None else checkpoint.step_of(start_from))
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
    for doubt in (*doubts(config), *batch_doubts(config)):
        say(f"Warning: {doubt}")
    counts = count_parameters(engine.shapes, config)
    say(
        f"{type(model).__name__}: {counts['total']:,} parameters, {counts['active']:,} active besides the embedding, "
        f"m_width {mup.width_multiplier(config):g}, {config.precision}, {engine.kind} on {engine.world_size} × "
        f"{engine.device.type}, {', '.join(granite.kernels(config, engine.device))}"
    )

    # ---- progress
    if start_from is not None:
        resume.check_fingerprints(start_from, data_fingerprint, prepared.train)
        checkpoint.load(start_from, engine, state, balance)
        say(f"Going on from {start_from}: step {state.step:,}, {human(state.tokens)} tokens.")
        kind, ranks = checkpoint.trained_by(start_from)
        if (kind, ranks) != (engine.kind, engine.world_size):
            say(f"It was trained as {kind} on {ranks} rank(s); it goes on as {engine.kind} on {engine.world_size}.")
        if why := resume.other_losses(start_from, config, engine.world_size):
            say(f"Warning: {why}")
    validation = Validation(config, prepared, tokenizer)
    data = say_data(config, prepared, validation, say)
    return Parts(batches, balance, validation, prepared.train, tokenizer, data_fingerprint, counts, data)


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Let every rank draw a dropout of its own, once the model is the same on all. The first goes on with `seed`, as a
    single process does. A rank that a checkpoint knows goes on with the state it has there; a new one begins here."""
    if rank:
        key = hashlib.blake2b(f"{seed}/rank {rank}/step {step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(key, "little") >> 1)


def where_to_begin(config: Config, ranks: int) -> tuple[Path | None, dict[str, list[Any]], int]:
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
        step = saved.read_text(encoding="utf-8", errors="replace").strip()
        raise ConfigError(
            f"{config.run_folder} had saved step {step}, but there is no checkpoint in "
            f"{checkpoints}. Bring them back to go on; to begin again choose another run.name, or run.resume=never."
        )
    checkpoint.clean(checkpoints)
    checkpoint.set_aside(checkpoints, chosen if chosen and chosen.parent == checkpoints else None)
    if chosen is None:
        return None, {}, config.run.tokens_seen
    return chosen, resume.changes(chosen, config, ranks), checkpoint.load_state(chosen).tokens


def prepare_data(config: Config, engine: Engine, say: Say) -> Prepared:
    """Tokenised corpora, made by the first rank when they are not in the cache yet.

    Raises:
        StoppedEarly: on all ranks, when the file `stop` comes to the run's folder meanwhile.
    """
    if not config.data.corpora:
        raise ConfigError(
            "There is nothing to train on: data.corpora is empty. Add data=stdlib, or describe your own corpora "
            "in a file configs/data/NAME.yaml."
        )
    # Ranks of another machine, without this one's cache, would have as many processes each.
    workers = (config.data.workers or environment.available_cores()) if engine.is_main else 1

    shown = progress_lines(say)

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


def check_vocabulary(config: Config, tokenizer: Any, prepared: Prepared, say: Say) -> None:
    """There is a tokenizer, and every token id has a row in the embedding."""
    used = rows_needed(tokenizer)
    if used > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer in {prepared.tokenizer_folder} has {used} tokens and model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size to {used} or more."
        )
    if added := tokenizer.num_special_tokens_to_add():
        say(
            f"The tokenizer itself adds {added} special token(s) to a text. Training text has none of them, but "
            f"{tokenizer.eos_token} after each document."
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
            checked = cache / f"{name}-{fingerprint(file, cache)[:12]}-within-{config.model.vocab_size}"
            if not checked.exists():
                file.check(config.model.vocab_size)
                checked.touch()


def say_data(config: Config, prepared: Prepared, validation: Validation, say: Say) -> dict[str, Any]:
    """Say what of the corpora is not trained on and not evaluated; the record of it, by corpus, for run.json."""
    record: dict[str, Any] = {}
    for name, file in prepared.train.items():
        record[name] = {"documents": file.num_documents, "tokens": file.num_tokens}
        if name in prepared.folders:
            record[name]["skipped"], sentence, many = skipped_records(name, prepared.folders[name])
            if sentence:
                say(f"Warning: {sentence}" if many else sentence)
        if name in validation.problems:
            record[name]["evaluation"] = validation.problems[name]
            if name in prepared.validation:
                what = "has" if name in validation.corpora else "is not evaluated:"
                say(f"Warning: {name} {what} {validation.problems[name]}.")
    if not validation.corpora:
        asked = f"evaluation.every is {config.evaluation.every}, but " if config.evaluation.every else ""
        say(
            f"Warning: {asked}no corpus has a validation split that a window fits in, so there will be no validation "
            "loss. Give one a validation_fraction or a validation_path."
        )
    elif without := [name for name in record if name not in prepared.validation]:
        say(f"No validation split, so not evaluated: {', '.join(without)}.")
    return record


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
        unigram = parts.validation.unigram(parts.train_files)
        corpora = "".join(f"{line['corpus']:<15} {loss_text(line)}\n" for line in lines[:-1] if len(lines) > 2)
        say(f"\nvalidation loss {loss_text(lines[-1])}\n{corpora}unigram model   {in_units(unigram)}")
    if config.sample_prompt:
        say(f"\n{generate(folder / 'model', config.sample_prompt, 64, seed=config.run.seed)}\n")
    checkpoints = checkpoint.available(folder / "checkpoints")
    say(
        f"checkpoint  {checkpoints[-1]}\n"
        f"model       {folder / 'model'} (logits within {difference:.1e} of the trainer's)\n"
        f"metrics     {folder / 'metrics.jsonl'}\n"
        f"report      {picture}"
    )


def of_each_corpus(lines: list[dict[str, Any]]) -> str:
    """The losses of an evaluation, as `4.8120 overall (addresses 5.3440, code 4.2810)`; one number of a single corpus.

    Args:
        lines: as `Validation.evaluate` returns them, `overall` last.
    """
    *corpora, overall = lines
    if len(corpora) == 1:
        return f"{overall['loss']:.4f}"
    each = ", ".join(f"{line['corpus']} {line['loss']:.4f}" for line in corpora)
    return f"{overall['loss']:.4f} overall ({each})"


@contextlib.contextmanager
def leaving_exit_json(
    folder: Path, engine: Engine, state: State, check_ours: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Write exit.json {code, reason, step}: launchers flatten a rank's exit status, so it is also written down."""
    ended: dict[str, Any] = {}
    before = environment.read_record(folder / "exit.json").get("step")  # where the run is, though this start is refused
    try:
        yield ended
    except BaseException as error:
        code = environment.status_of(error)
        step = state.step or (before if type(before) is int else 0)
        ended |= {"code": code, "reason": f"{type(error).__name__}: {error}", "step": step}
        if code > 128:
            ended["reason"] = f"{signal.Signals(code - 128).name}, when no step was under way"
        raise
    finally:
        if engine.is_main:
            try:
                check_ours()
                environment.replace_text(folder / "exit.json", json.dumps(environment.without_secrets(ended)) + "\n")
            except (OSError, ConfigError) as error:
                if str(error) not in str(ended.get("reason")):  # which will be said
                    print(f"powertrain: exit.json cannot be written: {error}", file=sys.stderr)
