#!/usr/bin/env bash
# Everything that is tested, from a fresh checkout to one table.
#
#   tests/run.sh                 release, asan, tsan: some 35 minutes on two cores
#   tests/run.sh --quick         the release build and its tests only
#   tests/run.sh [...] NAME...   of the tests, those whose name matches one of these
#
# The last line is `N passed, N failed, N skipped`: tests, and one for each build. Exits with 1
# when anything failed. Logs are in build/logs.
set -euo pipefail
self=$(readlink -f "$0")
cd "$(dirname "$self")/.."

quick=no
names=()
for argument in "$@"; do
  case $argument in
    --quick) quick=yes ;;
    -h | --help)
      sed -n '2,9{s/^# \{0,1\}//;p}' "$self"
      exit 0
      ;;
    -*)
      printf "run.sh: unknown option '%s'; allowed: --quick, --help\n" "$argument" >&2
      exit 2
      ;;
    *) names+=("$argument") ;;
  esac
done

jobs=$(nproc)
logs=$PWD/build/logs
mkdir -p "$logs"
rm -f "$logs"/*
rows=()
failures=()
passed=0 failed=0 skipped=0

# The distribution's python3 comes first: it is the one that has grpc.
export PATH="/usr/bin:$PATH"
export ASAN_OPTIONS=${ASAN_OPTIONS-detect_stack_use_after_return=1}
export UBSAN_OPTIONS=${UBSAN_OPTIONS-print_stacktrace=1}
export TSAN_OPTIONS=${TSAN_OPTIONS-second_deadlock_stack=1}

# record STAGE SECONDS PASSED FAILED SKIPPED
record() {
  rows+=("$(printf '%-26s %7s %7s %7s %6d:%02d' "$1" "$3" "$4" "$5" $(($2 / 60)) $(($2 % 60)))")
  passed=$((passed + $3)) failed=$((failed + $4)) skipped=$((skipped + $5))
}

# check STAGE COMMAND...: one thing that works or does not.
check() {
  local stage=$1 log started=$SECONDS
  shift
  log=$logs/${stage// /-}.log
  printf '== %s\n' "$stage"
  if "$@" >"$log" 2>&1; then
    record "$stage" $((SECONDS - started)) 1 0 0
  else
    record "$stage" $((SECONDS - started)) 0 1 0
    failures+=("$stage: $log")
    tail -n 40 "$log"
    return 1
  fi
}

# build PRESET TARGET...
build() {
  local preset=$1
  shift
  check "build $preset" build_preset "$preset" "$@"
}

build_preset() {
  cmake --preset "$1" &&
    cmake --build --preset "$1" --parallel "$jobs" --target "${@:2}"
}

# A number from the first line of ctest's report, e.g. attribute REPORT tests
attribute() {
  sed -n "s/.*[^a-z]$2=\"\([0-9]*\)\".*/\1/p" "$1" | head -n 1
}

# run_tests PRESET
run_tests() {
  local preset=$1 stage="tests $1" started=$SECONDS report log filter=()
  report=$logs/tests-$preset.xml
  log=$logs/tests-$preset.log
  printf '== %s\n' "$stage"
  if [[ ${#names[@]} -gt 0 ]]; then
    filter=(--tests-regex "$(IFS='|' && printf '%s' "${names[*]}")")
  fi
  ctest --test-dir "build/$preset" --parallel "$jobs" --output-on-failure --no-tests=ignore \
    --output-junit "$report" "${filter[@]}" >"$log" 2>&1 || true
  local total bad left_out
  total=$(attribute "$report" tests)
  bad=$(attribute "$report" failures)
  left_out=$(($(attribute "$report" skipped) + $(attribute "$report" disabled)))
  if [[ -z $total ]]; then
    record "$stage" $((SECONDS - started)) 0 1 0
    failures+=("$stage: ctest did not run: $log")
    return
  fi
  record "$stage" $((SECONDS - started)) $((total - bad - left_out)) "$bad" "$left_out"
  if [[ $bad -gt 0 ]]; then
    failures+=("$stage: $log")
    tail -n 80 "$log"
  fi
}

deploy/setup.sh

if build release all; then
  run_tests release
fi
if [[ $quick == no ]]; then
  # With clang: its thread annotations, its warnings, and each header alone as well.
  if build asan all header_checks; then run_tests asan; fi
  # gRPC itself is not instrumented, so this is the part below it.
  if build tsan all; then run_tests tsan; fi
fi

printf '\n%-26s %7s %7s %7s %9s\n' stage passed failed skipped time
printf '%s\n' "${rows[@]}"
if [[ ${#failures[@]} -gt 0 ]]; then
  printf '\nfailed:\n'
  printf '  %s\n' "${failures[@]}"
fi
printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[[ $failed -eq 0 ]]
