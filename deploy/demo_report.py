#!/usr/bin/env python3
"""What deploy/demo.sh prints of the JSON of `larder-worker generate`.

  demo_report.py stored RESULT.json           what was stored
  demo_report.py answer QUESTION RESULT.json  one text, and how long its first token took
  demo_report.py table DIRECTORY QUESTIONS    all runs; exits with 1 if they do not show what the
                                              demo tells
"""

import json
import pathlib
import sys
import textwrap

RUNS = (("without a cache", "computed"), ("from memory", "memory"),
        ("after the crash", "restarted"))
COLUMNS = ("question", "run", "prompt", "from GPU", "from HOST", "from NVMe", "computed",
           "first token", "same text")


def read(path):
    return json.loads(pathlib.Path(path).read_text())["prompts"][0]


def text_of(result):
    return result["completions"][0]["text"]


def reused(result):
    return sum(result["reused_tokens"].values())


def first_token(result):
    return f"{result['ttft_ms']:.1f} ms"


def stored(path):
    result = read(path)
    print(f"{result['prompt_tokens']:,} tokens computed, {result['published_blocks']} blocks of 16 "
          f"tokens stored{' on NVMe, too' if result['durable'] else ''}")
    return 0 if result["durable"] else 1


def answer(question, path):
    result = read(path)
    shown = " ".join((question + text_of(result)).split())
    print(f"first token after {first_token(result)}:")
    print(textwrap.indent(textwrap.fill(shown, 90), "    "))
    return 0


def row(question, name, result, expected):
    tiers = result["reused_tokens"]
    return (str(question + 1), name, f"{result['prompt_tokens']:,}", f"{tiers['gpu']:,}",
            f"{tiers['host']:,}", f"{tiers['nvme']:,}", f"{result['prompt_tokens_computed']:,}",
            first_token(result), "yes" if text_of(result) == expected else "NO")


def table(directory, questions):
    results = {(question, run): read(pathlib.Path(directory, f"{run}.{question}.json"))
               for question in range(questions) for _, run in RUNS}
    rows = [row(question, name, results[question, run],
                text_of(results[question, "computed"]))
            for question in range(questions) for name, run in RUNS]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    for cells in (COLUMNS, *rows):
        print("  ".join(cell.ljust(width) if i == 1 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(cells, widths))))
    print("\nTokens of each prompt whose keys and values were read from the tier, or computed.")
    problems = [f"question {cells[0]}, {cells[1]}: another text" for cells in rows
                if cells[-1] != "yes"]
    problems += [f"question {question + 1}: nothing was reused from memory"
                 for question in range(questions) if not reused(results[question, "memory"])]
    if not results[0, "restarted"]["reused_tokens"]["nvme"]:
        problems.append("nothing that was on NVMe survived the crash")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main():
    command, *arguments = sys.argv[1:]
    if command == "table":
        return table(arguments[0], int(arguments[1]))
    return {"stored": stored, "answer": answer}[command](*arguments)


if __name__ == "__main__":
    sys.exit(main())
