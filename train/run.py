"""What a run is, top to bottom. Read this first."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from data.loader import Batches, num_windows
from data.order import Order, Stage
from data.prepare import Prepared, prepare
from train import checkpoint, environment, report
from train.balance import Balance
from train.config import Config, ConfigError, as_dict, check_batch
from train.console import Progressing, human
from train.engine import Engine
from train.evaluate import Validation
from train.export import export, generate
from train.loop import Stop, train_loop
from train.loss import LanguageModelLoss
from train.metrics import count_parameters, flops_per_token, peak_flops
from train.model import granite, mup
from train.state import State
from train.track import Tracker


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
    engine = Engine(config)
    try:
        return _train(config, engine, command)
    finally:
        engine.close()


def _train(config: Config, engine: Engine, command: list[str]) -> Outcome:
    check_batch(config, engine.world_size)
    schedule = config.make_schedule()
    folder = config.run_folder
    checkpoints = folder / "checkpoints"
    state = State(tokens=config.run.tokens_seen)

    # ---- where to begin
    start_from = choose_checkpoint(config, engine)
    if engine.is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(checkpoints)
        (folder / "stop").unlink(missing_ok=True)
        (folder / "exit.json").unlink(missing_ok=True)
        OmegaConf.save(as_dict(config), folder / "config.yaml")
        environment.write(folder / "run.json", engine, command)

    # ---- data: prepared once, then memory-mapped; sample i is a function of the seed and i
    torch.manual_seed(config.run.seed)
    with Progressing(config, engine, state) as progress:
        say = progress.say
        prepared = prepare_data(config, engine, say)
        tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
        check_vocabulary(config, tokenizer, prepared)
        if engine.is_main:
            tokenizer.save_pretrained(folder / "tokenizer")
        batches = Batches(prepared.train, order_of(config, prepared), config.data.sequence_length)
        validation = Validation(config, prepared.validation, tokenizer)

        # ---- model
        model = granite.build(config, engine.device)
        rows = mup.table(config)
        mup.initialize(model.named_parameters(), rows, config.run.seed)
        engine.prepare(LanguageModelLoss(model), rows)
        moe = config.model.model_type == "granitemoe"
        balance = Balance(
            config.balance,
            config.model.num_hidden_layers if moe else 0,
            config.model.num_local_experts if moe else 0,
            engine.reduce,
        )
        counts = count_parameters(model.named_parameters(), config)
        flops, peak = flops_per_token(config, counts), peak_flops(engine.device)
        say(
            f"{type(model).__name__}: {counts['total']:,} parameters, {counts['active']:,} active besides the "
            f"embedding, m_width {mup.width_multiplier(config):g}, {config.precision} on {engine.world_size} × "
            f"{engine.device.type}"
        )
        if start_from is not None:
            checkpoint.load(start_from, engine, state, balance)
            say(f"Going on from {start_from}: step {state.step:,}, {human(state.tokens)} tokens.")

        # ---- train
        tracker = Tracker(folder, config, engine)

        def on_step(record: dict[str, Any]) -> None:
            per_device = flops * record["tokens_per_second"] / engine.world_size
            record["mfu"] = per_device / peak if peak else None
            tracker.step(record)
            progress.step(record, state)

        def evaluate() -> list[dict[str, Any]]:
            lines = validation.evaluate(engine, state)
            for line in lines:
                tracker.evaluation(line)
            if lines:
                say(f"step {state.step:,}: validation loss {lines[-1]['loss']:.4f}")
            return lines

        def save() -> None:
            began = time.perf_counter()
            written = checkpoint.save(checkpoints, engine, state, balance, config.checkpoint.keep)
            say(f"Saved {written} (training stood still for {time.perf_counter() - began:.1f} s).")

        with Stop(folder, engine) as stop:
            reason = train_loop(config, engine, batches, schedule, balance, state, stop, on_step, evaluate, save)
            if not (checkpoints / f"step-{state.step:08d}").exists():
                save()
        if reason is not None:
            say(f"\nStopped by {reason} at step {state.step:,}. The same command goes on from here.")
            tracker.close()
            return Outcome(reason, state.step)
        lines = evaluate()
        tracker.close()

    # ---- what is left to the user
    if engine.is_main:
        picture = report.plot(folder)
        facts: dict[str, Any] = {"tokens": f"{state.tokens:,}", "steps": f"{state.step:,}"}
        if lines:
            facts |= {
                "validation loss": f"{lines[-1]['loss']:.4f} nats a token",
                "bits per byte": f"{lines[-1]['bits_per_byte']:.4f}",
            }
        probe = batches.batch(0, 1)["input_ids"]
        difference = export(model, config, folder / "tokenizer", folder / "model", probe, facts)
        say_result(config, folder, prepared, validation, lines, picture, difference, say)
    engine.barrier()
    return Outcome("finished", state.step)


def choose_checkpoint(config: Config, engine: Engine) -> Path | None:
    """The checkpoint to go on from, decided by the first rank for all."""
    decision: list[Any] = [None, None]  # path, error
    if engine.is_main:
        try:
            decision[0] = _choose_checkpoint(config)
        except ConfigError as error:
            decision[1] = str(error)
    engine.broadcast(decision)
    if decision[1] is not None:
        raise ConfigError(decision[1])
    return decision[0]


def _choose_checkpoint(config: Config) -> Path | None:
    checkpoints = config.run_folder / "checkpoints"
    if config.run.resume == "never":
        if checkpoint.available(checkpoints):
            raise ConfigError(
                f"run.resume=never, but {config.run_folder} holds checkpoints of an earlier run. Choose another "
                "run.name, or move that folder away."
            )
        return None
    if config.run.resume == "auto":
        return checkpoint.newest_valid(checkpoints)
    path = Path(config.run.resume)
    if wrong := checkpoint.faults(path):
        raise ConfigError(f"The checkpoint run.resume={path} is not valid: {'; '.join(wrong)}.")
    return path


def prepare_data(config: Config, engine: Engine, say: Any) -> Prepared:
    """Tokenised corpora, made by the first rank when they are not in the cache yet."""
    if not config.data.corpora:
        raise ConfigError(
            "There is nothing to train on: data.corpora is empty. Add data=stdlib, or describe your own corpora "
            "in a file configs/data/NAME.yaml."
        )
    said: set[str] = set()

    def progress(description: str, done: int, total: int | None) -> None:
        if description not in said:
            said.add(description)
            say(description)

    with engine.main_first():
        prepared = prepare(config.data.corpora, config.data.tokenizer, config.data.cache_dir, progress)
    if prepared.tokenizer_folder is None:
        raise ConfigError(
            "All corpora are token files, which do not say how they were made: name the tokenizer, a folder or a "
            "Hugging Face name, in data.tokenizer.path."
        )
    return prepared


def check_vocabulary(config: Config, tokenizer: Any, prepared: Prepared) -> None:
    """There is a tokenizer, and every token id has a row in the embedding."""
    if len(tokenizer) > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer in {prepared.tokenizer_folder} has {len(tokenizer)} tokens and model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size to {len(tokenizer)} or more."
        )
    for file in (*prepared.train.values(), *prepared.validation.values()):
        file.check(config.model.vocab_size)


def order_of(config: Config, prepared: Prepared) -> Order:
    """The order of samples: the mixture, then the stages that replace it, at sample numbers."""
    length = config.data.sequence_length
    windows = {name: num_windows(file.num_tokens, length, name) for name, file in prepared.train.items()}
    equal = {name: 1.0 for name in config.data.corpora}
    stages = [Stage(0, config.data.mixture or equal)]
    stages += [Stage(-(-stage.from_tokens // length), stage.mixture) for stage in config.data.stages]
    return Order(config.run.seed, tuple(stages), windows)


def say_result(
    config: Config,
    folder: Path,
    prepared: Prepared,
    validation: Validation,
    lines: list[dict[str, Any]],
    picture: Path,
    difference: float,
    say: Any,
) -> None:
    """The last words of a run: how good, a sample, and where everything is."""
    if lines:
        unigram, last = validation.unigram(prepared.train), lines[-1]
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
        f"picture     {picture}"
    )


def write_exit(folder: Path, code: int, reason: str, step: int | None) -> None:
    """exit.json: launchers flatten a rank's exit status, so it is also written down."""
    if folder.is_dir():
        (folder / "exit.json").write_text(json.dumps({"code": code, "reason": reason, "step": step}) + "\n")
