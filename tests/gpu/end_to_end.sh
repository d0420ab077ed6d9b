#!/usr/bin/env bash
# A daemon whose GPU tier is this machine's GPU, and what it gives back: after a put, after a way
# through all tiers, and after a SIGKILL, every block byte by byte; and a worker that computes on that
# GPU, in place on the daemon's blocks: the tokens that it gives without.
#
#   tests/gpu/end_to_end.sh DIR [GPU [LOGS]]
#
# DIR has larderd, larder and larder-worker (tests/gpu.sh --package). GPU is larderd's --gpu, standard:
# cuda; "emulated" runs the same without a GPU, and without the worker. A worker that cannot start here,
# or was built without CUDA, is left out, and that is said. LOGS is a folder for what the daemon and the
# worker logged. Exits with 1 at the first thing that is not as it should be.
set -euo pipefail

[[ $# -ge 1 ]] || { printf 'end_to_end.sh: needs the folder of larderd and larder\n' >&2 && exit 2; }
PATH=$(realpath -- "$1"):$PATH
model=$(realpath -- "$(dirname "$0")/../model/tiny_qwen2")
gpu=${2:-cuda}
logs=${3:-}
folder=$(mktemp -d -p . end_to_end.XXXXXX)
folder=$(realpath -- "$folder")
export LARDER_ADDRESS=unix:$folder/larderd.sock
daemon=

stop() {
  [[ -n $daemon ]] || return 0
  kill "$1" "$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
  daemon=
}
finish() {
  local status=$?
  stop -TERM
  if [[ -n $logs ]]; then
    cp "$folder/log" "$logs/larderd.log"
    cp "$folder/worker" "$logs/larder-worker.log"
  fi
  if [[ $status -ne 0 ]]; then
    printf 'larderd and larder-worker logged last:\n'
    tail -q -n 5 "$folder/log" "$folder/worker"
  fi
  rm -rf "$folder"
  exit "$status"
}
touch "$folder/log" "$folder/worker"
trap finish EXIT

start() {
  local ready=$folder/ready
  rm -f "$ready" && mkfifo "$ready"
  larderd --listen="$LARDER_ADDRESS" --gpu="$gpu" --gpu-bytes=256MiB --host-bytes=256MiB \
    --nvme-dir="$folder/nvme" --nvme-bytes=1GiB >"$ready" 2>>"$folder/log" &
  daemon=$!
  if ! IFS= read -r -t 60 line <"$ready" || [[ $line != 'larderd ready'* ]]; then
    printf 'end_to_end.sh: larderd is not ready\n' >&2
    exit 1
  fi
  printf '%s\n' "$line"
  if [[ $line == *'(GPU none'* ]] || grep 'HOST is not registered' "$folder/log"; then
    printf 'end_to_end.sh: no GPU tier, or copies to and from it at half the speed\n' >&2
    exit 1
  fi
}

# wants PATTERN COMMAND...: runs it, and its output must have the pattern.
wants() {
  local pattern=$1 output
  shift
  output=$("$@" 2>&1) || { printf '%s\n%s: failed\n' "$output" "$1 $2" >&2 && exit 1; }
  printf '%s\n' "$output"
  grep -Eq "$pattern" <<<"$output" || { printf '%s: no "%s"\n' "$1 $2" "$pattern" >&2 && exit 1; }
}

text=$(printf 'A sentence of the prompt, number %d. ' {1..64})
tokens=$((${#text} / 16 * 16))
blocks=$((tokens / 16))
text=${text:0:$tokens}
start
wants "put $blocks of $blocks blocks" larder put --model demo/llama --text "$text" --fill --flush
# What a CPU cannot write was put into HOST.
wants "^$blocks of $blocks blocks are readable" larder prefetch --model demo/llama --text "$text" --tier gpu
wants '^GPU ' larder lookup --model demo/llama --text "$text"
wants ' 0 bytes wrong' larder get --model demo/llama --text "$text" --verify --output /dev/null
stop -KILL
start
wants '^NVME ' larder lookup --model demo/llama --text "$text"
wants "^$blocks of $blocks blocks are readable" larder prefetch --model demo/llama --text "$text" --tier gpu
wants '^GPU ' larder lookup --model demo/llama --text "$text"
wants ' 0 bytes wrong' larder get --model demo/llama --text "$text" --verify --output /dev/null
printf 'end to end on --gpu=%s: all %d blocks right, before and after a SIGKILL\n' "$gpu" "$blocks"

[[ $gpu != emulated ]] || exit 0
if ! larder-worker --help >/dev/null 2>"$folder/worker"; then
  printf 'no larder-worker here: %s\n' "$(tail -n 1 "$folder/worker")"
  exit 0
fi
# Chunks of the 96 tokens that are whole blocks: with the cache and without, the first token is computed
# by a step of four rows. cuBLAS takes another kernel for another number, and its sums, rounded to
# bf16, are further apart than the best tokens of this model.
# generates [FLAG...]: what the worker says of one prompt, as JSON.
generates() {
  larder-worker generate --json --device cuda --model "$model" --tokens "$(seq -s, 1 100)" \
    --max-tokens 8 --pool-bytes 64MiB --chunk-tokens 96 --restore-patience 1000 "$@" 2>>"$folder/worker"
}
if ! alone=$(generates); then
  grep 'built without CUDA' "$folder/worker" || exit 1
  exit 0
fi
# same FROM [FLAG...]: with the cache, 96 tokens of the prompt out of tier FROM ("": none), and the
# tokens that it gives alone.
same() {
  local from=$1 answer
  shift
  answer=$(generates --cache "$LARDER_ADDRESS" --cache-timeout 30s "$@")
  if [[ $(grep -o '"tokens":\[[^]]*\]' <<<"$answer") != "$(grep -o '"tokens":\[[^]]*\]' <<<"$alone")" ]] ||
    [[ -n $from && $answer != *"\"$from\":96"* ]]; then
    printf 'end_to_end.sh: alone:\n%s\nfrom "%s":\n%s\n' "$alone" "$from" "$answer" >&2
    exit 1
  fi
}
same '' --flush 60s
same gpu
same gpu --no-cuda-graphs
stop -KILL
start
same nvme
same gpu
printf 'a worker on the GPU: the same tokens from its memory, and from NVMe after a SIGKILL\n'
