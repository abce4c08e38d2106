"""The parts of `bench_flanneld`: each yields figures of the programs, which take turns."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import floors
from benchmarks.arena import Arena, Node, Program, Running, until
from benchmarks.figures import Figure

_PLUGIN_FOLDERS = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")


@dataclass
class Bench:
    """What is measured, and how much of it."""

    arena: Arena
    programs: list[Program]
    plugins: dict[str, Path]
    python: str
    library: str
    leases: list[int]
    rounds: int
    seconds: float
    idle: float

    def turns(self, rounds: int) -> Iterator[Program]:
        """The programs in turn, round by round, each round in another order."""
        for number in range(rounds):
            yield from self.programs if number % 2 == 0 else reversed(self.programs)

    def fresh(self, kind: str, leases: int = 0) -> None:
        """A store with a configuration and so many remote nodes' leases."""
        self.arena.configure(Type=kind)
        self.arena.leases(leases, kind)

    def python_run(self, program: str, *words: str, node: Node | None = None) -> str:
        """Run a program of floors.py."""
        argv = [*(node.enter if node else []), self.python, "-IS", "-c", program, *words]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def cpu_of_python(self, program: str) -> float:
        """Processor seconds of a Python program, the best of a few."""
        seen = []
        for _ in range(5):
            process = subprocess.Popen([self.python, "-IS", "-c", program])
            _, _, usage = os.wait4(process.pid, 0)
            seen.append(usage.ru_utime + usage.ru_stime)
        return min(seen)


Seen = dict[str, list[float]]


def figure(name: str, unit: str, seen: Seen, **more: object) -> Figure:
    """A figure of the medians."""
    medians = {program: statistics.median(values) for program, values in seen.items() if values}
    return Figure(name, unit, medians.get("ours"), medians.get("peer"), **more)  # type: ignore[arg-type]


def _table_of(node: Node) -> int:
    """How many routes lead into the Network; read without a process, for it is asked often."""
    lines = Path(f"/proc/{node.pid}/net/route").read_text().splitlines()
    return sum(1 for line in lines if line.split("\t", 2)[1][6:] == "0A")


def _programmed(node: Node, running: Running, leases: int, patience: float = 120.0) -> float:
    """Wait until the routes of all remote leases are there."""
    return running.wait(lambda: _table_of(node) >= leases, f"routes of {leases} leases", patience)


# -- parts -------------------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Figure]:
    """Steady resident memory of all processes."""
    node = bench.arena.node(0)
    floor = float(bench.python_run(floors.MEMORY))
    for kind, leases in [*(("vxlan", count) for count in bench.leases), ("udp", min(200, max(bench.leases)))]:
        seen: Seen = {program.name: [] for program in bench.programs}
        for program in bench.turns(1):
            bench.fresh(kind, leases)
            with node.flanneld(program) as running:
                running.ready()
                if kind == "vxlan":
                    _programmed(node, running, leases)
                seen[program.name].append(running.resident())
        name = f"memory, {kind}, {leases} leases"
        yield figure(name, "MB", seen, aim=0.6, floor=floor, floor_is="an interpreter that imports nothing")


def start(bench: Bench) -> Iterator[Figure]:
    """From the start to subnet.env."""
    node = bench.arena.node(0)
    cpu: Seen = {program.name: [] for program in bench.programs}
    wall: Seen = {program.name: [] for program in bench.programs}
    for program in bench.turns(bench.rounds * 2 + 1):
        bench.fresh("vxlan")
        with node.flanneld(program) as running:
            wall[program.name].append(running.ready() * 1000)
            cpu[program.name].append(running.kill() * 1000)
    floor = bench.cpu_of_python(floors.START) * 1000
    meaning = "an interpreter that starts and ends"
    yield figure("start to subnet.env, CPU with children", "ms", cpu, aim=1.0, floor=floor, floor_is=meaning)
    yield figure("start to subnet.env, wall", "ms", wall)


def program_vxlan(bench: Bench) -> Iterator[Figure]:
    """Many leases: those that are there at the start, and those that come in a burst."""
    node = bench.arena.node(0)
    for leases in [count for count in bench.leases if count >= 1000] or [max(bench.leases)]:
        cpu: Seen = {program.name: [] for program in bench.programs}
        wall: Seen = {program.name: [] for program in bench.programs}
        burst: Seen = {program.name: [] for program in bench.programs}
        for program in bench.turns(bench.rounds):
            bench.fresh("vxlan", leases)
            with node.flanneld(program) as running:
                wall[program.name].append(_programmed(node, running, leases))
                cpu[program.name].append(running.cpu() * 1000)
            bench.fresh("vxlan")
            with node.flanneld(program) as running:
                running.ready()
                time.sleep(0.5)
                before = running.cpu()
                bench.arena.leases(leases, "vxlan")
                _programmed(node, running, leases)
                burst[program.name].append((running.cpu() - before) * 1000)
        floor = (
            float(bench.python_run(floors.PROGRAM, bench.library, str(leases), "vxlan", node=node).split()[0]) * 1000
        )
        node.clean()
        # The aims are for many leases: of few, the start is most of it.
        aim = 0.3 if leases >= 1000 else None
        about = {"aim": aim, "floor": floor, "floor_is": "packing and sending the messages alone"}
        yield figure(f"program {leases} vxlan leases from the start, CPU", "ms", cpu, **about)
        yield figure(f"program a burst of {leases} vxlan leases, CPU", "ms", burst, **about)
        yield figure(f"program {leases} vxlan leases from the start, wall", "s", wall)


def program_host_gw(bench: Bench) -> Iterator[Figure]:
    """Many routes by host-gw."""
    node, leases = bench.arena.node(0), max(bench.leases)
    wall: Seen = {program.name: [] for program in bench.programs}
    for program in bench.turns(1 if leases > 1000 else bench.rounds):
        bench.fresh("host-gw", leases)
        with node.flanneld(program) as running:
            wall[program.name].append(_programmed(node, running, leases, 900.0))
    floor = float(bench.python_run(floors.PROGRAM, bench.library, str(leases), "host-gw", node=node).split()[1])
    node.clean()
    about = {
        "aim": 0.03 if leases >= 4000 else None,
        "floor": floor,
        "floor_is": "packing and sending the messages alone",
    }
    yield figure(f"program {leases} host-gw leases, wall", "s", wall, **about)


def latency(bench: Bench) -> Iterator[Figure]:
    """From the put of one lease, the put included, to the kernel's word of its route."""
    node = bench.arena.node(0)
    seen: Seen = {program.name: [] for program in bench.programs}
    for program in bench.turns(2):
        bench.fresh("vxlan")
        with node.flanneld(program) as running:
            running.ready()
            time.sleep(1)
            monitor = subprocess.Popen([*node.enter, "ip", "monitor", "route"], stdout=subprocess.PIPE)
            try:
                until(lambda: running.cpu(), "a reading", 5)
                time.sleep(0.3)
                for number in range(50):
                    seen[program.name].append(_one_route(bench.arena, monitor, number) * 1000)
                    time.sleep(0.01)
            finally:
                monitor.kill()
                monitor.wait()
    puts = []
    for number in range(50):
        began = time.perf_counter()
        bench.arena.put(bench.arena.lease(number, "vxlan"))
        puts.append((time.perf_counter() - began) * 1000)
    about = {"aim": 1.0, "floor": statistics.median(puts), "floor_is": "the put alone"}
    yield figure("one lease to its route, median of 100", "ms", seen, **about)


def _one_route(arena: Arena, monitor: subprocess.Popen[bytes], number: int) -> float:
    assert monitor.stdout is not None
    descriptor = monitor.stdout.fileno()
    while select.select([descriptor], [], [], 0)[0]:
        os.read(descriptor, 1 << 16)
    lease = arena.lease(number, "vxlan")
    subnet = next(iter(lease)).rpartition("/")[2].removesuffix("-24").encode()
    began = time.perf_counter()
    arena.put(lease)
    said = b""
    while subnet not in said:
        if not select.select([descriptor], [], [], 20)[0]:
            raise RuntimeError(f"no route of {subnet.decode()} within 20 s")
        said += os.read(descriptor, 1 << 16)
    return time.perf_counter() - began


def idle(bench: Bench) -> Iterator[Figure]:
    """Processor time when nothing happens; the programs run at once, each on a node of its own."""
    for kind, aim in (("iptables-nft", 0.2), ("iptables-legacy", 0.5)):
        path = bench.arena.legacy() if kind == "iptables-legacy" else ""
        bench.fresh("vxlan")
        with ExitStack() as stack:
            running = {
                program.name: stack.enter_context(bench.arena.node(number).flanneld(program, path=path))
                for number, program in enumerate(bench.programs)
            }
            for one in running.values():
                one.ready()
            time.sleep(3)
            before = {name: one.cpu() for name, one in running.items()}
            time.sleep(bench.idle)
            scale = 60 / bench.idle * 1000
            seen = {name: [(one.cpu() - before[name]) * scale] for name, one in running.items()}
        yield figure(f"idle a minute, {kind}, CPU with children", "ms", seen, aim=aim)


def udp(bench: Bench) -> Iterator[Figure]:
    """TCP between pods of two nodes, by the udp backend."""
    nodes = [bench.arena.node(0), bench.arena.node(1)]
    seen: Seen = {program.name: [] for program in bench.programs}
    for program in bench.turns(bench.rounds):
        bench.fresh("udp")
        with ExitStack() as stack:
            running = [stack.enter_context(node.flanneld(program, masquerade=False)) for node in nodes]
            pods = [stack.enter_context(_pod(node, one)) for node, one in zip(nodes, running, strict=True)]
            far = pods[1]
            until(lambda far=far: _pings(nodes[0], far), "an answer of the other pod", 20, 0.2)  # type: ignore[misc]
            seen[program.name].append(_megabits(nodes, far, bench.seconds))
    floor = _megabits(nodes, str(nodes[1].ip), bench.seconds, pod=False)
    about = {"aim": 3.0, "more_is_better": True, "floor": floor, "floor_is": "the link between the nodes, bare"}
    yield figure("udp backend, TCP", "Mbit/s", seen, **about)


@contextmanager
def _pod(node: Node, running: Running) -> Iterator[str]:
    running.ready()
    text = Path(f"/proc/{node.pid}/root/run/flannel/subnet.env").read_text()
    env = dict(line.split("=", 1) for line in text.splitlines())
    gateway, mtu = env["FLANNEL_SUBNET"].split("/")[0], env["FLANNEL_MTU"]
    address = gateway[: gateway.rindex(".")] + ".2"
    for words in (
        "netns add pod", f"link add v0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns pod",
        f"addr add {gateway}/24 dev v0", "link set v0 up", f"-n pod addr add {address}/24 dev eth0",
        "-n pod link set eth0 up", f"-n pod route add default via {gateway}",
    ):  # fmt: skip
        node.run("ip", *words.split())
    try:
        yield address
    finally:
        node.run("ip", "netns", "delete", "pod")
        node.run("ip", "link", "delete", "v0", check=False)


def _pings(node: Node, address: str) -> bool:
    return node.run("ip", "netns", "exec", "pod", "ping", "-c1", "-W1", address, check=False).returncode == 0


def _megabits(nodes: Sequence[Node], address: str, seconds: float, pod: bool = True) -> float:
    inside = ["ip", "netns", "exec", "pod"] if pod else []
    server = subprocess.Popen([*nodes[1].enter, *inside, "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    try:
        until(lambda: ":5201" in nodes[1].run(*inside, "ss", "-tlnH").stdout, "iperf3", 10)
        said = nodes[0].run(*inside, "iperf3", "-J", "-c", address, "-t", f"{seconds:.0f}").stdout
    finally:
        server.kill()
        server.wait()
    return float(json.loads(said)["end"]["sum_received"]["bits_per_second"]) / 1e6


def cni(bench: Bench) -> Iterator[Figure]:
    """ADD of a pod by flannel, bridge and host-local."""
    node = bench.arena.node(0)
    folder = next((one for one in _PLUGIN_FOLDERS if (Path(one) / "host-local").exists()), "")
    if not folder:
        raise RuntimeError(f"no CNI plugins in any of {', '.join(_PLUGIN_FOLDERS)}")
    text = "FLANNEL_NETWORK=10.64.0.0/10\nFLANNEL_SUBNET=10.64.9.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    Path(f"/proc/{node.pid}/root/run/flannel/subnet.env").write_text(text)
    script = str(Path(__file__).parent / "cni_adds.py")
    paths = [str(path) for path in bench.plugins.values()]
    said = node.run(bench.python, "-IS", script, str(bench.rounds * 10), folder, "cni0", *paths).stdout
    took = json.loads(said)
    for position, (what, aim) in enumerate((("wall", 1.5), ("CPU", None))):
        seen = {name: [one[position] * 1000 for one in took[str(path)]] for name, path in bench.plugins.items()}
        floor = statistics.median(one[position] for one in took[f"{folder}/bridge"]) * 1000
        about = {"floor": floor, "floor_is": "the bridge plugin with host-local by itself"}
        yield figure(f"CNI ADD, flannel + bridge + host-local, {what}", "ms", seen, aim=aim, **about)
        if "bundled form" in seen:
            bundle = {"ours": seen["bundled form"], "peer": seen.get("peer", [])}
            yield figure(f"CNI ADD, plugin of the bundled folder, {what}", "ms", bundle, **about)
    node.clean()


PARTS: dict[str, Callable[[Bench], Iterable[Figure]]] = {
    "memory": memory, "start": start, "program": program_vxlan, "host-gw": program_host_gw, "latency": latency,
    "idle": idle, "udp": udp, "cni": cni,
}  # fmt: skip
