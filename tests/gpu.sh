#!/usr/bin/env bash
# Everything that needs a GPU, on any machine that has one: builds the CUDA kernels and their tests,
# runs them, measures, runs the tests again under compute-sanitizer, and ends with one table.
#
#   tests/gpu.sh [--quick] [--only STAGE,...] [--seconds N] [--json FILE] [PACKAGE]
#   tests/gpu.sh --package FILE.tar.xz
#
# Needs CUDA (12.4 or later), CMake (3.22 or later), ninja or make, a C++20 compiler and a GPU; nothing
# else that Larder needs has to be installed. Made for 16 cores and less than ten minutes.
#
# PACKAGE    larderd, larder and larder-worker, which then run on this GPU as well: what --package
#            made, or the folder that it unpacks to. They need glibc 2.36 or later, and the worker
#            cuBLAS (looked for in /usr/local/cuda and beside python3's torch) and a driver that is
#            not older than the CUDA that built it (CUDA 13: 580)
# --quick    the stages build, tests and daemon
# --only     of the stages build, tests, daemon, bandwidth, peers, figures, restores and sanitizers
#            those named, and build; this is also their order
# --seconds  when to be done, 560 where not said: a stage that is not by then is cut off. The
#            sanitizers, last, have what is left
# --json     also writes the figures, as tests/bench/run.sh does
# --package  makes PACKAGE, on a machine that can build Larder: the release build's programs and the
#            shared libraries that they need, without libc and cuBLAS
#
# The stage restores takes, by arithmetic, 30 GB of the GPU's memory, 25 GB of the host's and 9 GB of
# the drive. Peers are measured where python3 has torch. Logs are in build/gpu/logs; where $OUT names a
# folder, they, the figures and a description of the machine are left there as well. Exits with 1 when
# anything failed, and with 2, saying what is missing, when this machine cannot run it.
set -euo pipefail
self=$(readlink -f "$0")
called_from=$PWD
cd "$(dirname "$self")/.."

all_stages=build,tests,daemon,bandwidth,peers,figures,restores,sanitizers
build=$PWD/build/gpu
logs=$build/logs
rows=$logs/rows       # a line a row: OUTCOME<tab>SECONDS<tab>NAME
figures=$logs/figures # a JSON object a line
peers=$logs/peers     # lines: name microseconds

die() {
  printf 'gpu.sh: %s\n' "$1" >&2
  exit 2
}
# absolute PATH: as seen from where we were called.
absolute() { (cd "$called_from" && realpath -m -- "$1"); }

# ---- Flags

only=$all_stages deadline=560 json='' make_package='' package=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --quick) only=build,tests,daemon ;;
    --only | --seconds | --json | --package)
      [[ $# -ge 2 ]] || die "$1 needs a value"
      case $1 in
        --only) only=$2 ;;
        --seconds) deadline=$2 ;;
        --json) json=$(absolute "$2") ;;
        --package) make_package=$(absolute "$2") ;;
      esac
      shift
      ;;
    --only=* | --seconds=* | --json=* | --package=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$self"
      exit 0
      ;;
    -*) die "unknown option '$1'; see --help" ;;
    *)
      [[ -z $package ]] || die "one PACKAGE at most, given '$package' and '$1'"
      package=$(absolute "$1")
      ;;
  esac
  shift
done
[[ $deadline =~ ^[0-9]+$ ]] || die "--seconds: '$deadline' is no whole number"
for name in ${only//,/ }; do
  [[ ,$all_stages, == *,$name,* ]] || die "--only: '$name' is no stage; allowed: $all_stages"
done
wanted() { [[ ,$only, == *,$1,* ]]; }

if [[ -n $make_package ]]; then exec tests/gpu/package.sh "$make_package"; fi

# ---- Stages: what is run, for how long, and what came of it

child='' running='' # the process that runs now, and its stage

time_left() { [[ $SECONDS -lt $deadline ]]; }

# limited SECONDS COMMAND...: at most so long, and not past the deadline; else 124 or 137.
limited() {
  local limit=$1 status=0
  shift
  [[ $limit -lt $((deadline - SECONDS)) ]] || limit=$((deadline - SECONDS))
  [[ $limit -gt 0 ]] || return 124
  timeout -k 5 "$limit" "$@" 3>&- &
  child=$!
  wait "$child" || status=$?
  child=''
  return "$status"
}

# record NAME OUTCOME SECONDS, with OUTCOME passed, or failed, skipped or timed out and why
record() {
  printf '%-34s %5d s  %s\n' "$1" "$3" "$2"
  printf '%s\t%d\t%s\n' "$2" "$3" "$1" >>"$rows"
}

# stage NAME SECONDS COMMAND...: one thing that works or does not. Its log, by name: log_of NAME.
log_of() { printf '%s/%s.log' "$logs" "${1//[ \/]/-}"; }
stage() {
  local name=$1 limit=$2 started=$SECONDS status=0 outcome
  shift 2
  if ! time_left; then
    record "$name" 'skipped: no time left' 0
    return 1
  fi
  running=$name
  limited "$limit" "$@" >"$(log_of "$name")" 2>&1 || status=$?
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="failed: cut off" ;;
    *) outcome="failed: exit status $status" ;;
  esac
  record "$name" "$outcome" $((SECONDS - started))
  [[ $status -eq 0 ]] || tail -n 12 "$(log_of "$name")" | cut -c 1-200 | sed 's/^/    /'
  return "$status"
}

# Sanitizers that passed are one line a tool.
print_rows() {
  awk -F '\t' '
    $1 == "passed" && $3 ~ /^(mem|race|sync|init)check / {
      tool = substr($3, 1, 9); passed[tool]++; seconds[tool] += $2; next
    }
    { printf "%-34s %5d s  %s\n", $3, $2, $1 }
    END { for (tool in passed) printf "%-34s %5d s  %d passed\n", tool, seconds[tool], passed[tool] }
  ' "$rows"
}
count() { grep -c "^$1" "$rows" || true; }

leave_results() {
  [[ -d ${OUT:-} ]] || return 0
  cp "$logs/machine.log" "$OUT/machine.txt" || true
  [[ ! -s $figures ]] || cp "${json:-$figures}" "$OUT/figures.json" || true
  tar -czf "$OUT/logs.tgz" -C "$build" logs || true
}

# The end, whatever brought it: the table of what is known.
finish() {
  local status=$?
  trap - EXIT TERM INT
  if [[ -n $child ]]; then
    kill "$child" 2>/dev/null || true
    record "$running" 'failed: cut off by a signal' 0
  fi
  jobs -p | xargs -r kill 2>/dev/null || true
  if [[ -s $figures ]]; then
    printf '\n'
    python3 tests/bench/table.py "$figures" "$json" || cat "$figures"
  fi
  printf '\n' && print_rows
  printf '\n%d passed, %d failed, %d skipped, %d timed out, in %d s\n' "$(count passed)" \
    "$(count failed)" "$(count skipped)" "$(count timed)" "$SECONDS"
  leave_results
  [[ $status -ne 0 || $(count failed) -eq 0 ]] || status=1
  exit "$status"
}

# ---- What this machine has

export PATH=$PATH:/usr/local/cuda/bin
missing=()
for tool in cmake "${CUDACXX:-nvcc}" "${CXX:-c++}"; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
command -v ninja >/dev/null || command -v make >/dev/null || missing+=('ninja or make')
[[ ${#missing[@]} -eq 0 ]] || die "cannot build: no $(IFS=, && printf '%s' "${missing[*]}") on the PATH"
[[ -z $package || -e $package ]] || die "$package: there is no such package; make it with --package"

mkdir -p "$logs"
find "$logs" -mindepth 1 -delete
touch "$rows" "$figures" "$peers"
exec 3>&1 # while a stage runs, 1 and 2 are its log
trap 'finish >&3 2>&3' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

describe_machine() {
  local command
  for command in 'uname -a' 'ldd --version' 'nproc' 'free -m' 'df -h .' 'cmake --version' \
    "${CUDACXX:-nvcc} --version" "${CXX:-c++} --version" 'nvidia-smi -L' 'nvidia-smi -q'; do
    printf '$ %s\n' "$command"
    # shellcheck disable=SC2086  # its words
    limited 30 $command || true
  done
}
describe_machine >"$logs/machine.log" 2>&1

# ---- build, tests

build_all() {
  local generator=() keep_going=(-k)
  if command -v ninja >/dev/null; then generator=(-G Ninja) keep_going=(-k 0); fi
  [[ ! -e $build/CMakeCache.txt ]] || generator=()
  [[ ! -e $build/Makefile ]] || keep_going=(-k)
  rm -f "$build"/gpu_* # what does not build must not be found
  stage configure 60 cmake -S tests/gpu -B "$build" "${generator[@]}" || exit 1
  stage build 420 cmake --build "$build" --parallel "$(nproc)" -- "${keep_going[@]}" || true
}

# again TEST: each case in a process of its own, since one that ends the program hides the others.
again() {
  local case
  for case in $("$build/$1" --list 2>/dev/null); do stage "$1 $case" 20 "$build/$1" "$case" || true; done
}

run_tests() {
  local test
  for test in "${tests[@]}"; do stage "$test" 90 "$build/$test" || again "$test"; done
}

# ---- daemon, restores

# starts PROGRAM: a library that only this machine lacks is no failure.
starts() {
  local log=$logs/$1.log
  if limited 30 "$programs/$1" --help >"$log" 2>&1; then return 0; fi
  record "$1" "skipped: $(tail -n 1 "$log" | cut -c 1-150)" 0
  return 1
}

# Sets programs: the folder of those that can start, or nothing.
programs=''
open_package() {
  local torch
  if [[ -z $package ]]; then
    record 'daemon, restores' 'skipped: no PACKAGE' 0
    return
  fi
  programs=$package
  if [[ -f $package ]]; then
    programs=$build/package
    rm -rf "$programs" && mkdir "$programs"
    stage unpack 60 tar -xf "$package" -C "$programs" || { programs='' && return; }
  fi
  torch=$(python3 -c 'import glob, nvidia
print(":".join(lib for path in nvidia.__path__ for lib in glob.glob(path + "/*/lib")))' 2>/dev/null) || true
  [[ -z $torch ]] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$torch
  starts larderd && starts larder || programs=''
}

# decode_rate NAME FLAG...: sets rate, the tokens a second of a small model, whose kernels are over sooner
# than they are launched.
rate=''
decode_rate() {
  stage "$1" 60 "$programs/larder-worker" generate --json --device cuda \
    --random-weights tests/bench/qwen2_0_5b.json --tokens "$(seq -s, 1 16)" --max-tokens 1024 \
    --pool-bytes 256MiB "${@:2}" || return
  rate=$(grep -o '"decode_tokens_per_second":[0-9.]*' "$(log_of "$1")" | cut -d : -f 2) ||
    { record "$1" 'failed: it prints no rate' 0 && return 1; }
}

# With CUDA graphs and without.
decode_rates() {
  local sequences with
  for sequences in 1 8; do
    decode_rate "decode $sequences" -n "$sequences" || return 0
    with=$rate
    decode_rate "decode $sequences, no graphs" -n "$sequences" --no-cuda-graphs || return 0
    awk -v name="gpu_decode_graphs_$sequences" -v with="$with" -v without="$rate" 'BEGIN {
      printf "{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"tokens/s\", \"against\": \"kernels \
launched one by one: %.6g tokens/s\", \"ratio\": %.4g, \"goal\": \">= 1.00\", \"met\": %s}\n",
        name, with, without, with / without, (with >= without) ? "true" : "false"}' >>"$figures"
  done
}

# What decoding gains by graphs, and a first token's time at Llama 3's shape of 8 billion parameters: cold,
# and with prefixes of 8,192 to 32,768 tokens in each tier.
restores() {
  local folder
  starts larder-worker || return 0
  limited 60 "$programs/larder-worker" generate --device cuda --model tests/model/tiny_qwen2 \
    --tokens 1 --max-tokens 1 --pool-bytes 1MiB >"$logs/worker.log" 2>&1 || true
  if grep -q 'built without CUDA' "$logs/worker.log"; then
    record restores 'skipped: this larder-worker was built without CUDA' 0
    return
  fi
  decode_rates
  rm -rf "$build/restores" && mkdir "$build/restores"
  folder=$(mktemp -d) # a short name: a socket's path has 108 characters
  ln -s "$build/restores" "$folder/d"
  stage restores 240 "$programs/larder-worker" bench restore --device cuda \
    --random-weights tests/gpu/llama3_8b.json --prefix-tokens 32768 --chunk-tokens 2048 \
    --larderd "$programs/larderd" --directory "$folder/d" --output "$build/restores" \
    --rows "$build/restores/rows" || true
  cat "$build/restores/rows" >>"$figures" 2>/dev/null || true
  rm -rf "$folder"
}

# ---- bandwidth, peers, figures: what was printed counts, also where the program then failed

bandwidth() {
  stage bandwidth 120 "$build/gpu_storage_bandwidth" || true
  # Its lines are: name, GB/s, GB/s of one large copy, ratio.
  [[ -e $(log_of bandwidth) ]] || return 0
  awk '/^gpu_/ && NF == 4 {printf "{\"name\": \"%s\", \"value\": %s, \"unit\": \"GB/s\", \
\"against\": \"one large copy of pinned memory: %s GB/s\", \"ratio\": %s, \"goal\": \"report\", \
\"met\": null}\n", $1, $2, $3, $4}' "$(log_of bandwidth)" >>"$figures"
}

measure_peers() {
  if ! limited 60 python3 -c 'import torch; torch.zeros(1, device="cuda")' >"$logs/torch.log" 2>&1; then
    record peers 'skipped: python3 has no torch that finds the GPU' 0
    return
  fi
  stage peers 120 python3 tests/gpu/torch_peer.py || true
  grep -E '^[a-z0-9_]+ [0-9.e+]+$' "$(log_of peers)" >"$peers" 2>/dev/null || true
}

measure() {
  stage figures 120 "$build/gpu_bench" "$peers" || true
  grep '^{.*}$' "$(log_of figures)" >>"$figures" 2>/dev/null || true
}

# ---- sanitizers

# sanitise TOOL TEST: each case of the test with one seed, where it has seeds.
sanitise() {
  local tool=$1 test=$2 started=$SECONDS status=0 log=$logs/$1-$2.log arguments=(--seed=1) outcome
  trap '[[ -z $child ]] || kill "$child"; exit 143' TERM
  [[ $test != gpu_storage* ]] || arguments=()
  limited 180 compute-sanitizer --tool "$tool" --error-exitcode 86 "$build/$test" "${arguments[@]}" \
    >"$log" 2>&1 || status=$?
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome='timed out' ;;
    *) if grep -q SUMMARY "$log"; then
      outcome="failed: exit status $status; $(grep SUMMARY "$log" | tail -n 1)"
    else
      outcome="skipped: $(tail -n 1 "$log" | cut -c 1-100)"
    fi ;;
  esac
  record "$tool $test" "$outcome" $((SECONDS - started))
}

# Six at a time. Those of shared memory have nothing to see in a program without kernels.
run_sanitizers() {
  local tool test
  if ! command -v compute-sanitizer >/dev/null; then
    record sanitizers 'skipped: no compute-sanitizer on the PATH' 0
    return
  fi
  (sanitise memcheck "${tests[0]}")
  ! grep -q '^skipped.*memcheck' "$rows" || return 0 # it does not work here
  for tool in memcheck racecheck synccheck initcheck; do
    for test in "${tests[@]}"; do
      [[ $tool$test != "memcheck${tests[0]}" ]] || continue
      [[ $tool == memcheck || $test != gpu_storage* ]] || continue
      while [[ $(jobs -rp | wc -l) -ge 6 ]]; do wait -n || true; done
      if ! time_left; then
        record "$tool $test, and what follows" 'skipped: no time left' 0
        break 2
      fi
      sanitise "$tool" "$test" &
    done
  done
  wait
}

# ---- All of it

build_all
limited 30 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader ||
  { record gpu 'skipped: built everything, ran nothing: nvidia-smi is missing or finds no GPU' 0 && exit 2; }
mapfile -t tests < <(cd "$build" && ctest --show-only | sed -n 's/^ *Test *#[0-9]*: *//p')
if [[ ${#tests[@]} -eq 0 ]]; then
  record tests 'failed: ctest is missing, or lists none' 0
  exit 1
fi
if wanted tests; then run_tests; fi
if wanted daemon || wanted restores; then open_package; fi
if wanted daemon && [[ -n $programs ]]; then
  stage daemon 180 tests/gpu/end_to_end.sh "$programs" cuda "$logs" || true
fi
if wanted bandwidth; then bandwidth; fi
if wanted peers; then measure_peers; fi
if wanted figures; then measure; fi
if wanted restores && [[ -n $programs ]]; then restores; fi
if wanted sanitizers; then run_sanitizers; fi
