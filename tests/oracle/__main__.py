"""``python -m tests.oracle [ROWGLOB ...] [-n N] [--seed S] [--list] [--word HEX]``: compare softhv with Unicorn."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from fnmatch import fnmatchcase

from tests.oracle.cases import Values, case
from tests.oracle.compare import Comparison, Report
from tests.oracle.exceptions import skip_of_row


def main() -> int:
    """Compare; exit status 1 when a row differs or has no case."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description="Compare softhv with Unicorn.")
    parser.add_argument("rows", nargs="*", default=["*"], help="globs over row names (default: all)")
    parser.add_argument("-n", type=int, default=500, help="cases per row (default 500)")
    parser.add_argument("--seed", default="1", help="the same seed gives the same cases")
    parser.add_argument("--show", type=int, default=2, help="mismatches printed per row (default 2)")
    parser.add_argument("--list", action="store_true", help="print the rows and their patterns")
    parser.add_argument("--word", type=lambda text: int(text, 16), help="compare this one instruction, N times")
    parser.add_argument("--interpreted", action="store_true", help="by the interpreter instead of compiled code")
    options = parser.parse_args()

    comparison = Comparison(not options.interpreted)
    if options.word is not None:
        return one_word(comparison, options.word, options.n, options.seed, options.show)
    chosen = [row for row in comparison.table.rows if any(fnmatchcase(row.name, glob) for glob in options.rows)]
    if options.list:
        for row in chosen:
            print(f"{row.name:24} {row.pattern}")
        return 0
    if not chosen:
        print(f"no row matches {' '.join(options.rows)}", file=sys.stderr)
        return 1
    started, total, bad = time.monotonic(), 0, []
    skipped: Counter[str] = Counter()
    for row in chosen:
        skip = skip_of_row(row.name)
        if skip is not None:
            print(f"skip {row.name}: {skip.reason}")
            skipped[f"rows: {skip.reason}"] += 1
            continue
        report = comparison.row(row, options.n, options.seed, stop_after=options.show)
        total += report.compared
        skipped.update({f"cases: {reason}": count for reason, count in report.skipped.items()})
        if report.mismatches or not report.compared:
            bad.append(row.name)
        print_report(row.name, report, options.show)
    elapsed = time.monotonic() - started
    for reason, count in skipped.most_common():
        print(f"not compared: {count} {reason}")
    print(f"{len(chosen)} rows, {total} cases, {total / elapsed:.0f} a second; {len(bad)} rows differ: {' '.join(bad)}")
    return 1 if bad else 0


def one_word(comparison: Comparison, word: int, count: int, seed: str, show: int) -> int:
    """Compare one instruction in ``count`` states."""
    row = comparison.table.find(word)
    if row is None:
        print(f"{word:08x} is in no row: UNDEFINED")
        return 1
    rng = random.Random(seed)
    comparison.reset_scratch(rng)
    values = Values(rng)
    cases = (case(row, word, values, rng, comparison.fpcr_bits, comparison.peek) for _ in range(count))
    report = comparison.run(cases, stop_after=show)
    print_report(row.name, report, show)
    return 1 if report.mismatches else 0


def print_report(name: str, report: Report, show: int) -> None:
    """One line per row, and its first mismatches."""
    ended = ", ".join(f"{count} {outcome.value}" for outcome, count in report.outcomes.most_common())
    skipped = "".join(f"; {count} skipped: {reason}" for reason, count in report.skipped.items())
    verdict = "DIFF" if report.mismatches else "ok  " if report.compared else "NONE"
    print(f"{verdict} {name}: {ended}{skipped}", flush=True)
    for mismatch in report.mismatches[:show]:
        print(f"  {mismatch}\n".replace("\n", "\n  "), flush=True)


if __name__ == "__main__":
    sys.exit(main())
