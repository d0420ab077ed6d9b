#!/usr/bin/env bash
# The release build's larderd, larder and larder-worker, with the shared libraries that another machine
# may lack, in one archive for tests/gpu.sh: package.sh FILE.tar.xz
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
[[ $# -eq 1 ]] || { printf 'package.sh: needs the name of the archive\n' >&2 && exit 2; }

# Copies a program and, by the loader's own list, the libraries that another machine may lack.
package_program() {
  local program=$1 to=$2 library
  install -m 755 "$program" "$to/libexec/"
  while read -r library; do
    case ${library##*/} in
      ld-linux* | libc.so* | libm.so* | libdl.so* | libpthread.so* | librt.so* | libresolv.so*) ;;
      libcublas*) ;; # hundreds of MB, and where CUDA is, it is
      *) install -m 644 "$library" "$to/lib/" ;;
    esac
  done < <(ldd "$program" | awk '$3 ~ /^\// {print $3}')
  # shellcheck disable=SC2016  # the wrapper's own variables
  printf '%s\n' '#!/bin/sh' 'here=$(dirname "$(readlink -f "$0")")' \
    'export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}:/usr/local/cuda/lib64"' \
    'exec "$here/libexec/$(basename "$0")" "$@"' >"$to/${program##*/}"
  chmod 755 "$to/${program##*/}"
}

cmake --preset release
cmake --build --preset release --parallel "$(nproc)" --target larderd larder larder-worker
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/lib" "$folder/libexec"
for program in server/larderd client/larder client/worker/larder-worker; do
  package_program "build/release/$program" "$folder"
done
strip --strip-unneeded "$folder"/lib/* "$folder"/libexec/*
for program in larderd larder larder-worker; do "$folder/$program" --help >/dev/null; done
tar -caf "$1" -C "$folder" .
printf '%s: larderd, larder, larder-worker and %d libraries, %s\n' "$1" \
  "$(find "$folder/lib" -type f | wc -l)" "$(du -h "$1" | cut -f 1)"
