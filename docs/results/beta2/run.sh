#!/bin/bash
# Both rules at five batches, from the root of the repository: run.sh CORPUS.jsonl. What is in a ledger is not run again.
set -eu
one() { # name, batch (× 4096 tokens), β2, learning rates
    OMP_NUM_THREADS=1 powertrain sweep --config-dir docs/results/law +sweep=beta2 \
        data.corpora.prose.path="$corpus" sweep.name="$1" sweep.batch="[$2]" "optimizer.betas=[0.9,$3]" \
        "sweep.schedules.wsd.lr=$4" sweep.ledger="docs/results/beta2/$1.jsonl"
}
corpus=$1
high="[0.004,0.008,0.016,0.032,0.064]" middle="[0.002,0.004,0.008,0.016,0.032]" low="[0.001,0.002,0.004,0.008,0.016]"
one constant-16 0.25 0.95 "$high"
one constant-8 0.125 0.95 "$high"
one halflife-8 0.125 0.974679434480896 "$high"
one constant-4 0.0625 0.95 "$middle"
one halflife-4 0.0625 0.9872585449014338 "$middle"
one constant-2 0.03125 0.95 "$low"
one halflife-2 0.03125 0.993608849045455 "$low"
one constant-1 0.015625 0.95 "$low"
one halflife-1 0.015625 0.9967993022898115 "$low"
