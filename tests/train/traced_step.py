"""An optimizer step on CUDA tensors that have shapes and no contents, on a machine without a GPU.

usage: LD_PRELOAD=LIBRARY python traced_step.py TOKENS [overrides]

LIBRARY is fake_cuda.cpp, compiled; TOKENS a token file. An operation on tensors of two devices raises. The lines of
code that would wait for the GPU are printed in their order as one JSON list.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from powertrain.data.loader import Batches, num_sequences
from powertrain.data.order import Order, Stage
from powertrain.data.tokens import TokenFile
from powertrain.train.balance import Balance
from powertrain.train.compose import composed
from powertrain.train.engine import Engine
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import granite, mup
from powertrain.train.state import State
from powertrain.train.step import train_step

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """The lines that wait for the GPU. What they would get is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket
        known: Any = None
        if name is aten._local_scalar_dense:
            known = 1
        elif name is aten.bincount:
            known = args[0].new_empty(kwargs.get("minlength") or args[2])
        elif name is aten.nonzero:
            known = args[0].new_empty(args[0].shape[0], args[0].dim(), dtype=torch.int64)
        out = function(*args, **kwargs) if known is None else known
        onto_cpu = name in (aten._to_copy, aten.copy_) and not out.is_cuda
        if (known is not None or onto_cpu) and any(isinstance(each, Tensor) and each.is_cuda for each in args):
            self._wait()
        return out

    def _wait(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        line = [str(frame.line) for frame in frames if frame.filename != __file__][-1]
        if self.lines[-1:] != [line]:  # a list that is read is one wait
            self.lines.append(line)


def main() -> None:
    """Trace the second step, which has moments."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # an H100's
    nn.Module.to = lambda self, *_, **__: self  # it is where it was built, and tensors cannot be exchanged
    file, config = TokenFile(sys.argv[1]), composed(sys.argv[2:])
    sequences = {"words": num_sequences(file.num_tokens, config.data.sequence_length)}
    batches = Batches({"words": file}, Order(0, (Stage(0, {"words": 1.0}),), sequences), config.data.sequence_length)
    engine = Engine(config)
    engine.device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine.prepare(LanguageModelLoss(granite.build(config, engine.device)), mup.table(config))
        balance, state = Balance(config, engine.reduce), State()
        for _ in range(2):
            with Waits() as waits:
                record = train_step(config, engine, config.make_schedule(), batches, balance, state)
    assert not record["skipped"] and {p.device for p in engine.model.parameters()} == {engine.device}
    print(json.dumps(waits.lines))


main()
