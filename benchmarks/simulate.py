#!/usr/bin/env python3
"""How the cluster behaves as it grows: N real nodes without sockets and threads, on a virtual clock.

    python benchmarks/simulate.py --nodes 10 100 1000 --seeds 1 2 3 --save docs/scale.json --plot docs/scale.svg

Every node is the real Counter, PeerTable and Gossip; simulation.py carries their messages, and
everything random comes from the seed.  A run goes through the life of a cluster: a cold start through
one seed, idling, increments, a crash, a partition of both halves; and on its own, heavy loss.  Figures
that were saved before are kept, so that a long series can be run in parts; the table and the curves
show the medians over all seeds there are.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulation import Network

COLD_START_MAX_S, SETTLING_S, IDLE_S = 60, 15, 10
INCREMENTS, INCREMENT_EVERY_S, INCREMENT_MAX_S = 20, 0.5, 15  # of 20 the slowest stands for p99
CRASH_MAX_S, PARTITION_S, HEAL_MAX_S = 40, 60, 60
LIFE_S = COLD_START_MAX_S / 6 + SETTLING_S + IDLE_S + 25 + PARTITION_S + 10  # roughly, for the progress bar
WRITERS_MAX = 100  # nodes that count before anything is measured: so vectors are long, as in real life

FIGURES = {  # name -> (what the table and the curves call it, target or None)
    "messages": ("messages sent per idle node per second", 18),
    "bytes": ("bytes sent per idle node per second", None),
    "full_s": ("full membership after a cold start through one seed, s", 30),
    "known_p50_s": ("increment known by all nodes, median, s", None),
    "known_p99_s": ("increment known by all nodes, p99, s", 6),
    "gone_s": ("crashed node gone from every list, s", 15),
    "healed_s": ("all agree after a 60 s partition of both halves, s", 15),
    "false": ("false removals in a run without loss", 0),
    "false_loss": ("false removals in 10 minutes of 10 % loss", 0),
    "cpu_s": ("CPU of the simulation per simulated minute, s", 300),
}


class Links(Network):
    """A network in which every link has a delay of its own, with some jitter."""

    def __init__(self, seed, args):
        super().__init__(seed, args.loss, args.repeat, args.delay, as_json=False)
        self._distance_s = {}

    def start(self, address, seeds=()):
        self._distance_s[address] = self.delay_s * self.rng.uniform(0.25, 0.75)
        return super().start(address, seeds)

    def delay(self, sender, receiver):
        mean_s = self._distance_s[sender] + self._distance_s[receiver]
        return mean_s * (0.8 + self.rng.expovariate(5))  # a fifth of it is jitter


class Progress:
    """A bar on stderr, by the virtual time that has passed."""

    def __init__(self, title, total_s):
        self._title, self._total_s, self._started = title, total_s, time.monotonic()

    def show(self, now, phase=""):
        if sys.stderr.isatty() or not phase:
            done = min(1.0, now / self._total_s)
            bar = ("#" * round(30 * done)).ljust(30, ".")
            print(f"\r{self._title} [{bar}] {now:5.0f} s  {phase:12}", end="", file=sys.stderr, flush=True)

    def end(self, now):
        self.show(now)
        print(f" took {time.monotonic() - self._started:.0f} s", file=sys.stderr)


def address_of(number):
    return f"10.0.{number // 250}.{number % 250 + 1}:8080"


def run_until(network, condition, step_s, limit_s):
    """Return after how many seconds the condition held, to a step; None if it did not in time."""
    start = network.now
    while network.now - start < limit_s:
        network.run(step_s)
        if condition():
            return round(network.now - start, 3)
    return None


def all_listed(network):
    """Return whether every live node lists exactly the other live ones."""
    nodes = network.alive()
    return all(len(node.table.active()) == len(nodes) - 1 for node in nodes)


def agreed(network):
    """Return whether all live nodes hold the same."""
    first, *others = network.alive()
    return all(node.counter.vector() == first.counter.vector() for node in others)


def cold_start(network, nodes):
    """Start all nodes within a second; the first is the seed of all others."""
    for number in range(nodes):
        network.run(1 / nodes)
        network.start(address_of(number), seeds=[address_of(0)] if number else [])
    return run_until(network, lambda: all_listed(network), 0.5, COLD_START_MAX_S)


def idle(network, nodes):
    """Return (messages, bytes) sent per node per second while nothing happens."""
    messages, size = network.messages, network.bytes
    network.run(IDLE_S)
    return [
        round((now - before) / nodes / IDLE_S, 2)
        for now, before in ((network.messages, messages), (network.bytes, size))
    ]


def increments(network):
    """Return for each of some increments after how many seconds all nodes held it."""
    took_s, open_dots, counted, due = [], {}, 0, network.now
    end = network.now + INCREMENTS * INCREMENT_EVERY_S + INCREMENT_MAX_S
    while counted < INCREMENTS or (open_dots and network.now < end):
        if counted < INCREMENTS and network.now >= due:
            node = network.rng.choice(network.alive())
            node.increment("a", 1)
            node.send()
            dot = node.counter.replica, node.counter.vector()[node.counter.replica]
            open_dots[dot] = (network.now, network.alive())
            counted, due = counted + 1, due + INCREMENT_EVERY_S
        network.run(0.05)
        for dot, (at, nodes) in list(open_dots.items()):
            missing = [node for node in nodes if not node.counter.holds(*dot)]
            open_dots[dot] = (at, missing)
            if not missing:
                took_s.append(round(network.now - at, 3))
                del open_dots[dot]
    return sorted(took_s + [float("inf")] * len(open_dots))


def life(nodes, seed, args):
    """Return the figures of one cluster from its cold start to the end of a partition."""
    network, started = Links(seed, args), time.process_time()
    bar = Progress(f"N={nodes} seed={seed}", LIFE_S)
    step = network.run
    network.run = lambda seconds: (step(seconds), bar.show(network.now, "running"))
    figures = {"full_s": cold_start(network, nodes)}
    for node in network.rng.sample(network.alive(), min(nodes, WRITERS_MAX)):
        node.increment("a", 1)
    network.run(SETTLING_S)
    figures["messages"], figures["bytes"] = idle(network, nodes)
    took_s = increments(network)
    figures["known_p50_s"], figures["known_p99_s"] = took_s[len(took_s) // 2], took_s[-1]
    victim = network.nodes[address_of(nodes - 1)]
    network.crash(victim.address)
    figures["gone_s"] = run_until(
        network,
        lambda: all((victim.counter.replica, victim.address) not in node.table.active() for node in network.alive()),
        0.25,
        CRASH_MAX_S,
    )
    figures["false"] = network.false_removals
    addresses = [node.address for node in network.alive()]
    network.rng.shuffle(addresses)
    network.split(addresses[: nodes // 2], addresses[nodes // 2 :])
    for address in (addresses[0], addresses[-1]):
        network.nodes[address].increment("a", 1)
    network.run(PARTITION_S)
    network.cut = set()
    before = network.false_removals
    figures["healed_s"] = run_until(network, lambda: agreed(network) and all_listed(network), 0.25, HEAL_MAX_S)
    figures["false"] += network.false_removals - before
    bar.end(network.now)
    figures["cpu_s"] = round((time.process_time() - started) / network.now * 60, 1)
    return figures


def loss(nodes, seed, args):
    """Return how often a live node is removed while many messages are lost."""
    network = Links(seed, args)
    bar = Progress(f"N={nodes} seed={seed} loss", args.loss_seconds + 20)
    cold_start(network, nodes)
    network.run(SETTLING_S)
    network.loss, before = args.heavy_loss, network.false_removals
    for _ in range(args.loss_seconds):
        if args.pause and network.rng.random() < 0.1:
            network.rng.choice(network.alive()).paused_until = network.now + args.pause
        network.run(1)
        bar.show(network.now, "losing")
    bar.end(network.now)
    return {"false_loss": network.false_removals - before}


def table(results):
    """Return the medians as text, a row per figure and a column per size; * misses its target."""
    sizes = sorted({int(key.split()[0]) for key in results})
    lines = [f"{'':62}" + "".join(f"{f'N={size}':>12}" for size in sizes)]
    for name, (title, target) in FIGURES.items():
        cells = []
        for size in sizes:
            value = median(results, size, name)
            missed = target is not None and value is not None and value > target
            cells.append(
                f"{'-' if value is None else f'{value:,.4g}' if value < 1e4 else f'{value:,.0f}'}{'*' * missed}"
            )
        if any(cell != "-" for cell in cells):
            limit = "" if target is None else f" (at most {target})"
            lines.append(f"{title + limit:62}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def median(results, size, name):
    """Return the median of a figure over all seeds; None if no run has it."""
    found = [figures[name] for key, figures in results.items() if key.split()[0] == str(size) and name in figures]
    return statistics.median([float("inf") if value is None else value for value in found]) if found else None


def curves(results):
    """Return an SVG with a curve over N for every figure."""
    sizes = sorted({int(key.split()[0]) for key in results})
    width, height, columns = 320, 190, 3
    names = [
        name for name in FIGURES if name != "cpu_s" and any(median(results, size, name) is not None for size in sizes)
    ]
    rows = -(-len(names) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * columns} {height * rows}">',
        "<style>text { font: 10px sans-serif }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, name in enumerate(names):
        left, top = index % columns * width, index // columns * height
        parts.append(f'<g transform="translate({left},{top})">{panel(results, sizes, name, width, height)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(results, sizes, name, width, height):
    """Return the SVG of one curve: N goes to the right, by its logarithm; the target is dashed."""
    title, target = FIGURES[name]
    points = [(size, median(results, size, name)) for size in sizes]
    points = [(size, value) for size, value in points if value is not None and value != float("inf")]
    top = 1.15 * max([value for _, value in points] + [target or 0]) or 1
    span = max(1, len(sizes) - 1)
    x = {size: 45 + (width - 75) * sizes.index(size) / span for size in sizes}  # sizes go up by equal factors

    def y(value):
        return height - 35 - (height - 70) * value / top

    parts = [
        f'<text x="12" y="18">{title}</text>',
        f'<path d="M40 {y(top)}V{y(0)}H{width - 20}" fill="none" stroke="#888"/>',
        f'<text x="36" y="{y(0)}" text-anchor="end">0</text>',
    ]
    parts += [f'<text x="{x[size]}" y="{y(0) + 14}" text-anchor="middle">{size:,}</text>' for size in sizes]
    if target:
        parts.append(f'<path d="M40 {y(target):.1f}H{width - 20}" stroke="#c33" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="36" y="{y(target) + 3:.1f}" text-anchor="end" fill="#c33">{target}</text>')
    path = " ".join(f"{x[size]:.1f},{y(value):.1f}" for size, value in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#26c" stroke-width="2"/>')
    for size, value in points:
        label = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        parts.append(f'<circle cx="{x[size]:.1f}" cy="{y(value):.1f}" r="3" fill="#26c"/>')
        parts.append(f'<text x="{x[size]:.1f}" y="{y(value) - 7:.1f}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="one run for each")
    parser.add_argument("--scenario", choices=["life", "loss"], default="life")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds a link takes, on average")
    parser.add_argument("--loss", type=float, default=0.0, help="part of all messages")
    parser.add_argument("--repeat", type=float, default=0.0, help="part of all messages that arrives twice")
    parser.add_argument("--heavy-loss", type=float, default=0.1, help="in the scenario loss")
    parser.add_argument("--loss-seconds", type=int, default=600, help="how long it lasts")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="in it, a node stops for so long every ten seconds or so"
    )
    parser.add_argument("--save", type=Path, help="JSON file the figures of every run are added to")
    parser.add_argument("--plot", type=Path, help="SVG file for the curves")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    logging.disable(logging.CRITICAL)
    gc.disable()  # cycles are rare here, and there are millions of objects to look at
    results = json.loads(args.save.read_text()) if args.save and args.save.exists() else {}
    for nodes in args.nodes:
        for seed in args.seeds:
            figures = {"life": life, "loss": loss}[args.scenario](nodes, seed, args)
            results.setdefault(f"{nodes} {seed}", {}).update(figures)
            if args.save:
                args.save.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(table(results))
    if args.plot:
        args.plot.write_text(curves(results))


if __name__ == "__main__":
    main()
