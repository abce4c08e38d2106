"""What Python and the kernel need at the very least for what a flanneld does; each printed by a process of its own."""

from __future__ import annotations

#: Programs for `python -IS -c`, with the folder of `flannel` as first word. They print seconds of processor, or MB.
START = "pass"

MEMORY = """
import sys
for line in open("/proc/self/status"):
    if line.startswith("VmRSS:"):
        print(int(line.split()[1]) / 1024)
"""

#: The messages for so many peers, packed and sent: a neighbour, an FDB entry and a route each, or routes alone.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import time
from flannel.kernel import rtnl
from flannel.kernel.values import Fdb, Neigh, Route, Vxlan
from flannel.kernel.netlink import Netlink
count, kind = int(sys.argv[2]), sys.argv[3]
netlink = Netlink()
if kind == "vxlan":
    eth0 = rtnl.get_link(netlink, name="eth0")
    settings = Vxlan(1, eth0.ifindex, 0xC0A8300B, 8472, False, False)
    netlink.request(rtnl.new_vxlan("flannel.1", settings, 1450, bytes.fromhex("0a0000000001")))
    index = rtnl.get_link(netlink, name="flannel.1").ifindex
    netlink.request(rtnl.change_link(index, up=True))
cpu, wall = time.process_time(), time.monotonic()
batch = []
for one in range(count):
    base = 0x0A400000 + (one + 1024 << 8)
    if kind == "vxlan":
        mac = (0x0A0000000000 + one).to_bytes(6, "big")
        batch.append(rtnl.set_entry(Neigh(index, base, mac)))
        batch.append(rtnl.set_entry(Fdb(index, mac, 0xC0A83064 + one)))
        batch.append(rtnl.set_route(Route(base, 24, base, index, True)))
    else:
        batch.append(rtnl.set_route(Route(base, 24, 0xC0A83064 + one % 3900, 0)))
failures = netlink.batch(batch)
assert not failures, failures[:3]
print(time.process_time() - cpu, time.monotonic() - wall)
"""
