"""Train one small GraniteMoe uninterrupted, and twice with many kills; then compare.

    python tests/soak.py --minutes 60 --kills 40 --out docs/results/soak

Killed means SIGKILL to everything, SIGTERM to the launcher, SIGKILL in a save, a full disk, or SIGKILL and then a bit
flipped in the newest checkpoint. First with two ranks always, where the final weights must be those of the
uninterrupted run to the last bit; then with engines and ranks that change from start to start, where every step must
have seen the same sequences at the same learning rate. Writes OUT/soak.jsonl, a line a start, and OUT/result.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import launch_command

from powertrain.train import checkpoint
from powertrain.train.track import read_lines

RUN = (
    "+experiment=quickstart",
    "model.hidden_size=64",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data.sequence_length=128",
    "batch.sequences=16",
    "batch.micro_sequences=4",
    "schedule.warmup_tokens=100_000",
    "schedule.decay.tokens=200_000",
    "evaluation.every=200",
    "checkpoint.keep=3",
    "sample_prompt=null",
    "threads=1",
)
TOKENS_A_STEP = 16 * 128
FIXED = (("ddp", 2),)
CHANGING = (("plain", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero1", 4))
KINDS = ("kill", "kill in a save", "term", "full disk", "flip")


def main() -> None:
    """Undisturbed, disturbed, compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of disturbed training, about")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/soak"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    soak = Soak(options.folder, options.out / "soak.jsonl", random.Random(options.seed))
    steps = soak.steps_for(options.minutes / 2, options.kills // 2)
    results = []
    soak.undisturbed("undisturbed", FIXED[0], steps)
    for name, engines in (("fixed", FIXED), ("changing", CHANGING)):
        soak.disturbed(name, engines, steps, options.kills // 2)
        results.append(soak.compare(name, steps, exact=engines is FIXED))
    print(json.dumps(results, indent=1))
    (options.out / "result.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(result["passed"] for result in results) else 1)


class Soak:
    """Starts, kills, and the log of them."""

    def __init__(self, folder: Path, log: Path, draw: random.Random) -> None:
        self.folder, self.log, self.draw = folder, log, draw
        log.write_text("")

    def overrides(self, name: str, steps: int) -> list[str]:
        folder = [f"run.name={name}", f"run.folder={self.folder}", f"run.tokens={steps * TOKENS_A_STEP}"]
        return [*RUN, *folder, f"checkpoint.every={max(10, steps // 100)}"]

    def steps_for(self, minutes: float, kills: int) -> int:
        """About so many steps that training takes `minutes`, with the time that starts take off."""
        began = time.monotonic()
        self.undisturbed("probe", FIXED[0], 500)
        lines = read_lines(self.folder / "probe/metrics.jsonl")[100:]
        a_step = sum(TOKENS_A_STEP / line["tokens_per_second"] for line in lines) / len(lines)
        a_start = time.monotonic() - began - 500 * a_step
        return max(1000, round((60 * minutes - kills * a_start) / a_step))

    def undisturbed(self, name: str, engine: tuple[str, int], steps: int) -> None:
        process = self.start(name, steps, engine)
        if process.wait():
            sys.exit(f"{name} ended with {process.returncode}; see {self.folder / name}.txt")

    def start(self, name: str, steps: int, engine: tuple[str, int], **environment: str) -> subprocess.Popen[bytes]:
        command, needed = launch_command(self.overrides(name, steps), engine[1], engine[0])
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{name}.txt", "a") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **needed, **environment},
                start_new_session=True,
            )

    def disturbed(self, name: str, engines: tuple[tuple[str, int], ...], steps: int, kills: int) -> None:
        """Start, wait until some step, kill; `kills` times, and then let it come to its end."""
        run = self.folder / name
        for number in range(kills):
            reached = last_step(run)
            target = reached + max(1, round((steps - reached) / (kills - number + 1) * self.draw.uniform(0.3, 1.6)))
            kind, engine = self.draw.choice(KINDS), self.draw.choice(engines)
            self.one(name, steps, number, kind, engine, target)
        self.one(name, steps, kills, "none", engines[0], steps)

    def one(self, name: str, steps: int, number: int, kind: str, engine: tuple[str, int], target: int) -> None:
        run, environment = self.folder / name, {}
        if kind == "kill in a save":
            point = self.draw.choice(("tear@write", f"tear@write:rank={engine[1] - 1}", "kill@manifest", "kill@rename"))
            environment["POWERTRAIN_FAULT"] = f"{point}:step={next_save(run, target, steps)}"
        elif kind == "full disk":
            save = next_save(run, target, steps)
            environment["POWERTRAIN_FAULT"], target = f"full@write:step={save}", min(save + 3, steps)
        before, began = last_step(run), time.monotonic()
        process = self.start(name, steps, engine, **environment)
        while process.poll() is None:
            if kind in ("kill", "flip", "full disk") and last_step(run) >= target:
                # Ranks have sessions of their own.
                subprocess.run(["pkill", "-KILL", "-f", f"run.name={name} "], check=False)
                process.wait()
            elif kind == "term" and last_step(run) >= target:
                process.send_signal(signal.SIGTERM)
                process.wait()
            time.sleep(self.draw.uniform(0.01, 0.1))
        time.sleep(1)
        orphans = subprocess.run(["pgrep", "-f", f"run.name={name} "], capture_output=True, text=True, check=False)
        flipped = self.flip(run) if kind == "flip" else None
        line = {
            "run": name,
            "start": number,
            "engine": engine[0],
            "ranks": engine[1],
            "what": kind,
            "from_step": before,
            "to_step": last_step(run),
            "seconds": round(time.monotonic() - began, 1),
            "status": process.returncode,
            "flipped": flipped,
            "checkpoints": [path.name for path in checkpoint.available(run / "checkpoints")],
            "orphans": orphans.stdout.split(),
        }
        print(json.dumps(line), flush=True)
        with open(self.log, "a") as log:
            log.write(json.dumps(line) + "\n")

    def flip(self, run: Path) -> str | None:
        """Flip a bit in a file of the newest checkpoint, when there is one before it."""
        found = checkpoint.available(run / "checkpoints")
        if len(found) < 2:
            return None
        path = self.draw.choice(sorted(path for path in found[-1].rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        at = self.draw.randrange(len(content))
        content[at] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        return f"{found[-1].name}/{path.relative_to(found[-1])}, byte {at}"

    def compare(self, name: str, steps: int, exact: bool) -> dict[str, Any]:
        """Every step's samples and rate, and the bits of the last checkpoint where ranks never changed."""
        runs = [self.folder / "undisturbed", self.folder / name]
        lines = [read_lines(run / "metrics.jsonl") for run in runs]
        order = [[(line["step"], line["samples"], line["tokens"], line["lr"]) for line in these] for these in lines]
        last = [run / f"checkpoints/step-{steps:08d}" for run in runs]
        files = sorted(path.name for path in last[0].glob("*.safetensors"))
        same_bits = len(files) == 3 and all((last[0] / f).read_bytes() == (last[1] / f).read_bytes() for f in files)
        starts = [json.loads(line) for line in self.log.read_text().splitlines()]
        wrong = [
            f"{line['run']} {line['start']}: {line['what']}, status {line['status']}, "
            f"from step {line['from_step']} to {line['to_step']}, left behind {line['orphans']}"
            for line in starts
            if line["run"] == name
            and (
                line["orphans"]
                or line["to_step"] <= line["from_step"]
                or (line["what"] == "none" and line["status"] != 0)
                # What was told to end has saved all that it did; its launcher may return 1.
                or (line["what"] == "term" and line["checkpoints"][-1] != f"step-{line['to_step']:08d}")
            )
        ]
        same_order = order[0] == order[1] and len(order[0]) == steps
        apart = max(abs(a["lm_loss"] - b["lm_loss"]) for a, b in zip(*lines, strict=False))
        return {
            "run": name,
            "steps": steps,
            "starts": len([line for line in starts if line["run"] == name]),
            "minutes": round(sum(line["seconds"] for line in starts if line["run"] == name) / 60, 1),
            "wrong": wrong,
            "same_samples_and_rates": same_order,
            "same_bits": same_bits if exact else None,
            "largest_difference_of_a_loss": apart,
            "passed": same_order and not wrong and (same_bits or not exact),
        }


def last_step(run: Path) -> int:
    """By the end of metrics.jsonl, which grows too long to be read many times a second."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        steps = re.findall(rb'^\{"step": (\d+)', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def next_save(run: Path, target: int, steps: int) -> int:
    every = max(10, steps // 100)
    return min(max(target // every, last_step(run) // every) + 1, steps // every) * every


if __name__ == "__main__":
    main()
