"""`powertrain` lists the verbs, `powertrain VERB` runs one; `python -m powertrain.launch` is the same."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib.metadata import version

from powertrain.train import streams

VERBS = {
    "train": "train a model: +experiment=NAME and Hydra overrides",
    "prepare": "tokenise the corpora of a configuration once, before training",
    "check": "mup | coordinates | batch | run: verify a configuration, or a run",
    "estimate": "predict memory, time, disk, learning rates and problems of a run",
    "sweep": "train small models over batch × learning rate × horizon × model",
    "fit": "fit the law of the best learning rate to a sweep, and write a schedule",
    "report": "one HTML page of runs, or of a sweep",
    "decay": "branch a decay off a checkpoint of a run",
    "branch": "measure the critical batch of a run, by branches with several batches",
    "export": "write a checkpoint as a Hugging Face folder",
    "merge": "merge checkpoints of a run into one model, the mean of their weights",
    "evaluate": "evaluate a model: benchmarks beside random choice, bits per byte of a text",
    "bench": "this machine's speed, compared with its peak and with transformers.Trainer",
    "generate": "continue a prompt with an exported model",
    "path": "print the paths of accelerate's configurations and Slurm's scripts",
    "completion": "bash | zsh: complete verbs, experiments and settings",
}


def main() -> None:
    """Run the verb named by the first argument."""
    streams.protect()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: powertrain VERB …          (powertrain VERB --help shows examples)\n")
        for verb, purpose in VERBS.items():
            print(f"  {verb:<10} {purpose}")
        print(
            "\non several devices, from any folder:\n  accelerate launch $(which powertrain) train +experiment=NAME …"
        )
        sys.exit(0)
    if arguments == ["--version"]:
        print(f"powertrain {version('powertrain')}")
        sys.exit(0)
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"powertrain: there is no verb '{verb}'; there are {', '.join(VERBS)}.{hint}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"powertrain.launch.{verb}").main(arguments[1:])


if __name__ == "__main__":
    main()
