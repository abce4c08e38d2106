"""What a failed check leaves for its reader, and what a check left behind on the nodes.

In `checks.json` each check has two more keys:

    "leaked": ["worker1: + route 10.9.0.0/24 dev eth0", …]      # [] where it left everything as it found it;
                                                                # `-` was there before it, `+` only after it
    "evidence": null                                            # or, where it failed:
    {"folder": "checks/VXE-01_vxlan-XS-…",                      # in the report
     "files": [{"path": "checks/VXE-01_…/worker1.routes.txt",   # relative to the report
                "node": "worker1",                              # "" for what is of no single node
                "what": "routes",                               # one of WHAT, or pcap, report, state
                "bytes": 1234, "cut": 0}, …],                   # how many bytes were cut off its beginning or end
     "changes": ["worker1: - neighbour …", …],                  # against the state before the check, as in leaked
     "trace": null,                                             # or a path trace between its ends: trace.model
     "missing": ["worker2: routes: timed out", …],              # what could not be had, and why
     "seconds": 0.62}

Beyond MOST_IN_FULL failures a check has its report and its captures alone, and `missing` says so.
`run` has `"leaks"` (how many checks leaked), `"traces"` (those of --path-trace) and
`"watch": {"readings": 56, "seconds": 0.4}`, what it cost to look at the nodes' state.
"""

from __future__ import annotations

MOST_IN_FULL = 20
"""How many failures of a run have everything gathered."""

WHAT = ("links", "addresses", "fdb", "neighbours", "routes", "rules", "conntrack", "sockets", "sysctls", "flanneld")
"""What is gathered of a node, as files are called: `worker1.routes.txt`."""
