"""Prints the rows that the benchmarks left, as a table: table.py LINES JSON [NAME...].

LINES holds a JSON object a line; JSON, unless empty, is where they go as one list. Of rows that
were measured beside those asked for nothing is said. A figure that could not be computed is null and
printed as "-". Exits with 1 when a NAME has no row or a line is no JSON, but prints the others.
"""

import json
import sys

COLUMNS = ["name", "value", "unit", "against", "ratio", "goal", "met"]
RIGHT = {"value", "ratio"}


def text(column, value):
    if column == "met":
        return {True: "yes", False: "NO", None: "-"}[value]
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float | int) else value


def read(lines):
    """The rows, and whether every line was one."""
    rows = []
    right = True
    with open(lines, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not row.keys() >= set(COLUMNS):
                    raise ValueError
                rows.append(row)
            except (ValueError, AttributeError):
                print(f"{lines}: not a row: {line.rstrip()}", file=sys.stderr)
                right = False
    return rows, right


def main(lines, target, names):
    rows, right = read(lines)
    missing = [name for name in names if name not in {row["name"] for row in rows}]
    if names:
        rows = [row for row in rows if row["name"] in names]
    if target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)
            file.write("\n")
    table = [COLUMNS] + [[text(column, row[column]) for column in COLUMNS] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table)]
    for cells in table:
        print("  ".join(
            cell.rjust(width) if column in RIGHT else cell.ljust(width)
            for column, cell, width in zip(COLUMNS, cells, widths)).rstrip())
    for name in missing:
        print(f"run.sh: {name}: no figure of this name was measured", file=sys.stderr)
    return 0 if right and not missing else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
