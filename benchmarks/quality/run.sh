#!/usr/bin/env bash
# The measurements of docs/quality.md: benchmarks/quality/run.sh MODEL OUT "FULL_LAYERS ..." [TASK ...]
# The first set of full layers is measured with every scorer and ratio, the others
# (such as "0,1 none") with l2 and the controls at two ratios, and so is eviction by blocks.
set -euo pipefail
model=$1 out=$2
read -ra sets <<<"$3"
tasks=("${@:4}")
every=l2,keydiff,lagkv,value_key_ratio,l2_pagerank
passkey="--ratios 0.75,0.5,0.25,0.1 --depths 0.1,0.5,0.9 --samples 6"
declare -A options=(
  [perplexity]="--ratios 0.75,0.5,0.25 --samples 8 --continued 64"
  [passkey]="$passkey"
  [needle]="--ratios 0.75,0.5,0.25 --depths 0.1,0.5,0.9 --samples 3"
  [ruler]="--ratios 0.5,0.25 --samples 3"
)
[[ ${#tasks[@]} -gt 0 ]] || tasks=(perplexity passkey needle ruler)

measure() { # TASK FULL_LAYERS SCORERS [more options]
  # shellcheck disable=SC2086
  vllm-l2kv eval "$1" "$model" --out "$out/$1" --full-layers "${2/none/}" --scorers "$3" --protect 0:0,4:64 \
    --lengths 1024 ${options[$1]} "${@:4}"
}

for task in "${tasks[@]}"; do
  measure "$task" "${sets[0]}" "$every"
  [[ $task == perplexity || $task == passkey ]] || continue
  options[$task]+=" --ratios 0.5,0.25"
  for layers in "${sets[@]:1}"; do measure "$task" "$layers" l2; done
  measure "$task" "${sets[0]}" l2 --granularities block
done
