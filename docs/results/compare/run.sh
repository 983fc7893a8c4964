#!/bin/bash
# Each schedule at every batch and horizon, from the root of the repository: run.sh CORPUS.jsonl. It resumes.
set -eu
corpus=$1
train() { # ledger, batches, seeds, schedules of the sweep, more settings
    OMP_NUM_THREADS=1 powertrain sweep --config-dir docs/results/law +sweep=schedules \
        data.corpora.prose.path="$corpus" sweep.name="$1" "sweep.batch=$2" "sweep.seeds=$3" \
        sweep.ledger="docs/results/compare/ledgers/$1.jsonl" "sweep.schedules=$4" "${@:5}"
}
large='[2]' small='[0.125]' both='[0.125,2]'
# The law of ../law, fitted to horizons up to 3,932,160 tokens: nothing is tuned here.
hard='{power: {a: [95.3], b: [-0.516], max_lr: [0.0239]}}'
smooth='{power: {a: [183.4], b: [-0.5346], max_lr: [0.031]}}'
half='{power: {a: [47.7], b: [-0.516], max_lr: [0.0239]}}' # of its a, see ../power
# Both forms of the lean sweep ../law/lean.jsonl.
lean_hard='{power: {a: [24.1581], b: [-0.389781], max_lr: [0.02827]}}'
lean_smooth='{power: {a: [156.239], b: [-0.515147], max_lr: [0.04003]}}'
train power-hard "$both" '[0,1,2]' "$hard"
train power-half "$both" '[0,1,2]' "$half"
train lean-hard "$both" '[0]' "$lean_hard"
train lean-smooth "$both" '[0]' "$lean_smooth" schedule.cap=smooth
train wsd "$large" '[0]' '{wsd: {lr: [0.004, 0.008, 0.016, 0.032, 0.064]}}'
train wsd "$small" '[0]' '{wsd: {lr: [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]}}'
train wsd "$large" '[1,2]' '{wsd: {lr: [0.008, 0.016, 0.032]}}'
train wsd "$small" '[1,2]' '{wsd: {lr: [0.002, 0.004, 0.008, 0.016]}}'
train power-smooth "$both" '[0,1,2]' "$smooth" schedule.cap=smooth
train cosine "$large" '[0]' '{cosine: {lr: [0.008, 0.016, 0.032, 0.064, 0.128]}}'
train cosine "$small" '[0]' '{cosine: {lr: [0.004, 0.008, 0.016, 0.032]}}' 'sweep.tokens=[573_440,3_276_800]'
train cosine "$small" '[0]' '{cosine: {lr: [0.002, 0.004, 0.008, 0.016]}}'
train cosine "$large" '[1,2]' '{cosine: {lr: [0.016, 0.032, 0.064]}}'
train cosine "$small" '[1,2]' '{cosine: {lr: [0.008, 0.016]}}' 'sweep.tokens=[573_440]'
train cosine "$small" '[1,2]' '{cosine: {lr: [0.004, 0.008]}}' 'sweep.tokens=[573_440,3_276_800]'
train cosine "$small" '[1,2]' '{cosine: {lr: [0.004]}}'
train power-hard-linear "$both" '[0,1,2]' "$hard" schedule.decay.shape=linear
train wsd-linear "$large" '[0]' '{wsd: {lr: [0.016, 0.032]}}' schedule.decay.shape=linear
train wsd-linear "$small" '[0]' '{wsd: {lr: [0.002, 0.004, 0.008, 0.016]}}' schedule.decay.shape=linear
