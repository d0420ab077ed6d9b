#!/usr/bin/env bash
# The objects that are compiled for one instruction set define their table and nothing else that
# the linker could hand to the rest of the program (kernels/variant.h, rule 1).
#
#   check_linkage.sh NM OBJECT...
set -euo pipefail
nm=$1
shift
checked=0
for object in "$@"; do
  [[ $object == *variant_avx*.o ]] || continue
  checked=$((checked + 1))
  # Upper case: external; U: defined elsewhere; D and R: data.
  found=$("$nm" --demangle "$object" | grep -E ' [A-TV-Z] | [uvw] ' |
    grep -vE ' [DR] larder::kernels::k[A-Za-z0-9]+Variant$' || true)
  if [[ -n $found ]]; then
    printf '%s defines:\n%s\n' "$object" "$found" >&2
    exit 1
  fi
done
printf '%d variants define nothing but their table\n' "$checked"
