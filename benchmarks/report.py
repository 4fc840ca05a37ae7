"""Figures as tables: medians over the rounds, and medians of the ratios within each round.

What was measured comes as {system: {figure: [its value in every round]}}; the value of a figure that
could not be measured is a Failed.
"""

import itertools
import statistics

from load import Failed
from measurements import RIVALS, Skipped

NOT_MEASURED = [Failed("not measured")]


def median(values):
    """Return the median over the rounds; a Failed if one of them failed."""
    failed = [value for value in values if isinstance(value, Failed)]
    return failed[0] if failed else statistics.median(values)


def ratios(figure, ours, theirs):
    """Return in each round how many times better the first is: 2 where it is twice as fast or costs half."""
    pairs = [pair for pair in zip(ours, theirs, strict=False) if not any(isinstance(value, Failed) for value in pair)]
    if not figure.endswith("per_s"):
        pairs = [(theirs, ours) for ours, theirs in pairs]
    return [better / worse for better, worse in pairs if better > 0 and worse > 0]


def text(value):
    if isinstance(value, Failed):
        return "-" if isinstance(value, Skipped) else "FAILED"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(found):
    """Return the median of ratios as text."""
    return f"{statistics.median(found):.2f}" if found else "-"


def print_single(results, tasks, system):
    """Print a table of a single node beside the servers it is compared with; a row for each task."""
    rivals = [rival.name for rival in RIVALS]
    systems = [results.get(name, {}) for name in (system, *rivals)]
    units = f"{'per s':>8} {'p50 ms':>8} {'p99 ms':>8}"
    print(f"\n{'one node':31}", *(f"{name:^26}" for name in (system, *rivals)), f"{'times as fast as':>25}")
    print(f"{'':31}", *[units] * len(systems), *(f"{name:>12}" for name in rivals))
    for task in tasks:
        columns = [[found.get(figure, NOT_MEASURED) for figure in task.figures] for found in systems]
        cells = [f"{text(median(values)):>8}" for column in columns for values in column]
        per_s, *others = (column[0] for column in columns)
        cells += [f"{times(ratios('per_s', per_s, other)):>12}" for other in others]
        print(f"{next(iter(task.figures)).removesuffix(', per_s'):31}", *cells)


def print_figures(results, tasks):
    """Print a line for each figure of these tasks, of whatever system it is."""
    print()
    for figure, what in _figures(tasks):
        for found in results.values():
            if figure in found:
                print(f"{what:70} {text(median(found[figure])):>8}")


def print_pair(results, tasks, theirs, ours):
    """Print a line for each figure of two checkouts, and how many times better ours is."""
    print(f"\n{'':70} {theirs:>20} {ours:>20} {'times better':>13}  least to most")
    for figure, what in _figures(tasks):
        values = [results.get(name, {}).get(figure, NOT_MEASURED) for name in (theirs, ours)]
        found = ratios(figure, *reversed(values))
        spread = f"{min(found):.2f} to {max(found):.2f}" if found else ""
        print(f"{what:70}", *(f"{text(median(of)):>20}" for of in values), f"{times(found):>13}  {spread}".rstrip())


def _figures(tasks):
    return [figure for task in tasks for figure in task.figures.items()]


def print_failures(results):
    failures = itertools.chain(*(values for figures in results.values() for values in figures.values()))
    for reason in dict.fromkeys(str(value) for value in failures if isinstance(value, Failed)):
        print(f"\nNot measured: {reason}")
