#!/usr/bin/env bash
# A daemon whose GPU tier is this machine's GPU, and what it gives back: after a put, after a way
# through all tiers, and after a SIGKILL, every block byte by byte.
#
#   tests/gpu/end_to_end.sh DIR [GPU]
#
# DIR has larderd and larder (tests/gpu.sh --package). GPU is larderd's --gpu, standard: cuda;
# "emulated" runs the same without a GPU. Exits with 1 at the first thing that is not as it should be.
set -euo pipefail

[[ $# -ge 1 ]] || { printf 'end_to_end.sh: needs the folder of larderd and larder\n' >&2 && exit 2; }
PATH=$(realpath -- "$1"):$PATH
gpu=${2:-cuda}
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
trap 'stop -TERM; rm -rf "$folder"' EXIT

start() {
  local ready=$folder/ready
  rm -f "$ready" && mkfifo "$ready"
  larderd --listen="$LARDER_ADDRESS" --gpu="$gpu" --gpu-bytes=256MiB --host-bytes=256MiB \
    --nvme-dir="$folder/nvme" --nvme-bytes=1GiB >"$ready" 2>>"$folder/log" &
  daemon=$!
  if ! IFS= read -r -t 60 line <"$ready" || [[ $line != 'larderd ready'* ]]; then
    cat "$folder/log"
    printf 'end_to_end.sh: larderd is not ready\n' >&2
    exit 1
  fi
  printf '%s\n' "$line"
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
