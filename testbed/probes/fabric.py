"""What the fabric does to packets of one node: a port that drops some, as switches and clouds have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.errors import LabError
from testbed.labs.base import Lab
from testbed.model import LinkEnd

_TABLE = "port-filter"


def port_of(lab: Lab, node: str) -> LinkEnd:
    """The switch's port that a node hangs on. Raises LabError for a node without a link."""
    own = LinkEnd(node, lab.spec.node(node).underlay.name)
    for link in lab.spec.links:
        if own in (link.a, link.b):
            return link.b if link.a == own else link.a
    raise LabError("this node hangs on no switch", where=node)


@contextmanager
def port_filter(lab: Lab, node: str, *rule: str) -> Iterator[LinkEnd]:
    """Have the switch in front of a node drop what comes from it and an nft rule matches. Raises CommandError."""
    port = port_of(lab, node)
    switch = lab.node(port.node)
    script = f"""
table netdev {_TABLE} {{
    chain in {{
        type filter hook ingress device "{port.iface}" priority 0; policy accept;
        {" ".join(rule)} counter drop
    }}
}}
"""
    switch.run(["nft", "-f", "-"], stdin=script)
    try:
        yield port
    finally:
        switch.run(["nft", "delete", "table", "netdev", _TABLE])
