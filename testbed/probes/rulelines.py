"""Listed rules in a form in which two lists can be compared; part of the program `stateof`, by itself as well."""

from __future__ import annotations


def by_chain(lines: list[str]) -> list[str]:
    """What `nft list ruleset` printed, each line behind its table and chain, these in the order of their names.

    A chain of the kernel's own that lets everything pass and has no rules is as good as none.
    """
    found: dict[tuple[str, str], list[str]] = {}
    table = block = ""
    for line in lines:
        if line == "}":
            table, block = (table, "") if block else ("", "")
        elif line.endswith(" {") and not (table and block):
            table, block = (table, line[:-2]) if table else (line[:-2], "")
            found.setdefault((table, block), [])
        else:
            found[table, block].append(line)
    kept = []
    for (table, block), inside in sorted(found.items()):
        passing = len(inside) == 1 and inside[0].startswith("type ") and inside[0].endswith("policy accept;")
        if block and not passing:
            kept += [f"{table} {block}", *(f"{table} {block} | {line}" for line in inside)]
        elif not block:
            kept += [f"{table} | {line}" for line in inside]
    return kept


def saved_by_chain(lines: list[str]) -> list[str]:
    """The same of what `iptables-save` prints."""
    table, found = "", dict[tuple[str, str], list[str]]()
    for line in lines:
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            found.setdefault((table, chain), []).extend([] if policy == "ACCEPT" else [f"policy {policy}"])
        elif line.startswith("-A "):
            found.setdefault((table, line.split()[1]), []).append(line)
    return [f"legacy {table} {chain} | {line}" for (table, chain), inside in sorted(found.items()) for line in inside]
