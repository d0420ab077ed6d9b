#!/usr/bin/env bash
# What Larder is for, in under two minutes (after the first build).
#
#   deploy/demo.sh
#
# A small language model, trained on novels, reads a page and goes on from it in three ways. Each
# time a process of its own reads the page:
#
# 1. without a cache: it computes keys and values of the whole page;
# 2. with larderd, after another worker has read the page: it reads the page's keys and values in
#    place, in the daemon's memory, and computes only what is new;
# 3. after larderd got SIGKILL and was started again: memory is gone, NVMe is not.
#
# Ends with a table. Exits with 1 if a text differs or anything else did not go as told here.
set -euo pipefail
cd "$(dirname "$0")/.."

document=deploy/demo_document.txt
questions=(
  $'\n\nMrs. Bennet was '
  $'\n\n"And what," said Elizabeth, "do you '
  $'\n\nThe next morning, Mr. Bingley '
)
generate=(--model=tests/model/austen --temperature=0.6 --seed=7 --json)

build=$PWD/build/release
larderd=$build/server/larderd
worker=$build/client/worker/larder-worker
report=deploy/demo_report.py
directory=
daemon=

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() {
  printf '\ndemo: %s\n' "$*" >&2
  if [[ -s $directory/larderd.log ]]; then
    printf 'the end of larderd.log:\n' >&2
    tail -n 20 "$directory/larderd.log" >&2
  fi
  exit 1
}

clean_up() {
  if [[ -n $daemon ]]; then
    kill -KILL "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
  fi
  if [[ -n $directory ]]; then rm -rf "$directory"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Starts larderd and waits until it serves.
start_daemon() {
  local line=
  rm -f "$directory/ready"
  mkfifo "$directory/ready"
  "$larderd" --listen="unix:$directory/larder.sock" \
    --gpu=emulated --gpu-bytes=64MiB --host-bytes=64MiB \
    --nvme-dir="$directory/nvme" --nvme-bytes=256MiB \
    >"$directory/ready" 2>>"$directory/larderd.log" &
  daemon=$!
  # The first line comes when it serves; the end of file, when it cannot.
  read -r -t 60 line <"$directory/ready" || true
  [[ $line == "larderd ready"* ]] || fail "larderd did not start"
  printf 'pid %s; %s\n' "$daemon" "$line"
}

# run NAME PROMPT FLAG...: one worker process; NAME.json is what it says.
run() {
  local name=$1
  printf '%s' "$2" >"$directory/prompt.txt"
  "$worker" generate "${generate[@]}" --prompt-file="$directory/prompt.txt" "${@:3}" \
    >"$directory/$name.json" 2>>"$directory/worker.log" ||
    fail "larder-worker ended with $?: $(tail -n 3 "$directory/worker.log")"
}

# ask_all RUN FLAG...: the page and each question, a process each.
ask_all() {
  local i
  for i in "${!questions[@]}"; do
    run "$1.$i" "$page${questions[i]}" --max-tokens=120 "${@:2}"
    /usr/bin/python3 "$report" answer "${questions[i]}" "$directory/$1.$i.json"
  done
}

main() {
  deploy/setup.sh
  say 'Building (the first time takes some minutes)'
  cmake --preset release >/dev/null
  cmake --build --preset release --target larderd larder-worker
  local began=$SECONDS
  directory=$(mktemp --directory)
  page=$(<"$document")
  local cache="--cache=unix:$directory/larder.sock"

  say "The page: ${#page} characters, each of which is a token to this model"
  head -n 3 "$document"
  printf '...\n'

  say 'Without a cache: every process computes the page again'
  ask_all computed

  say 'Starting larderd: GPU (emulated) and HOST memory, and NVMe'
  start_daemon
  say 'One worker reads the page and stores its keys and values'
  run stored "$page" "$cache" --max-tokens=1 --flush=30s
  /usr/bin/python3 "$report" stored "$directory/stored.json"

  say 'Other workers find them in memory and compute only what is new'
  ask_all memory "$cache"

  say "kill -KILL $daemon: GPU and HOST are gone. Starting larderd again"
  kill -KILL "$daemon"
  wait "$daemon" 2>/dev/null || true
  start_daemon
  say 'The first worker brings the page up from NVMe, the others find it in memory again'
  ask_all restarted "$cache"

  say 'Stopping larderd with SIGTERM'
  kill -TERM "$daemon"
  wait "$daemon" || fail "larderd ended with $? instead of 0"
  daemon=

  say 'Where the keys and values of each prompt came from'
  /usr/bin/python3 "$report" table "$directory" "${#questions[@]}" || fail 'see above'
  printf '\nThe demo took %d s.\n' $((SECONDS - began))
}

main "$@"
