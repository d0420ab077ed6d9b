#!/usr/bin/env bash
# Runs the experiments of `larder-worker bench` and writes their tables into the README beside this
# file, between its marks.
#
#   client/worker/experiments.sh [EXPERIMENT...]
#
# Sets up and builds the release preset first. The model is tests/model/austen, and the text the
# chapters that it was not trained on; restore and prefetch are also run in the shape of
# Qwen2-0.5B with random weights. All of it takes about ten minutes. CSV files and SVG plots go to
# build/experiments. With EXPERIMENTs, only these are run again; the others' tables stay.
#
# LARDER_EXPERIMENTS_UNDER is a command that each run is started by, such as "taskset -c 0,1".
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly all=(work prefix restore paging heads prefetch speculation sinks)
readonly model=tests/model/austen shape=tests/bench/qwen2_0_5b.json
readonly output=build/experiments log=build/logs/experiments-build.log

for name in "$@"; do
  case $name in
    -h | --help)
      sed -n '2,13{s/^# \{0,1\}//;p}' client/worker/experiments.sh
      exit 0
      ;;
  esac
  [[ " ${all[*]} " == *" $name "* ]] || {
    printf "experiments.sh: unknown experiment '%s'; allowed: %s, --help\n" "$name" "${all[*]}" >&2
    exit 2
  }
done
wanted=("$@")
[[ $# -gt 0 ]] || wanted=("${all[@]}")

mkdir -p "$output" build/logs
if ! { deploy/setup.sh && cmake --preset release &&
  cmake --build --preset release --parallel "$(nproc)" --target larderd larder-worker; } \
  >"$log" 2>&1; then
  tail -n 40 "$log" >&2
  printf 'experiments.sh: the build failed: %s\n' "$log" >&2
  exit 1
fi

# measure EXPERIMENT NAME FLAG...: its tables to a file, which holds them until the next run.
measure() {
  printf -- '-- %s %s\n' "$1" "$2" >&2
  # shellcheck disable=SC2086  # a command and its arguments
  ${LARDER_EXPERIMENTS_UNDER-} build/release/client/worker/larder-worker bench "$1" "${@:3}" \
    --larderd=build/release/server/larderd --directory="$output" --output="$output/$2" \
    >"$output/$1.$2.new"
  mv "$output/$1.$2.new" "$output/$1.$2.txt"
}

held_out=$output/held_out.txt
[[ -s $held_out ]] || (cd tests/model && /usr/bin/python3 -B -c \
  'import corpus, sys; sys.stdout.buffer.write(corpus.split()[1])') >"$held_out"
for experiment in "${wanted[@]}"; do
  measure "$experiment" austen "--model=$model" "--text=$held_out"
  case $experiment in
    restore | prefetch) measure "$experiment" qwen2_0_5b "--random-weights=$shape" ;;
  esac
done

tables=$output/tables.txt
for experiment in "${all[@]}"; do
  for run in austen qwen2_0_5b; do
    [[ ! -s $output/$experiment.$run.txt ]] || cat "$output/$experiment.$run.txt"
  done
done >"$tables"
/usr/bin/python3 - client/worker/README.md "$tables" <<'PYTHON'
import pathlib
import sys

readme, tables = map(pathlib.Path, sys.argv[1:])
before, rest = readme.read_text().split("<!-- experiments -->\n")
_, after = rest.split("<!-- /experiments -->\n")
readme.write_text(f"{before}<!-- experiments -->\n```\n{tables.read_text().strip()}\n```\n"
                  f"<!-- /experiments -->\n{after}")
PYTHON
printf 'experiments.sh: client/worker/README.md has the tables, %s the plots\n' "$output" >&2
