"""A run from top to bottom. Read this first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powertrain.data import DataError
from powertrain.data.files import replace_folder, replace_text
from powertrain.data.tokenizer import save_tokenizer
from powertrain.train import checkpoint, report
from powertrain.train.assemble import Log, Parts, StoppedEarly, assemble
from powertrain.train.check import check_batch
from powertrain.train.config import Config
from powertrain.train.console import Progressing
from powertrain.train.engine import Engine
from powertrain.train.errors import ConfigError, Diverged, RunFailed
from powertrain.train.export import check_target, export, facts_of, generate, in_units, in_working_precision, loss_text
from powertrain.train.folder import claimed, leaving_exit_json, record_start
from powertrain.train.metrics import flops_per_token, peak_flops
from powertrain.train.redact import check_no_secrets
from powertrain.train.resume import where_to_begin
from powertrain.train.state import AVERAGE, RAW, Beginning, State
from powertrain.train.step import train_step
from powertrain.train.stop import BY_FILE, Stop
from powertrain.train.track import Tracker, weights_of
from powertrain.train.watchdog import Watchdog

if TYPE_CHECKING:
    from torch import Tensor

    from powertrain.train.tasks import Benchmarks  # imports lm-eval, which may not be installed

MAX_SKIPPED_IN_A_ROW = 10  # steps without a finite gradient


@dataclass
class Outcome:
    """How a run ended: `reason` is "finished", or why it stopped early."""

    reason: str
    step: int


def train(config: Config, command: list[str]) -> Outcome:
    """Train as configured, from the beginning or from a checkpoint (`run.resume`).

    Args:
        command: what the run was started with, for run.json.

    Raises:
        ConfigError, data.DataError: something the user can mend.
        RunFailed: another rank is gone, the gradients are no longer finite (Diverged), or a disk is full.
    """
    engine, state = Engine(config), State(tokens=config.run.tokens_seen)
    folder = config.run_folder
    with (
        claimed(folder, engine) as check_claim,
        leaving_exit_json(folder, engine, state, check_claim) as ended,
    ):
        try:
            outcome = _train(config, engine, state, command, check_claim)
        except (ConfigError, DataError) as error:
            if engine.world_size > 1 and error is not engine.first_rank_error:
                error.add_note(f"rank {engine.rank}:")  # the others may not have it
            raise
        except RuntimeError as error:
            if not engine.lost_a_rank(error):
                raise
            raise RunFailed(
                f"Another rank is gone; this one had come to step {state.step}. What ended it is in its own last lines "
                "or its machine's log. The same command resumes from the newest checkpoint."
            ) from error
        ended |= {"code": 0, "reason": outcome.reason, "step": outcome.step}
        return outcome


def _train(
    config: Config, engine: Engine, state: State, command: list[str], check_claim: Callable[[], None]
) -> Outcome:
    folder = config.run_folder
    checkpoints = folder / "checkpoints"

    # ---- where to begin; until that is known, nothing on disk is changed
    engine.first_rank_decides(lambda: check_no_secrets(config))
    if config.run.export:
        engine.first_rank_decides(lambda: check_target(folder / "model"))
        if config.average.window is not None:
            engine.first_rank_decides(lambda: check_target(folder / "model-average"))
    begin: Beginning = engine.first_rank_decides(lambda: where_to_begin(config, engine.world_size))
    engine.first_rank_decides(lambda: check_batch(config, engine.world_size, begin.tokens))
    engine.first_rank_decides(lambda: checkpoint.tidy(checkpoints, begin.checkpoint))
    benchmarks = None
    if config.evaluation.tasks:
        from powertrain.train.tasks import Benchmarks  # with lm-eval, which takes seconds and may not be installed

        benchmarks = Benchmarks(config, engine)

    with Progressing(config, engine, state) as progress:
        log = progress.log

        # ---- data, model, optimizer, and the checkpoint's progress
        try:
            parts = assemble(config, engine, state, begin.checkpoint, log)
        except StoppedEarly:
            log(f"\nStopped by {BY_FILE} while the corpora were prepared. The same command continues from there.")
            return Outcome(BY_FILE, state.step)
        engine.first_rank_decides(check_claim)  # hours may have gone by
        saver = checkpoint.Saver(checkpoints, engine, parts.average, parts.data_fingerprint, check_claim, log)
        if engine.is_main:
            # Only now: a start that is refused leaves no trace in the run's records.
            if begin.checkpoint is None or not (folder / "tokenizer").exists():
                replace_folder(folder / "tokenizer", lambda to: save_tokenizer(parts.tokenizer, to))
            (folder / "exit.json").unlink(missing_ok=True)
            replace_text(folder / "config.yaml", saver.settings)
            record_start(folder / "run.json", engine, command, begin, parts.counts, parts.data, log)
        tracker = Tracker(folder, config, engine, state, log)
        if begin.own:
            saver.saved_step = state.step
        flops, peak = flops_per_token(config, parts.counts), peak_flops(engine.device)

        # ---- the loop: a step; an evaluation and a checkpoint when due; until the budget is used or a stop requested
        with Watchdog(folder, engine, state) as watchdog:
            with Stop(folder, engine, check_claim) as stop:
                recorded = engine.first_rank_decides(lambda: tracker.evaluations(state.step)) if begin.own else []
                if parts.average is not None and AVERAGE not in map(weights_of, recorded):
                    recorded = []  # a stop came between the two, or it begins here
                over = state.tokens >= config.end_tokens
                evaluated = over and recorded and not any(name.startswith("evaluation.") for name in begin.changes)
                if evaluated:
                    log("The run had finished: nothing is trained or evaluated again.")
                # Before the first step, or at a checkpoint where the run stopped before its evaluation.
                first = begin.checkpoint is None or (begin.own and not recorded and not over)
                if first and is_due(config.evaluation.every, state):
                    evaluate(parts, benchmarks, engine, state, tracker, watchdog, log)
                reason = None
                while state.tokens < config.end_tokens:
                    record = train_step(
                        config, engine, parts.schedule, parts.batches, parts.balance, state, parts.average
                    )
                    per_device = flops * record["tokens_per_second"] / engine.world_size
                    record["mfu"] = per_device / peak if peak else None
                    watchdog.alive()
                    tracker.step(record)
                    progress.step(record, state)
                    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:  # on all ranks
                        with watchdog.paused():
                            saver.finish()
                        raise Diverged(
                            f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, had a gradient that is "
                            "not finite; the weights are as they were before the first of them. Lower the learning "
                            "rate, or look at the data there."
                        )
                    if (reason := stop.reason()) is not None or state.tokens >= config.end_tokens:
                        break
                    if is_due(config.evaluation.every, state):
                        evaluate(parts, benchmarks, engine, state, tracker, watchdog, log)
                    if is_due(config.checkpoint.every, state):
                        with watchdog.paused():  # a disk may be slow
                            saver.save(state, parts.balance)
                with watchdog.paused():
                    if saver.saved_step != state.step:
                        saver.save(state, parts.balance)
                    saver.finish()
                lines = [line for line in recorded if "bits_per_byte" in line]
                if reason is None and not evaluated:
                    lines = evaluate(parts, benchmarks, engine, state, tracker, watchdog, log)
            if reason is None and config.run.export:
                probe = parts.batches.batch(0, 1)["input_ids"]
                model = weights_and_logits(config, engine, probe)
                if parts.average is not None:
                    with parts.average.in_place():
                        average_model = weights_and_logits(config, engine, probe)
        tracker.close()
        if reason is not None:
            log(
                f"\nStopped by {reason} at step {state.step:,}, saved in {folder}. The same command resumes from there."
            )
            return Outcome(reason, state.step)

    # ---- final artifacts
    if not config.run.export:
        log(
            "run.export is false, so the run ends without its model and report. `powertrain export` and `powertrain "
            f"report` write them from {folder}."
            + (" The model/ in it is an earlier export." if (folder / "model").exists() else "")
        )
        return Outcome("finished", state.step)
    engine.first_rank_decides(check_claim)
    if engine.is_main:
        if not (folder / "tokenizer").is_dir():  # removed meanwhile
            replace_folder(folder / "tokenizer", lambda to: save_tokenizer(parts.tokenizer, to))
        facts = facts_of(state, lines)
        difference = export(config, *model, probe, folder / "tokenizer", folder / "model", facts)
        if parts.average is not None:
            facts = facts_of(state, lines, parts.average.window)
            export(config, *average_model, probe, folder / "tokenizer", folder / "model-average", facts)
        page = folder / "report.html"
        try:
            replace_text(page, report.runs_page([folder]))
        except Exception as error:  # whatever it is, the model matters more than its report
            log(f"Warning: {page} could not be drawn: {type(error).__name__}: {error}")
        log_result(config, parts, [line for line in lines if weights_of(line) == RAW], difference, log)
    return Outcome("finished", state.step)


def evaluate(
    parts: Parts,
    benchmarks: Benchmarks | None,
    engine: Engine,
    state: State,
    tracker: Tracker,
    watchdog: Watchdog,
    log: Log,
) -> list[dict[str, Any]]:
    """Validation losses and benchmarks of the weights, and of their running average, logged and tracked. Collective.

    Returns:
        The lines of the losses.
    """
    lines = []
    for weights in (RAW,) if parts.average is None else (RAW, AVERAGE):
        with contextlib.nullcontext() if parts.average is None or weights == RAW else parts.average.in_place():
            losses, scores = parts.validation.evaluate(engine, state), []
            watchdog.alive()
            if benchmarks is not None:
                with watchdog.paused():  # thousands of forward passes
                    scores = benchmarks.evaluate(parts.tokenizer, state)
        losses, scores = ([{**line, "weights": weights} for line in each] for each in (losses, scores))
        for line in (*losses, *scores):
            tracker.evaluation(line)
        if losses or scores:
            log(f"step {state.step:,}{', average' if weights == AVERAGE else ''}: {summary(losses, scores)}")
        lines += losses
    return lines


def weights_and_logits(config: Config, engine: Engine, probe: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What `export` takes: the weights, on the first rank alone, and the logits of `probe`. Collective."""
    logits = engine.logits(probe)
    whole = engine.full_parameters()
    return {name: in_working_precision(config, tensor) for name, tensor in whole if engine.is_main}, logits


def is_due(every: int, state: State) -> bool:
    """Whether what happens every `every` steps (0: at the end only) is due at this step."""
    return every > 0 and state.step % every == 0


def summary(lines: list[dict[str, Any]], scores: list[dict[str, Any]]) -> str:
    """An evaluation in one line: `validation loss 4.8120 overall (addresses 5.3440, code 4.2810), piqa acc 0.5000`.

    Args:
        lines: as `Validation.evaluate` returns them, `overall` last; of a single corpus one number is shown.
        scores: as `Benchmarks.evaluate` returns them.
    """
    parts = []
    if lines:
        *corpora, overall = lines
        each = ", ".join(f"{line['corpus']} {line['loss']:.4f}" for line in corpora)
        parts.append(f"validation loss {overall['loss']:.4f}" + f" overall ({each})" * (len(corpora) > 1))
    for line in scores:
        parts += [f"{line['corpus']} {metric} {line[metric]:.4f}" for metric in ("acc", "acc_norm") if metric in line]
    return ", ".join(parts)


def log_result(config: Config, parts: Parts, lines: list[dict[str, Any]], difference: float, log: Log) -> None:
    """Log a run's result: losses, a generated sample, and where its artifacts are."""
    folder = config.run_folder
    if lines:
        unigram = parts.validation.unigram(parts.train_files)
        corpora = "".join(f"{line['corpus']:<15} {loss_text(line)}\n" for line in lines[:-1] if len(lines) > 2)
        log(f"\nvalidation loss {loss_text(lines[-1])}\n{corpora}unigram model   {in_units(unigram)}")
    if config.sample_prompt:
        log(f"\n{generate(folder / 'model', config.sample_prompt, 64, seed=config.run.seed)}\n")
    log(
        f"checkpoint  {checkpoint.available(folder / 'checkpoints')[-1]}\n"
        f"model       {folder / 'model'} (logits within {difference:.1e} of the trainer's)\n"
        + f"average     {folder / 'model-average'}\n"
        * (parts.average is not None)
        + f"metrics     {folder / 'metrics.jsonl'}\n"
        f"report      {folder / 'report.html'}"
    )
