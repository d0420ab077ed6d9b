#!/usr/bin/env bash
# Measures, and prints one table: a row a figure.
#
#   tests/bench/run.sh [--json FILE] [NAME...]
#
# Sets up and builds the release preset first. NAMEs are rows of the table
# (tests/bench/README.md lists them); without any, all are measured, which takes about seven minutes.
# --json also writes the table as a list of objects with the keys name, value, unit, against,
# ratio, goal, met.
#
# LARDER_BENCH_DIR is the folder for the NVMe figures; it needs 8 GiB and O_DIRECT. Standard:
# build/bench. LARDER_BENCH_BUILD names a build folder that is to be measured as it is.
#
# cpu_decode_over_torch needs PyTorch (Debian: python3-torch) and is left out, with a word, without.
# A goal that is missed is a row like any other. Exits with 1 when a figure could not be measured.
set -euo pipefail
cd "$(dirname "$0")/../.."

json=
names=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --json)
      [[ $# -ge 2 ]] || { printf 'run.sh: --json needs a file\n' >&2 && exit 2; }
      json=$(realpath -m -- "$OLDPWD/$2")
      [[ $2 == /* ]] && json=$2
      shift
      ;;
    --json=*)
      set -- --json "${1#--json=}" "${@:2}"
      continue
      ;;
    -h | --help)
      sed -n '2,15{s/^# \{0,1\}//;p}' tests/bench/run.sh
      exit 0
      ;;
    -*)
      printf "run.sh: unknown option '%s'; allowed: --json FILE, --help\n" "$1" >&2
      exit 2
      ;;
    *) names+=("$1") ;;
  esac
  shift
done

build=${LARDER_BENCH_BUILD:-}
if [[ -z $build ]]; then
  build=build/release
  log=build/logs/bench-build.log
  mkdir -p build/logs
  if ! { deploy/setup.sh && cmake --preset release &&
    cmake --build --preset release --parallel "$(nproc)" \
      --target bench_tree bench_nvme bench_daemon bench_kernels larderd larder-worker; } \
    >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    printf 'run.sh: the build failed: %s\n' "$log" >&2
    exit 1
  fi
fi
folder=${LARDER_BENCH_DIR:-build/bench}
mkdir -p "$folder"
folder=$(realpath -- "$folder")

lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
exit_code=0

# measure PROGRAM ARGUMENT...: its rows to the collection, what it says of the spread to stderr.
measure() {
  printf -- '-- %s\n' "$1" >&2
  "$build/tests/bench/$1" "${@:2}" "${names[@]}" >>"$lines" || exit_code=1
}

# wants PATTERN: whether rows of such names are asked for.
wants() {
  local name
  [[ ${#names[@]} -gt 0 ]] || return 0
  for name in "${names[@]}"; do
    # shellcheck disable=SC2053  # a pattern
    [[ $name != $1 ]] || return 0
  done
  return 1
}

# restore FLAG...: the rows of the worker's experiment; its table goes to stderr.
restore() {
  printf -- '-- larder-worker bench restore %s\n' "$1" >&2
  "$build/client/worker/larder-worker" bench restore "$@" "--larderd=$build/server/larderd" \
    "--directory=$folder" "--output=$folder/restore" "--rows=$lines" >&2 || exit_code=1
}

measure bench_tree
measure bench_daemon "--larderd=$build/server/larderd" "--directory=$folder"
measure bench_nvme "--larderd=$build/server/larderd" "--directory=$folder"
measure bench_kernels "--torch=tests/bench/torch_sdpa.py"
if wants 'ttft_*_over_cold'; then restore --random-weights=tests/bench/qwen2_0_5b.json; fi
if wants 'ttft_*_over_cold_trained'; then restore --model=tests/model/austen; fi

/usr/bin/python3 tests/bench/table.py "$lines" "$json" "${names[@]}" || exit_code=1
exit "$exit_code"
