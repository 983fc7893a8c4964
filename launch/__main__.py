"""`powertrain VERB` and `python -m powertrain.launch`: what there is to do, and doing it."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib.metadata import version

from powertrain.train import streams

VERBS = {
    "train": "train a model: +experiment=NAME and Hydra overrides",
    "prepare": "tokenise the corpora of a configuration once, before training",
    "check": "mup | coordinates | batch | run: see that a configuration, or a run, does what it should",
    "estimate": "what a run will take before it runs: memory, time, disk, rates, and what would go wrong",
    "sweep": "train a grid of small models: batch × rate × horizon × model",
    "fit": "fit the law of the best rate to a sweep, and make a schedule of it",
    "report": "one HTML page of runs, or of a sweep",
    "decay": "branch a decay off a checkpoint of a run",
    "export": "write a checkpoint as a Hugging Face folder",
    "evaluate": "judge a model: benchmarks beside random choice, bits per byte of a text",
    "bench": "this machine's speed, beside its own limit and beside transformers.Trainer",
    "generate": "continue a prompt with an exported model",
    "path": "where accelerate's configurations and Slurm's scripts lie",
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
