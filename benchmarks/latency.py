"""Time to OK: how long a sender of spans waits for its answer, at shares of what the receiver can take.

    .venv/bin/python benchmarks/latency.py [--items 100] [--shares 0.01,0.5,0.9] [--rounds 3] [--seconds 5]

The capacity is measured first. Then requests are sent on time, whether those before are answered or not, and a time to
OK is counted from when its request was due. Takes some two minutes, half of which are for the 300 requests that a p99
at 1 % wants.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.checks import in_turns, remarks
from benchmarks.checks import run as send
from benchmarks.race import median
from benchmarks.receiver import receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, Sent

_TITLE = "Time to OK"
_TEXT = (
    "Requests of {items:,} spans with ten attributes. The capacity, {capacity:,.0f} spans/s, is what {senders} senders"
    " got at full speed; then requests were sent at shares of it, in turns. Milliseconds from when a request was due to"
    " its OK, so the commit is in them; medians over the rounds. The goal: p99 below 25 ms at 1 %."
)
_PERCENTILES = ("p50", "p90", "p99", "max")
_FULL = "full speed"
_LONGEST = 150.0  # seconds that a run may take, even if it then has fewer requests than wanted


def row(name: str, due: str, runs: Sequence[Sent]) -> list[str]:
    """Return the table's row for one share of the capacity, `due` being the spans a second that it comes to."""
    return [
        name,
        f"{sum(sent.requests for sent in runs):,}",
        due,
        f"{median([sent.items_per_second for sent in runs]):,.0f}",
        *(f"{median([sent.latencies[each] for sent in runs]) * 1e3:.1f}" for each in _PERCENTILES),
        f"{max(sent.cpu_share for sent in runs):.2f}",
        remarks(runs),
    ]


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    load = Load(endpoint="", items=options.items, senders=options.senders, seconds=options.seconds)
    shares = {f"{share:.0%}": share for share in options.shares}
    runs: dict[str, list[Sent]] = {name: [] for name in (*shares, _FULL)}
    with receiving(tables) as receiver:
        say("the capacity")
        runs[_FULL].append(send(receiver, load).sent)
        capacity = runs[_FULL][0].requests / runs[_FULL][0].seconds
        for turn, name in in_turns(list(shares), options.rounds):
            rate = capacity * shares[name]
            least = min(_LONGEST, options.requests / rate)
            if least > options.seconds and turn:
                continue  # once is enough of what takes so long
            say(f"{name}, round {turn + 1}")
            seconds = max(options.seconds, least)
            runs[name].append(send(receiver, replace(load, rate=rate, seconds=seconds)).sent)
    header = ["of the capacity", "requests", "due/s", "spans/s", *(f"{each}, ms" for each in _PERCENTILES)]
    due = {name: f"{capacity * share * options.items:,.0f}" for name, share in shares.items()}
    rows = [row(name, due.get(name, ""), of_one) for name, of_one in runs.items()]
    table = Table(header=[*header, "generator's core", "remarks"], rows=rows)
    text = _TEXT.format(**vars(options), capacity=capacity * options.items)
    return [Section(title="", text=text, tables=[table])]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--items", type=int, default=100, help="a request")
    made.add_argument("--shares", type=lambda text: [float(each) for each in text.split(",")], default=[0.01, 0.5, 0.9])
    made.add_argument("--senders", type=int, default=64, help="requests in flight, at most")
    made.add_argument("--requests", type=int, default=300, help="a run, at least, if that takes no longer than 150 s")
    made.add_argument("--seconds", type=float, default=5.0, help="a run, at least")
    made.add_argument("--rounds", type=int, default=3, help="of the runs that need no longer than that")
    options = made.parse_args(arguments)
    if options.quick:
        options.requests, options.seconds, options.rounds = 10, 2.0, 1
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
