#!/usr/bin/env bash
# Everything that needs a GPU, on any machine that has one: builds the CUDA kernels and their tests,
# runs them, runs them again under compute-sanitizer, and prints one table of figures.
#
#   tests/gpu.sh [--quick] [--json FILE] [DIR]
#   tests/gpu.sh --package DIR
#
# Needs CUDA (12.4 or later), CMake (3.22 or later), a C++20 compiler and a GPU; nothing else that
# Larder needs has to be installed. Under ten minutes on 16 cores, without DIR.
#
# --quick    without the sanitizers and the figures; these take, with DIR and by arithmetic, 30 GB of the
#            GPU's memory, 25 GB of the host's and 9 GB of the drive
# --json     also writes the figures, as tests/bench/run.sh does
# DIR        a folder that --package made: its larderd, larder and larder-worker then run end to end
#            on this GPU as well
# --package  makes DIR, on a machine that can build Larder: the release build's programs with the
#            shared libraries that they need, all but libc
#
# Peers are measured where python3 has torch. Logs are in build/gpu/logs. Exits with 1 when anything
# failed, and with 2, saying what is missing, when this machine cannot run it.
set -euo pipefail
self=$(readlink -f "$0")
called_from=$PWD
cd "$(dirname "$self")/.."

die() {
  printf 'gpu.sh: %s\n' "$1" >&2
  exit 2
}

quick=no json='' package='' programs=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --quick) quick=yes ;;
    --json | --package)
      [[ $# -ge 2 ]] || die "$1 needs a path"
      if [[ $1 == --json ]]; then json=$2; else package=$2; fi
      shift
      ;;
    --json=* | --package=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -h | --help)
      sed -n '2,20{s/^# \{0,1\}//;p}' "$self"
      exit 0
      ;;
    -*) die "unknown option '$1'; allowed: --quick, --json FILE, --package DIR, --help" ;;
    *)
      [[ -z $programs ]] || die "one DIR at most, given '$programs' and '$1'"
      programs=$1
      ;;
  esac
  shift
done
# absolute PATH: as seen from where we were called.
absolute() { (cd "$called_from" && realpath -m -- "$1"); }
[[ -z $json ]] || json=$(absolute "$json")

# ---- --package

# Copies a program and, by the loader's own list, the libraries that are not part of libc.
package_program() {
  local program=$1 to=$2 library
  install -m 755 "$program" "$to/libexec/"
  while read -r library; do
    case ${library##*/} in
      ld-linux* | libc.so* | libm.so* | libdl.so* | libpthread.so* | librt.so* | libresolv.so*) ;;
      *) cp -Lu "$library" "$to/lib/" ;;
    esac
  done < <(ldd "$program" | awk '$3 ~ /^\// {print $3}')
  # shellcheck disable=SC2016  # the wrapper's own variables
  printf '%s\n' '#!/bin/sh' 'here=$(dirname "$(readlink -f "$0")")' \
    'LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$here/libexec/$(basename "$0")" "$@"' \
    >"$to/${program##*/}"
  chmod 755 "$to/${program##*/}"
}

if [[ -n $package ]]; then
  package=$(absolute "$package")
  [[ ! -e $package || -d $package && -z $(ls -A "$package") ]] || die "--package: $package is not empty"
  cmake --preset release
  cmake --build --preset release --parallel "$(nproc)" --target larderd larder larder-worker
  mkdir -p "$package/lib" "$package/libexec"
  for program in server/larderd client/larder client/worker/larder-worker; do
    package_program "build/release/$program" "$package"
  done
  for program in larderd larder larder-worker; do "$package/$program" --help >/dev/null; done
  printf '%s: larderd, larder, larder-worker, %d libraries, %s\n' "$package" \
    "$(find "$package/lib" -type f | wc -l)" "$(du -sh "$package" | cut -f 1)"
  exit 0
fi

# ---- What this machine has

export PATH=$PATH:/usr/local/cuda/bin
missing=()
for tool in cmake "${CUDACXX:-nvcc}" "${CXX:-c++}"; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[[ ${#missing[@]} -eq 0 ]] || die "cannot build: no $(IFS=, && printf '%s' "${missing[*]}") on the PATH"
if [[ -n $programs ]]; then
  programs=$(absolute "$programs")
  for program in larderd larder larder-worker; do
    [[ -x $programs/$program ]] || die "$programs has no $program; make it with --package"
  done
fi

build=$PWD/build/gpu
logs=$build/logs
mkdir -p "$logs"
rm -f "$logs"/*
rows=() failures=() passed=0 failed=0 skipped=0

# record STAGE OUTCOME SECONDS, with OUTCOME passed, failed, or skipped and why
record() {
  rows+=("$(printf '%-34s %6d s  %s' "$1" "$3" "$2")")
  case $2 in
    passed) passed=$((passed + 1)) ;;
    failed) failed=$((failed + 1)) ;;
    *) skipped=$((skipped + 1)) ;;
  esac
}

# check STAGE COMMAND...: one thing that works or does not.
check() {
  local stage=$1 started=$SECONDS log
  shift
  log=$logs/${stage//[ \/]/-}.log
  printf '== %s\n' "$stage"
  if "$@" >"$log" 2>&1; then
    record "$stage" passed $((SECONDS - started))
  else
    record "$stage" failed $((SECONDS - started))
    failures+=("$stage: $log")
    tail -n 40 "$log"
    return 1
  fi
}

finish() {
  printf '\n'
  printf '%s\n' "${rows[@]}"
  if [[ ${#failures[@]} -gt 0 ]]; then printf '\nfailed:\n' && printf '  %s\n' "${failures[@]}"; fi
  printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
}

build_all() { cmake -S tests/gpu -B "$build" && cmake --build "$build" --parallel "$(nproc)"; }
check 'build' build_all || { finish && exit 1; }

if ! gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>"$logs/nvidia-smi.log"); then
  finish
  die "built everything, ran nothing: no GPU here (nvidia-smi is missing or finds none)"
fi
printf '== on %s\n' "$gpu"

# ---- Tests, and the same under the sanitizers

mapfile -t tests < <(cd "$build" && ctest --show-only | sed -n 's/^ *Test *#[0-9]*: *//p')
for test in "${tests[@]}"; do check "$test" "$build/$test" || true; done

# sanitise TOOL TEST: each case of the test with one seed, where it has seeds.
sanitise() {
  local stage="$1 $2" started=$SECONDS log=$logs/$1-$2.log status=0 arguments=(--seed=1)
  [[ $2 != gpu_storage* ]] || arguments=()
  printf '== %s\n' "$stage"
  timeout 180 compute-sanitizer --tool "$1" --error-exitcode 86 "$build/$2" "${arguments[@]}" \
    >"$log" 2>&1 || status=$?
  if [[ $status -eq 0 ]]; then
    record "$stage" passed $((SECONDS - started))
  elif ! grep -q 'SUMMARY' "$log"; then
    record "$stage" "skipped: $(tail -n 1 "$log" | cut -c 1-80)" $((SECONDS - started))
  else
    record "$stage" failed $((SECONDS - started))
    failures+=("$stage: $log")
    tail -n 40 "$log"
  fi
}
if [[ $quick == no ]]; then
  if command -v compute-sanitizer >/dev/null; then
    for test in "${tests[@]}"; do
      for tool in memcheck racecheck initcheck synccheck; do sanitise "$tool" "$test"; done
    done
  else
    record sanitizers 'skipped: no compute-sanitizer on the PATH' 0
  fi
fi

# ---- The daemon and the worker

if [[ -n $programs ]]; then check 'end to end' tests/gpu/end_to_end.sh "$programs" || true; fi

# ---- Figures

if [[ $quick == no ]]; then
  peers=$build/peers.txt worker_rows=()
  : >"$peers"
  if python3 -c 'import torch; torch.zeros(1, device="cuda")' 2>"$logs/torch.log"; then
    python3 tests/gpu/torch_peer.py >"$peers" 2>>"$logs/torch.log" || record peers failed 0
  else
    record peers 'skipped: python3 has no torch that finds the GPU' 0
  fi
  measure() {
    "$build/gpu_bench" "$peers" >"$build/figures.txt" || return
    [[ -x $build/gpu_storage_bandwidth ]] || return 0
    # Its lines are: name, GB/s, GB/s of one large copy, ratio.
    "$build/gpu_storage_bandwidth" | awk '/^gpu_/ {printf "{\"name\": \"%s\", \"value\": %s, \
\"unit\": \"GB/s\", \"against\": \"one large copy of pinned memory: %s GB/s\", \"ratio\": %s, \
\"goal\": \"report\", \"met\": null}\n", $1, $2, $3, $4}' >>"$build/figures.txt"
  }
  # The time to a first token at Llama 3's shape of 8 billion parameters: cold, and with prefixes of
  # 8,192 to 32,768 tokens in each tier.
  restores() {
    mkdir -p "$build/restores" && rm -f "$build/restores/rows"
    "$programs/larder-worker" bench restore --device cuda --random-weights tests/gpu/llama3_8b.json \
      --prefix-tokens 32768 --chunk-tokens 2048 --larderd "$programs/larderd" \
      --directory "$build/restores" --output "$build/restores" --rows "$build/restores/rows"
  }
  # decode_rate SEQUENCES [FLAG...]: tokens a second of a small model, whose kernels are over sooner than
  # they are launched.
  decode_rate() {
    "$programs/larder-worker" generate --json --device cuda \
      --random-weights tests/bench/qwen2_0_5b.json --tokens "$(seq -s, 1 16)" --max-tokens 1024 \
      --pool-bytes 256MiB -n "$@" | grep -o '"decode_tokens_per_second":[0-9.]*' | cut -d : -f 2
  }
  # With CUDA graphs and without.
  decode_rates() {
    local sequences with without
    rm -f "$build/decode_rates"
    for sequences in 1 8; do
      with=$(decode_rate "$sequences") && without=$(decode_rate "$sequences" --no-cuda-graphs) || return
      awk -v name="gpu_decode_graphs_$sequences" -v with="$with" -v without="$without" 'BEGIN {
        printf "{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"tokens/s\", \"against\": \"kernels \
launched one by one: %.6g tokens/s\", \"ratio\": %.4g, \"goal\": \">= 1.00\", \"met\": %s}\n",
          name, with, without, with / without, (with >= without) ? "true" : "false"}' >>"$build/decode_rates"
    done
  }
  if [[ -z $programs ]]; then
    record restores 'skipped: no DIR' 0
  elif "$programs/larder-worker" generate --device cuda --model tests/model/tiny_qwen2 --tokens 1 \
    --max-tokens 1 --pool-bytes 1MiB 2>&1 | grep -q 'built without CUDA'; then
    record restores 'skipped: this larder-worker was built without CUDA' 0
  else
    if check 'decode rates' decode_rates; then worker_rows+=("$build/decode_rates"); fi
    if check 'restores' restores; then worker_rows+=("$build/restores/rows"); fi
  fi
  if check 'figures' measure; then
    [[ ${#worker_rows[@]} -eq 0 ]] || cat "${worker_rows[@]}" >>"$build/figures.txt"
    python3 tests/bench/table.py "$build/figures.txt" "$json" || cat "$build/figures.txt"
  fi
fi

finish
[[ $failed -eq 0 ]]
