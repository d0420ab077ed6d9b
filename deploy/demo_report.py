#!/usr/bin/env python3
"""The table at the end of deploy/demo.sh: demo_report.py RESULT.json BLOCK_TOKENS.

Reads what `larder replay --json` printed. Exits with 1 if the replay does not show what the demo
tells: two daemons, no wrong byte, nothing left undone, hits from every tier.
"""

import json
import sys

TIERS = (("GPU", "gpu"), ("HOST", "host"), ("NVMe", "nvme"))


def rows(phases, block_tokens):
    """Lines of the table: a title and one text a phase."""
    def tokens(blocks):
        return f"{blocks * block_tokens:,}"

    def part(phase, blocks):
        return f"{tokens(blocks)} ({blocks / max(phase['block_refs'], 1):.0%})"

    yield "requests", [f"{phase['requests']:,}" for phase in phases]
    yield "tokens asked", [tokens(phase["block_refs"]) for phase in phases]
    for name, key in TIERS:
        yield f"  served from {name}", [part(phase, phase["hits_by_tier"][key]) for phase in phases]
    yield "  computed", [part(phase, phase["computed"]) for phase in phases]
    yield "bytes verified", [f"{phase['bytes_verified'] / 1e9:.2f} GB" for phase in phases]
    yield "wrong bytes", [f"{phase['bytes_wrong']:,}" for phase in phases]


def problems(result):
    if len(result["phases"]) != 2:
        yield f"{len(result['phases'])} daemons served instead of 2"
    if result["bytes_wrong"]:
        yield f"{result['bytes_wrong']} bytes were wrong"
    if result["undone"]:
        yield f"{result['undone']} requests were not completed"
    for name, key in TIERS:
        if not result["hits_by_tier"][key]:
            yield f"nothing was served from {name}"
    if not result["phases"][-1]["hits_by_tier"]["nvme"]:
        yield "nothing that was on NVMe survived the crash"


def main():
    with open(sys.argv[1]) as file:
        result = json.load(file)
    titles = ["before the crash", "after the crash", "all"]
    print(f"{'':<20}" + "".join(f"{title:>22}" for title in titles))
    for title, cells in rows(result["phases"][:2] + [result], int(sys.argv[2])):
        print(f"{title:<20}" + "".join(f"{cell:>22}" for cell in cells))
    saved = result["block_hits"] / max(result["block_refs"], 1)
    print(f"\nWithout a cache all of these tokens would have been computed; {saved:.0%} were not.")
    found = list(problems(result))
    for problem in found:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
