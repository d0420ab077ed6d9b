#!/usr/bin/env bash
# Installs what a fresh Debian 12 or Ubuntu 24.04 lacks to build, test and run Larder.
#
#   deploy/setup.sh           install what is missing (asks for root through sudo)
#   deploy/setup.sh --check   only say what is missing; exit 1 if anything is
#
# Everything comes from the distribution's own archive. When nothing is missing this is one
# dpkg-query: no network, no root.
set -euo pipefail

# One package a word. "a|b": whichever the distribution has, the first one preferred.
packages=(
  # Tools. clang for the sanitizers and for -Wthread-safety, which GCC does not know; llvm names
  # functions in a sanitizer's report.
  g++ clang libclang-rt-dev llvm
  cmake ninja-build 'pkg-config|pkgconf'
  # RPC: library, code generators, Abseil.
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev
  # NVMe tier: its I/O, the index and its checksums. SHA-256 of block keys: OpenSSL.
  liburing-dev librocksdb-dev libxxhash-dev libssl-dev
  # Daemon and command line: metrics, logs, flags, JSON.
  prometheus-cpp-dev libspdlog-dev libcli11-dev nlohmann-json3-dev
  # Worker: matrix products.
  libdnnl-dev
  # Plots of the worker's experiments; they do without.
  gnuplot-nox
  # Tests and benchmarks.
  libgtest-dev libgmock-dev libbenchmark-dev python3 python3-grpcio python3-protobuf
)

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Prints the packages that are not installed, one a line.
missing_packages() {
  local installed alternatives name found
  installed=" $(dpkg-query --show --showformat='${db:Status-Status}/${binary:Package} ' \
    "${packages[@]//|*/}" pkgconf 2>/dev/null || true)"
  installed=${installed//:amd64/}
  installed=${installed//:arm64/}
  for alternatives in "${packages[@]}"; do
    found=no
    for name in ${alternatives//|/ }; do
      [[ $installed == *" installed/$name "* ]] && found=yes
    done
    [[ $found == yes ]] || printf '%s\n' "$alternatives"
  done
}

# Of "a|b", the first that the package lists offer.
choose() {
  local name
  for name in ${1//|/ }; do
    if apt-cache show "$name" >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "no package of '$1' is offered by this distribution's archive"
}

install_packages() {
  local root=() chosen=() alternatives
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo >/dev/null || fail "missing: $*. Run this as root, or install sudo."
    root=(sudo)
  fi
  say "installing: $*"
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq ||
    fail "apt-get update failed; is the network up?"
  for alternatives in "$@"; do chosen+=("$(choose "$alternatives")"); done
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${chosen[@]}" >/dev/null ||
    fail "apt-get install failed: ${chosen[*]}"
}

main() {
  case ${1-} in
    '' | --check) ;;
    -h | --help)
      sed -n '2,8{s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    *) fail "unknown argument '$1'; allowed: --check, --help" ;;
  esac
  command -v dpkg-query >/dev/null ||
    fail "this is neither Debian nor Ubuntu; install the equivalents of: ${packages[*]}"

  local missing
  mapfile -t missing < <(missing_packages)
  if [[ ${#missing[@]} -gt 0 ]]; then
    if [[ ${1-} == --check ]]; then
      say "missing: ${missing[*]}"
      exit 1
    fi
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    [[ ${#missing[@]} -eq 0 ]] || fail "still missing after the installation: ${missing[*]}"
  fi
  # A python3 from pyenv or conda earlier in PATH does not see the distribution's modules, so
  # tests and demo name this one.
  [[ -x /usr/bin/python3 ]] || fail "/usr/bin/python3 is not there, although python3 is installed"
  say "everything is installed"
}

main "$@"
