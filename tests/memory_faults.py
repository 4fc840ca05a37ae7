"""Lets every single allocation of an operation fail once, and looks whether the counter is still right.

    python tests/memory_faults.py [OPERATION ...]    prints a line for each; exit status 1 if a count was wrong

Each attempt runs in a process of its own: a failing allocation may end the interpreter, which is a
crash, and no wrong count.
"""

import _testcapi
import faulthandler
import os
import sys
import traceback
from collections import Counter as Tally
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from counter import Counter, Delta, cancelling_replica, key_digest
from counter.windows import is_window, present_window

A, B, C, D, E = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "abcde")
AFTER_ALL_S, WALL = 1.0, 500 * 3600.0  # WALL: seconds since 1970


def new():
    """Return a counter with something of everything in it."""
    counter = Counter(B, key_window_s=60, wall=lambda: WALL)
    for number in range(40):
        counter.increment(f"n{number}")
    counter.increment_once("mine", "x", 5, 0)
    for number in range(3):
        counter.increment(f"w{number}@1h")
    old = {f"w{number}@1h:60/{number % 3}": (number + 1, 1) for number in range(9)}
    counter.merge(Delta(C, 0, 9, old), 0)
    counter.end_windows(61 * 3600)  # which those of number 0 have, so some counters to come get their numbers
    counter.merge(Delta(A, 0, 40, {f"a{number}": (number + 1, 2**40) for number in range(40)}), 0)
    counter.merge(willed(D), 0)
    return counter


def merging(replica, after, names, *keys):
    """Return an operation that merges entries of these names, and keys."""
    totals = {name: (after + 1 + place, 2**62) for place, name in enumerate(names)}
    keys = tuple((sequence, key_digest(key), *use, 0.0) for sequence, key, *use in keys)
    return lambda counter: counter.merge(Delta(replica, after, after + len(names), totals, keys), 1)


def cancelling(counter):
    """Merge what cancels a dot of another node, as someone found out who still had its key."""
    dots = (A, 39), (B, 40)
    totals = {"n39": (1, -1)}
    return counter.merge(Delta(cancelling_replica(dots[1]), 0, 1, totals, (), dots), 1)


def willed(replica):
    """Return all that a replica did, which ended, and which this one may absorb."""
    return Delta(replica, 0, 5, {f"w{number}": (number + 1, 2**40) for number in range(4)}, heir=B)


def absorbed(counter):
    """Merge a history into which two replicas were absorbed, of which one is known."""
    totals = {f"w{number}": (19, 2**40) for number in range(4)}
    return counter.merge(Delta(C, 9, 19, totals, absorbed={E: (5, C, 14, 14), D: (5, C, 19, 19)}), 1)


OPERATIONS = {
    "a counter is new": lambda counter: counter.increment("new", 10**6),
    "a counter is known": lambda counter: counter.increment("n1", 10**6),
    "a counter is known from a peer": lambda counter: counter.increment("a1", 10**6),
    "a key is new": lambda counter: counter.increment_once("k", "n1", 10**6, 0),
    "a key and its counter are new": lambda counter: counter.increment_once("k", "new", 10**6, 0),
    "a key is used anew": lambda counter: counter.increment_once("mine", "x", 5, 61),
    "a batch": lambda counter: counter.increment_many({"n1": 10**6, "a1": 2**40, "new": 1, "n2": -1, "newer": 1}),
    "a batch has a key": lambda counter: counter.increment_many_once("k", {"n1": 10**6, "a1": 2**40, "new": 1}, 0),
    "a replica is new": merging(C, 0, [f"c{number}" for number in range(40)], (1, "k1", "c0", 1), (3, "k2", "c2", 1)),
    "a replica counted on": merging(A, 40, ["a1", "n1", "new", "a2"], (42, "k", "n1", 1)),
    "a total exceeds 64 bits": lambda counter: counter.merge(Delta(A, 40, 41, {"a1": (41, 2**70)}), 1),
    "a key was taken twice": merging(A, 40, ["x"], (41, "mine", "x", 5)),
    "a dot was cancelled elsewhere": cancelling,
    "a window is new": lambda counter: counter.increment("new@1h"),
    "a window and its key are new": lambda counter: counter.increment_once("k", "new@1h", 5, 0),
    "a batch has windows": lambda counter: counter.increment_many_once("k", {"new@1h": 1, "w1@1h": 2, "newer": 3}, 0),
    "a window comes from a peer": merging(A, 40, [f"c{number}@1h:60/9" for number in range(4)]),
    "a window that ended comes from a peer": merging(
        A, 40, ["c@1h:60/0", "new", "d@1h:60/0"], (41, "k", "c@1h:60/0", 1)
    ),
    "a replica ended": lambda counter: counter.merge(willed(E), 1),
    "a replica is absorbed": lambda counter: counter.absorb(),
    "replicas were absorbed": absorbed,
    "this replica ends": lambda counter: counter.end(A),
    "keys are forgotten": lambda counter: counter.expire(1000),
}


def snapshot(counter):
    """Return all that others can see of a counter, and assert that it fits together."""
    counter.expire(AFTER_ALL_S)  # and settle what could not be settled
    held = {delta.replica: delta for delta in counter.deltas({}, float("inf"), AFTER_ALL_S)}
    totals = Tally()
    for delta in held.values():
        for name, (_, total) in delta.totals.items():
            totals[name] += total
    values, _ = counter.list("", "", 10**6)
    plain = {name: count for name, count in totals.items() if not is_window(name)}
    assert {name: count for name, count in values.items() if "@" not in name} == plain, "values are not the sums"
    windows = {name: counter.windows(name, 2) for name in values if "@" in name}
    for name, counts in windows.items():
        for start, count in counts:
            assert count == totals[present_window(name, start)], name
    assert counter.vector() == {replica: delta.through for replica, delta in held.items()}
    for replica, delta in held.items():
        assert delta.through >= max((sequence for sequence, _ in delta.totals.values()), default=0)
        for after in range(0, delta.through, 7):
            late = {name: entry for name, entry in delta.totals.items() if entry[0] > after}
            assert counter.delta(replica, after, AFTER_ALL_S).totals == late
    return held, values, windows, counter.sizes(), counter.held_windows


def attempt(operation, place, before, after):
    """Run an operation with one failing allocation; return whether it failed."""
    counter, failed = new(), False
    _testcapi.set_nomemory(place, place + 1)
    try:
        operation(counter)
    except MemoryError:
        failed = True
    finally:
        _testcapi.remove_mem_hooks()
    found = snapshot(counter)
    assert found == after or (failed and found == before), "half done"
    operation(counter)  # again, as a peer does; a key is a repetition then
    snapshot(counter)
    return failed


UNHARMED, FAILED, WRONG = 10, 11, 12  # exit statuses of attempts


def outcomes(operation):
    """Return {exit status: how often} of attempts at one allocation after the other, until none fails."""
    statuses, place, unharmed, done = Tally(), 0, 0, new()
    before, _ = snapshot(new()), operation(done)
    after = snapshot(done)
    while unharmed < 3:  # one failure may be without effect
        child = os.fork()
        if child == 0:
            status = WRONG
            faulthandler.dump_traceback_later(20, exit=True, file=sys.stdout)
            try:
                status = FAILED if attempt(operation, place, before, after) else UNHARMED
            except BaseException as error:
                if "attribute name must be string" in str(error):
                    os.abort()  # CPython 3.13 has broken its own code for want of memory, and is at its end
                if not statuses[WRONG]:
                    print(f"allocation {place}:")
                    traceback.print_exc(file=sys.stdout)
                    sys.stdout.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        statuses[status] += 1
        unharmed = unharmed + 1 if status == UNHARMED else 0
        place += 1
    return statuses


def main():
    wrong = False
    for name in sys.argv[1:] or OPERATIONS:
        found = outcomes(OPERATIONS[name])
        crashes = sum(number for status, number in found.items() if status < 0)
        bad = sum(found.values()) - found[FAILED] - found[UNHARMED] - crashes
        print(f"{name}: {found[FAILED]} changed nothing, {bad} did harm, {crashes} ended the interpreter", flush=True)
        wrong = wrong or bad or not found[FAILED]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
