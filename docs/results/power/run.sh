#!/bin/bash
# a and b of the Power schedule, searched directly; from the root of the repository: run.sh CORPUS.jsonl. It resumes.
set -eu
train() { # a, b
    OMP_NUM_THREADS=1 powertrain sweep --config-dir docs/results/law +sweep=schedules sweep.name=power \
        data.corpora.prose.path="$corpus" sweep.ledger=docs/results/power/ledger.jsonl 'sweep.batch=[0.125,0.5]' \
        'sweep.tokens=[573_440,3_276_800]' "sweep.schedules={power: {a: $1, b: $2, max_lr: [0.0239]}}"
}
corpus=$1
train '[47.7, 95.3, 190.6]' '[-0.516]'  # half, once and twice the law's a
train '[9.3, 18.5, 37.1]' '[-0.4]'      # the same learning rates at 1.37M tokens, with another b
train '[239, 478, 955]' '[-0.63]'
