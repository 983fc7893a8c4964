"""One measurement of `powertrain bench`, in a process of its own.

usage: python -m powertrain.launch.bench.worker BEGIN WHAT [TOKENS STEPS [overrides]]

BEGIN is the time at which the process was started. WHAT is `peak`, `powertrain`, or `trainer/EXPERTS/PRECISION`:
transformers.Trainer on the same model and tokens. Prints one JSON object on the last line.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from powertrain.data.loader import Batches, num_sequences, sequence
from powertrain.data.order import Order, Stage
from powertrain.data.tokens import TokenFile
from powertrain.schedulers import Schedule
from powertrain.train.balance import Balance
from powertrain.train.compose import composed
from powertrain.train.config import Config
from powertrain.train.engine import Engine
from powertrain.train.hardware import available_cores
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import granite, mup
from powertrain.train.state import State
from powertrain.train.step import train_step

PEAK_SECONDS = 1.5  # of products in each precision
Clock = Callable[[float | None], None]  # called at the end of a step, with its loss


def main() -> None:
    """Measure, and print."""
    # The same number for all contenders, whatever the environment says.
    torch.set_num_threads(available_cores())
    begin, arguments = float(sys.argv[1]), sys.argv[2:]
    if arguments == ["peak"]:
        print(json.dumps({"float32": peak(torch.float32), "bfloat16": peak(torch.bfloat16)}))
        return
    what, tokens, steps, *overrides = arguments
    config, file = composed(overrides), TokenFile(tokens)
    ends: list[float] = []
    losses: list[float | None] = []

    def clock(loss: float | None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.time())
        losses.append(loss)

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # an error in this process, not a machine out of memory
        resource.setrlimit(resource.RLIMIT_DATA, 2 * (psutil.virtual_memory().available,))
    facts: dict[str, Any] = {}
    if what == "powertrain":
        facts["seconds_to_import"] = time.time() - begin
        facts["data_seconds"] = train_ours(config, file, int(steps), clock)
    else:
        _, experts, precision = what.split("/")
        train_theirs(config, file, int(steps), experts, precision, clock)
    peak_memory = (
        torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    print(
        json.dumps(
            {
                "seconds": seconds,  # of each step but the first
                "seconds_to_first_step": ends[0] - begin,
                "threads": torch.get_num_threads(),
                "peak_memory": peak_memory,  # bytes, of the GPU where there is one
                "losses": losses,
                **facts,
            }
        )
    )


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the median of those that fit into PEAK_SECONDS."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    seconds: list[float] = []
    until = time.perf_counter() + PEAK_SECONDS
    while len(seconds) < 5 or time.perf_counter() < until:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(seconds[1:])[len(seconds[1:]) // 2]


@dataclass
class Ours:
    """What a step of ours needs, without a run folder."""

    engine: Engine
    schedule: Schedule
    batches: Batches
    balance: Balance


def assemble(config: Config, file: TokenFile) -> Ours:
    """A model with the weights that its run would begin with, and the file as its only corpus."""
    engine, length = Engine(config), config.data.sequence_length
    sequences = {"synthetic": num_sequences(file.num_tokens, length)}
    batches = Batches({"synthetic": file}, Order(0, (Stage(0, {"synthetic": 1.0}),), sequences), length)
    with engine.building():
        model = granite.build(config, engine.device)
    rows = mup.table(config)
    engine.prepare(LanguageModelLoss(model), rows)
    engine.load(mup.initial_values(engine.shapes, rows, config.run.seed))
    return Ours(engine, config.make_schedule(), batches, Balance(config, engine.reduce))


def train_ours(config: Config, file: TokenFile, steps: int, clock: Clock) -> list[float]:
    """Our own loop: nothing is logged, saved or evaluated.

    Returns:
        Seconds of each step spent waiting for its batch.
    """
    ours, state = assemble(config, file), State()
    waited = []
    for _ in range(steps):
        record = train_step(config, ours.engine, ours.schedule, ours.batches, ours.balance, state)
        clock(record["lm_loss"])
        waited.append(record["data_seconds"])
    return waited


def train_theirs(config: Config, file: TokenFile, steps: int, experts: str, precision: str, clock: Clock) -> None:
    """transformers.Trainer with its defaults, on the same sequences; `precision` is fp32, autocast or bf16.

    `autocast` is Trainer's bf16=True. `bf16` holds weights and moments in bf16: no float32 masters.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clocked(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock(None)

    class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return num_sequences(file.num_tokens, config.data.sequence_length)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(sequence(file, index, config.data.sequence_length)[0])
            return {"input_ids": ids, "labels": ids}

    hf_config = granite.transformers_config(config)
    chosen = {}
    if config.model.is_moe:
        hf_config.output_router_logits = True  # for the auxiliary loss
        chosen["experts_implementation"] = experts
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = granite.CLASSES[config.model.model_type]._from_config(hf_config, dtype=dtype, **chosen)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=config.batch.micro_sequences,
            gradient_accumulation_steps=config.batch.sequences // config.batch.micro_sequences,
            bf16=precision == "autocast",
            torch_compile=config.engine.torch_compile,
            gradient_checkpointing=config.engine.activation_checkpointing,
            learning_rate=1e-4,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=settings, train_dataset=Sequences(), callbacks=[Clocked()]).train()


if __name__ == "__main__":
    main()
