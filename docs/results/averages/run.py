"""Train trunks of Power and WSD, and at each horizon compare decays, merges and the running average, at equal tokens.

    python docs/results/averages/run.py CORPUS.jsonl FOLDER

Resumes: what has been evaluated is not trained again. results.jsonl, beside this file, has a line for each model.
"""

import json
import multiprocessing
import sys
from pathlib import Path

from powertrain.launch import decay, merge
from powertrain.train import cli
from powertrain.train.track import read_lines

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
STEP, EVERY = 1024, 8  # tokens of a step, and steps between checkpoints
HORIZONS = (256, 1024, 4096)  # steps
SCHEDULES = {
    "power": ("schedule=power", "schedule.a=95.3", "schedule.b=-0.516", "schedule.max_lr=0.0239"),  # ../law's
    "wsd": ("schedule=wsd", "schedule.lr=0.016"),
}
MODEL = (
    "model.hidden_size=32", "model.intermediate_size=80", "model.num_attention_heads=2", "batch.sequences=8",
    "batch.micro_sequences=8", "schedule.warmup_tokens=61_440",
)  # fmt: skip


def apart(verb, *arguments):
    """A verb's `main` in a process of its own, which inherits the imports."""
    process = multiprocessing.get_context("fork").Process(target=verb, args=([*arguments],))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{arguments} ended with exit status {process.exitcode}")


def record(**line):
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def last_loss(run, step, weights="raw"):
    lines = [line for line in read_lines(run / "evals.jsonl") if line["step"] == step and line["corpus"] == "overall"]
    return next(line["loss"] for line in lines if line.get("weights", "raw") == weights)


def main():
    corpus, folder = sys.argv[1], Path(sys.argv[2])
    done = {tuple(line[key] for key in ("schedule", "seed", "steps", "how")) for line in read_lines(RESULTS)}
    for seed in (0, 1, 2):
        for name, schedule in SCHEDULES.items():
            trunk = folder / f"{name}-{seed}"
            common = f"data.corpora.prose.path={corpus}", f"run.folder={folder}", f"run.seed={seed}"
            apart(
                cli.main, f"--config-dir={HERE.parent / 'law'}", "+experiment=prose", *MODEL, *schedule, *common,
                f"run.name={trunk.name}", f"run.tokens={HORIZONS[-1] * STEP}", "schedule.decay.tokens=0",
                "average.window=0.1", f"evaluation.every={HORIZONS[0]}", f"checkpoint.every={EVERY}",
                "checkpoint.keep=1000", "tracker=jsonl",
            )  # fmt: skip
            for steps in HORIZONS:
                key = {"schedule": name, "seed": seed, "steps": steps}
                for how in ("raw", "average"):
                    if (name, seed, steps, how) not in done:
                        record(**key, how=how, loss=last_loss(trunk, steps, how))
                for share in (0.05, 0.1, 0.2):
                    begin = round(steps * (1 - share) / EVERY) * EVERY
                    for shape in ("exponential", "linear"):
                        how = f"decay {share:.0%} {shape}"
                        branch = folder / f"{trunk.name}-{steps}-{begin}-{shape}"
                        if (name, seed, steps, how) not in done:
                            apart(
                                decay.main, str(trunk), f"--at={begin}", f"--tokens={(steps - begin) * STEP}",
                                f"--shape={shape}", f"--name={branch.name}", "average.window=null",
                            )  # fmt: skip
                            record(**key, how=how, loss=last_loss(branch, steps), begin=begin)
                    between = max(1, round(steps * share / EVERY / 8)) * EVERY  # 8 to 10 checkpoints, or all there are
                    of = [str(step) for step in range(steps, begin - 1, -between)][::-1]
                    for shape in ("uniform", "sqrt") if share == 0.2 else ("uniform",):
                        how = f"merge {share:.0%} {shape}"
                        out = folder / f"{trunk.name}-{steps}-{begin}-merge-{shape}"
                        if (name, seed, steps, how) not in done and len(of) > 1:
                            apart(
                                merge.main, str(trunk), "--steps", *of, f"--weights={shape}", "--evaluate",
                                f"--out={out}",
                            )  # fmt: skip
                            lines = json.loads((out / "merge.json").read_text(encoding="utf-8"))["evaluations"]
                            record(**key, how=how, loss=lines[-1]["loss"], steps_merged=[int(step) for step in of])


if __name__ == "__main__":
    main()
