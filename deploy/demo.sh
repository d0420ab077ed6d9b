#!/usr/bin/env bash
# The main job in under two minutes (after the first build): chats against three small tiers.
#
#   deploy/demo.sh
#
# 1. Starts larderd in a temporary directory, with an emulated GPU tier of 128 MiB, a HOST tier of
#    256 MiB and an NVMe tier of 1 GiB. A block is 512 tokens and 1 MiB.
# 2. Generates a workload (deploy/workload.py): 64 users chat with two assistants, each of which has
#    a system prompt that its users share. Every turn sends the whole chat so far and some blocks
#    more; chats end, others begin. All chats together need several times what GPU and HOST hold.
# 3. Replays it with four worker processes. Each looks its prompt up, has lower tiers' blocks brought
#    up, compares every byte of every hit, "computes" what is missing in place and puts it.
# 4. Kills larderd with SIGKILL in the middle, starts it again and lets the workers go on: what was
#    in GPU and HOST is gone, what was written to NVMe is served.
# 5. Ends with a table. Exits with 1 if a byte was wrong or anything else did not go as told here.
set -euo pipefail
cd "$(dirname "$0")/.."

requests=1200
workers=4
model=(--layers=8 --kv-heads=2 --head-dim=32 --block-tokens=512)

build=$PWD/build/release
larderd=$build/server/larderd
larder=$build/client/larder
directory=
daemon=
replay=

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
  local pid
  for pid in $replay $daemon; do
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  if [[ -n $directory ]]; then rm -rf "$directory"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

milliseconds() { printf '%s\n' $((${EPOCHREALTIME/./} / 1000)); }

# Starts larderd and waits until it serves; sets daemon and start_ms.
start_daemon() {
  local started line=
  started=$(milliseconds)
  rm -f "$directory/ready"
  mkfifo "$directory/ready"
  "$larderd" --listen="unix:$directory/larder.sock" \
    --gpu=emulated --gpu-bytes=128MiB --host-bytes=256MiB --low-water=10% \
    --nvme-dir="$directory/nvme" --nvme-bytes=1GiB \
    >"$directory/ready" 2>>"$directory/larderd.log" &
  daemon=$!
  # The first line comes when it serves; the end of file, when it cannot.
  read -r -t 60 line <"$directory/ready" || true
  [[ $line == "larderd ready"* ]] || fail "larderd did not start"
  start_ms=$(($(milliseconds) - started))
  printf 'pid %s, serving after %s ms\n%s\n' "$daemon" "$start_ms" "$line"
}

# Lookups that the running daemon has served.
lookups() {
  "$larder" status --address="unix:$directory/larder.sock" --json |
    sed -n 's/.*"lookups":\([0-9]*\).*/\1/p'
}

main() {
  deploy/setup.sh
  say 'Building (the first time takes some minutes)'
  cmake --preset release >/dev/null
  cmake --build --preset release --target larderd larder
  local began=$SECONDS

  directory=$(mktemp --directory)
  say 'Starting larderd with three small tiers'
  start_daemon

  say "Generating $requests requests of a multi-turn chat workload"
  deploy/workload.py --requests=$requests --users=64 --assistants=2 --seed=7 \
    >"$directory/workload.jsonl"
  head -n 2 "$directory/workload.jsonl" | cut -c 1-100
  printf '...\n'

  say "Replaying them with $workers worker processes; every byte of every hit is compared"
  "$larder" replay --address="unix:$directory/larder.sock" --trace="$directory/workload.jsonl" \
    --workers=$workers --verify --flush-every=8 --json "${model[@]}" \
    >"$directory/result.json" 2>"$directory/replay.log" &
  replay=$!
  while kill -0 "$replay" 2>/dev/null && [[ $(lookups) -lt $((requests / 2)) ]]; do sleep 0.05; done
  kill -0 "$replay" 2>/dev/null || fail "the replay ended early: $(tail -n 3 "$directory/replay.log")"
  "$larder" status --address="unix:$directory/larder.sock"

  say "After $((requests / 2)) requests: kill -KILL $daemon"
  kill -KILL "$daemon"
  wait "$daemon" 2>/dev/null || true
  printf 'GPU and HOST are gone. The workers see their streams end, and look for the daemon.\n'

  say 'Starting larderd again on the same NVMe directory'
  start_daemon
  printf 'The workers attach again and go on.\n'
  local code=0
  wait "$replay" || code=$?
  replay=
  [[ $code -eq 0 ]] ||
    fail "the replay ended with $code: $(cat "$directory/result.json" "$directory/replay.log")"

  say 'Stopping larderd with SIGTERM'
  kill -TERM "$daemon"
  wait "$daemon" || fail "larderd ended with $? instead of 0"
  daemon=
  printf 'It let its workers go, finished its moves and exited with 0.\n'

  say 'What the workers asked for, and where it came from'
  /usr/bin/python3 deploy/demo_report.py "$directory/result.json" 512 || fail 'see above'
  printf '\nThe demo took %d s.\n' $((SECONDS - began))
}

main "$@"
