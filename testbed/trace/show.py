"""A trace as a terminal shows it: a row a hop, and below it where the packet was lost and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from testbed.errors import printable
from testbed.trace.model import Hop, PacketFacts, Trace, with_port

WIDE = 220
"""Columns where no terminal says how many it has: nothing is wrapped for grep's sake."""


def show(trace: Trace, console: Console) -> None:
    """Print a trace."""
    console.print(rendered(trace))


def rendered(trace: Trace) -> RenderableType:
    """A trace as something that rich prints."""
    parts: list[RenderableType] = [Text(_headline(trace), "bold")]
    for title, hops in (("request", trace.request), ("answer", trace.answer)):
        if hops:
            parts.append(_table(title, hops))
    for title, hops in (("errors about it", trace.errors), ("strays", trace.strays)):
        if hops:
            parts.append(_table(title, hops))
    parts += [Text(note, "dim") for note in trace.notes]
    parts += list(_verdict(trace))
    return Group(*parts)


def _headline(trace: Trace) -> str:
    packet = trace.packet
    size = f", {packet['size']} bytes" if packet["protocol"] != "tcp" else ""
    whole = ", not to be fragmented" if packet["dont_fragment"] else ""
    ends = f"{trace.source} ({packet['source_address'] or '?'}) to {trace.target} ({packet['target_address']})"
    return f"{trace.backend}, lab {trace.lab}: {packet['protocol']} from {ends}{size}{whole}"


def _table(title: str, hops: Sequence[Hop]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("µs", justify="right", style="dim", no_wrap=True)
    table.add_column("interface", no_wrap=True)
    table.add_column("packet, and what chose it or changed it", overflow="fold")
    for hop in hops:
        arrow = "→" if hop.way == "out" else "←"
        table.add_row(f"{hop.at * 1e6:.0f}", f"{arrow} {hop.where}", _cell(hop))
    return table


def _cell(hop: Hop) -> Text:
    shown = hop.packet
    pieces = f" in {hop.pieces} pieces" if hop.pieces > 1 else ""
    first = f"{_ends(shown)} TTL {shown.ttl}" if shown else "encrypted"
    cell = Text(f"{first}, {hop.length} bytes{pieces}", "red" if shown and shown.checksum == "bad" else "")
    if hop.frame:
        cell.append(f"\n{hop.frame.src} > {hop.frame.dst}", "dim")
    if hop.encapsulation is not None:
        bad = hop.outer is not None and hop.outer.checksum == "bad"
        cell.append(f"\n{_tunnel(hop)}", "red" if bad else "cyan")
    for line in _why(hop):
        cell.append(f"\n{printable(line)}", "yellow")
    return cell


def _ends(packet: PacketFacts) -> str:
    bad = ", wrong checksum" if packet.checksum == "bad" else ""
    ends = with_port(packet.src, packet.sport), with_port(packet.dst, packet.dport)
    return f"{' > '.join(ends)} {packet.protocol}{bad}"


def _tunnel(hop: Hop) -> str:
    assert hop.encapsulation is not None
    words = [str(hop.encapsulation["kind"])]
    words += [f"VNI {hop.encapsulation['vni']}"] if "vni" in hop.encapsulation else []
    words += [f"in {_ends(hop.outer)} TTL {hop.outer.ttl}"] if hop.outer else []
    return " ".join(words)


def _why(hop: Hop) -> Iterator[str]:
    if hop.error:
        yield hop.error
    for name, fact in (("route", hop.route), ("neighbour", hop.neighbour), ("fdb", hop.fdb)):
        if fact is not None:
            yield f"{name} {fact['text']}"
    if hop.nat is not None:
        rule = f" by {hop.nat['rule']}" if hop.nat["rule"] else ""
        entry = f" ({hop.nat['conntrack']})" if hop.nat["conntrack"] else ""
        yield f"{hop.nat['kind']} {hop.nat['before']} became {hop.nat['after']}{rule}{entry}"


def _verdict(trace: Trace) -> Iterator[Text]:
    if trace.delivered:
        seconds = trace.seconds
        took = f" after {seconds * 1e3:.2f} ms" if seconds is not None else ""
        yield Text(f"delivered, and answered{took}", "bold green")
        return
    missing = trace.missing
    if missing is None:
        yield Text("it was seen all the way, and its sender did not get the answer", "bold red")
        return
    last = f"last seen at {missing.last.where} ({missing.last.way})" if missing.last else "it was never sent"
    where = f"{missing.place}:{missing.interface} ({missing.way})"
    yield Text(f"the {missing.direction} was lost: {last}, missing at {where}", "bold red")
    likely = "" if missing.cause.certain else "probably, "
    yield Text(f"{missing.cause.code}: {likely}{missing.cause.text}", "bold red")
    for line in missing.cause.evidence:
        yield Text(f"  {printable(line)}")
