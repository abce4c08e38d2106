"""flanneld: start-up in upstream's order, then one loop over what the store, the kernel and signals say."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NamedTuple, NoReturn

from flannel import __version__, cli, log, netconf, subnetenv
from flannel.backends.base import Backend, BackendError
from flannel.backends.choice import make_backend as make_backend
from flannel.backends.choice import remove_devices
from flannel.health import HealthError, HealthServer
from flannel.interface import External, InterfaceError, Wanted, choose
from flannel.kernel.monitor import Monitor
from flannel.kernel.netlink import Netlink
from flannel.lease import Lease
from flannel.reconcile import GRACE, Reconciler
from flannel.rules.keeper import Keeper, RulesError
from flannel.rules.start import start_rules
from flannel.servicemanager import ServiceManager
from flannel.state import Recorded
from flannel.stores.base import Event, LeaseLost, Message, Renewed, Snapshot, Store, StoreDown, StoreError

_RETRY = 1.0
_BRIDGE_SWITCHES = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}

MakeStore = Callable[[cli.Options], Store]


class Failure(Exception):
    """flanneld cannot go on; the text says why."""


class Stopped(BaseException):
    """A signal asked for the end. Not an Exception, so that no error handler swallows it."""


def open_store(options: cli.Options) -> Store:
    """The store that the options name. Raises StoreError."""
    if options.kube_subnet_mgr:
        from flannel.stores.kubernetes_open import KubeFlags
        from flannel.stores.kubernetes_open import open_store as open_kubernetes

        flags = KubeFlags(
            options.kube_api_url, options.kubeconfig_file, options.kube_annotation_prefix, options.net_config_path,
            options.set_node_network_unavailable,
        )  # fmt: skip
        return open_kubernetes(flags, os.environ, log.by_level)
    from flannel.stores.etcd import EtcdStore

    return EtcdStore(
        [one.strip() for one in options.etcd_endpoints.split(",") if one.strip()],
        options.etcd_prefix,
        log.by_level,
        keyfile=options.etcd_keyfile,
        certfile=options.etcd_certfile,
        cafile=options.etcd_cafile,
        username=options.etcd_username,
        password=options.etcd_password,
        renew_margin=options.subnet_lease_renew_margin * 60.0,
        proof_file=options.subnet_file + ".lease",
    )


class _AcquiredAgain(NamedTuple):
    """The outcome of taking a lost lease again."""

    lease: Lease


class Daemon:
    """One run of flanneld."""

    def __init__(self, options: cli.Options, make_store: MakeStore = open_store, *, grace: float = GRACE) -> None:
        self._options = options
        self._make_store = make_store
        self._grace = grace
        self._posts: deque[Message | _AcquiredAgain] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        self._stopping = False
        self._ended = threading.Event()
        self._serving = False
        self.start_anew = False  # instead of an end
        self._store: Store | None = None
        self._backend: Backend | None = None
        self._rules: list[Keeper] = []
        self._health: HealthServer | None = None
        self._manager = ServiceManager.of_environment()
        self._running = ""
        self._told = ""  # of what was not expected

    # -- signals ---------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second signal ends the process at once
        log.info(f"shutdownHandler sent cancel signal: {signal.Signals(number).name}")
        self._stopping = True
        self.start_anew = False
        if not self._serving and not self._ended.is_set():
            raise Stopped
        os.eventfd_write(self._wake, 1)

    # -- start -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Start, serve until told to stop, and return the exit status."""
        try:
            self._start_and_serve()
        except Stopped:
            pass
        except (Failure, BackendError, HealthError, InterfaceError, netconf.NetConfError, RulesError) as error:
            log.error(str(error))
            self._close()
            return 1
        except (StoreError, OSError) as error:
            log.error(f"cannot go on: {error}")
            self._close()
            return 1
        except Exception as error:  # noqa: BLE001 - a line of log is worth more than a traceback
            log.unexpected("cannot go on", error)
            self._close()
            return 1
        log.info("Waiting for all goroutines to exit")
        self._close()
        log.info("Exiting cleanly...")
        return 0

    def _start_and_serve(self) -> None:
        options = self._options
        log.info(f"CLI flags config: {options.describe()}")
        if options.ignored:
            log.warning(f"words after the flags are not read: {' '.join(options.ignored)}")
        for name in options.strange:
            log.warning(f"nobody reads the variable {name}")
        self._store = store = self._make_store(options)
        log.info(f"Created subnet manager: {store.name}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        log.info("Installing signal handlers")
        if options.healthz_port > 0:
            self._health = HealthServer(options.healthz_ip, options.healthz_port)
        self._manager.tell("STATUS=waiting for the network configuration")
        conf = self._network_config(store)
        self._manager.tell("STATUS=starting")
        if not conf.enable_nftables:
            self._check_host(conf)
        netlink = Netlink()
        remembered = store.remembered()
        public_ip, public_ip6 = remembered.public_ip or options.public_ip, remembered.public_ip6 or options.public_ipv6
        wanted = Wanted(
            options.iface, options.iface_regex, options.iface_can_reach, public_ip, public_ip6,
            conf.enable_ipv6, conf.enable_ipv4,
        )  # fmt: skip
        external = choose(netlink, wanted)
        previous = subnetenv.read(options.subnet_file)
        recorded = Recorded(options.subnet_file + ".state")
        recorded.published = lambda: remembered.attrs or store.published_by(external.public)
        recorded.open()
        if recorded.problem:
            log.warning(f"what this run makes is not recorded for the next one: {recorded.problem}")
        self._backend = backend = make_backend(conf, external)
        attrs = backend.prepare(netlink, recorded)
        before = previous.of(conf.network.version)[1]
        lease = store.acquire(conf, attrs, before, previous.subnet6 if conf.enable_ipv4 else None)
        log.info(f"Lease acquired: {lease.subnet}{f' and {lease.subnet6}' if lease.subnet6 else ''}")
        if conf.ipv6_network is not None and lease.subnet6 is None:
            raise Failure(f"EnableIPv6: {store.name} gave a lease without an IPv6 subnet")
        backend.start(netlink, lease)
        remove_devices(netlink, recorded.keep_devices(backend.devices))
        self._rules = start_rules(options, conf, lease, previous)
        reconciler = Reconciler(
            netlink, backend, external, conf.network, lease.subnet, recorded,
            network6=conf.ipv6_network, own6=lease.subnet6, blackhole=options.ip_blackhole_route, grace=self._grace,
            choose_again=lambda: self._choose_again(netlink, wanted),
        )  # fmt: skip
        self._write_subnet_env(conf, lease, backend)
        log.info("Running backend.")
        self._running = f"STATUS=running: {conf.backend_type}, {lease.subnet}"
        self._manager.tell("READY=1", self._running)
        self._serve(netlink, reconciler, store, conf, lease)

    def _network_config(self, store: Store) -> netconf.NetConf:
        told = ""
        while True:
            try:
                conf = netconf.parse(store.network_config())
            except (StoreError, netconf.NetConfError) as error:
                if str(error) != told:
                    log.error(f"Couldn't fetch network config: {error}; trying again every {_RETRY:.0f} s")
                told = str(error)
                time.sleep(_RETRY)  # a signal raises Stopped out of it
                continue
            for note in conf.notes:
                log.warning(note)
            log.info(f"Found network config - Backend type: {conf.backend_type}")
            return conf

    def _choose_again(self, netlink: Netlink, wanted: Wanted) -> External:
        """Choose the external interface once more: its address has changed."""
        external = choose(netlink, wanted)
        if self._backend is not None and not self._backend.moves:
            log.warning(f"{self._backend.name} cannot take up another address while it runs: starting anew")
            self.start_anew = self._stopping = True
        return external

    def _check_host(self, conf: netconf.NetConf) -> None:
        for version, name in _BRIDGE_SWITCHES.items():
            path = f"/proc/sys/net/bridge/{name}"
            enabled = conf.enable_ipv4 if version == 4 else conf.enable_ipv6
            if enabled and not os.path.exists(path):
                raise Failure(f"Failed to check br_netfilter: {path} is missing; load the module br_netfilter")

    def _write_subnet_env(self, conf: netconf.NetConf, lease: Lease, backend: Backend) -> None:
        path = self._options.subnet_file
        try:
            text = subnetenv.render(
                conf.network, lease.subnet, backend.mtu, self._options.ip_masq, conf.ipv6_network, lease.subnet6
            )  # fmt: skip
            subnetenv.write(path, text)
        except OSError as error:
            log.warning(f"Failed to write subnet file {path}: {error}")
            return
        log.info(f"Wrote subnet file to {path}")
        if self._health is not None:
            self._health.ready = True
        log.info("flannel is ready")

    # -- serve -----------------------------------------------------------------------------------------------------

    def post(self, message: Message | _AcquiredAgain) -> None:
        """Hand a store's message to the loop; from any thread."""
        self._posts.append(message)
        # Once is enough until the loop has looked: in a burst, a call and a change of threads a message add up.
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._wake, 1)

    def _serve(
        self, netlink: Netlink, reconciler: Reconciler, store: Store, conf: netconf.NetConf, lease: Lease
    ) -> None:  # fmt: skip
        assert self._backend is not None
        monitor = Monitor(ipv6=conf.enable_ipv6, without_echo_of=netlink.port)
        published = self._backend.attrs()
        self._serving = True
        store.watch(self.post)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(monitor, selectors.EVENT_READ)
            watched = self._backend.watched()
            if watched is not None:
                selector.register(watched, selectors.EVENT_READ)
            while not self._stopping:
                selector.select(max(0.0, reconciler.next_run() - time.monotonic()))
                self._drain_wake()
                try:
                    self._take_posts(reconciler, store, conf, lease)
                    reconciler.notice(*monitor.read())
                    if watched is not None and self._backend.noticed():
                        reconciler.compare_soon()
                    reconciler.run()
                    if self._backend.attrs() != published:
                        published = self._backend.attrs()
                        store.update(published)
                    self._told = ""
                except OSError as error:
                    log.error(f"the kernel does not answer as it should: {error}; comparing everything again")
                    reconciler.compare_soon(_RETRY)
                except Exception as error:  # noqa: BLE001 - what is there carries traffic: it must not be given up
                    self._tell_unexpected(error)
                    reconciler.compare_soon(_RETRY)

    def _tell_unexpected(self, error: Exception) -> None:
        """Log it once, as long as it comes again and again."""
        if (told := log.place_of(error)) != self._told:
            log.unexpected("comparing everything again", error)
            self._told = told

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._woken = False  # before the posts are taken: what comes from now on wakes again

    def _take_posts(self, reconciler: Reconciler, store: Store, conf: netconf.NetConf, lease: Lease) -> None:
        while self._posts:
            message = self._posts.popleft()
            if isinstance(message, Event | Snapshot):
                self._manager.tell(self._running)
                reconciler.take(message)
            elif isinstance(message, StoreDown):
                self._manager.tell("STATUS=the store is away; everything stays as it is")
                log.error(f"the store is away, everything stays as it is: {message.reason}")
            elif isinstance(message, Renewed):
                until = time.strftime("%F %T", time.gmtime(message.lease.expiration))
                log.info(f"Lease renewed, new expiration: {until}")
            elif isinstance(message, LeaseLost):
                reconciler.lost_own_key()
                self._acquire_again(message, store, conf, lease)
            else:
                self._check_again(message.lease, lease)

    def _acquire_again(self, lost: LeaseLost, store: Store, conf: netconf.NetConf, lease: Lease) -> None:
        """Take the same subnet again, on a thread of its own, for the store may be slow or away."""
        assert self._backend is not None
        log.error(f"the lease of {lease.subnet} was lost: {lost.reason}; taking it again")
        backend = self._backend

        def try_until_done() -> None:
            doing = f"cannot take the lease of {lease.subnet} again"
            while not self._ended.is_set():
                try:
                    again = store.acquire(conf, backend.attrs(), lease.subnet, lease.subnet6)
                except StoreError as error:
                    log.error(f"{doing}: {error}")
                except Exception as error:  # noqa: BLE001 - nobody else would take it
                    log.unexpected(doing, error)
                else:
                    self.post(_AcquiredAgain(again))
                    return
                self._ended.wait(_RETRY)

        threading.Thread(target=try_until_done, name="lease", daemon=True).start()

    def _check_again(self, again: Lease, lease: Lease) -> None:
        """Pods live in the subnet that this run started with: with any other one it must end."""
        if (again.subnet, again.subnet6) != (lease.subnet, lease.subnet6):
            log.error(f"Lease has been revoked: {lease.subnet} is somebody else's now. Shutting down.")
            self._stopping = True
        else:
            log.info(f"Lease acquired again: {again.subnet}")

    def _close(self) -> None:
        self._ended.set()
        # A manager that was told of an end would wait for it, and enforce it.
        self._manager.tell(*(["STATUS=starting anew"] if self.start_anew else ["STOPPING=1", "STATUS=ending"]))
        if self._health is not None:
            self._health.ready = False
        ends = [keeper.stop for keeper in self._rules]
        ends += [part.stop for part in (self._backend,) if part]
        ends += [part.close for part in (self._store,) if part]
        for end in ends:
            try:
                end()
            except Exception as error:  # noqa: BLE001 - one part that cannot end must not keep the others
                log.unexpected("ending", error)


def fail_usage(text: str) -> NoReturn:
    """Say what is wrong with the command line, with the flags there are, and exit 2."""
    sys.stderr.write(f"{text}\n{cli.usage()}")
    sys.exit(2)


def main(
    arguments: Sequence[str], environment: Mapping[str, str], make_store: MakeStore = open_store, grace: float = GRACE
) -> int:  # fmt: skip
    """Run flanneld and return its exit status: 0 for a clean end, 1 for an error; 2, by SystemExit, for wrong usage.

    `make_store` and `grace` (seconds) are for tests.
    """
    try:
        options = cli.parse(arguments, environment)
        if options.help:
            sys.stderr.write(cli.usage())
            return 0
        if options.version:
            sys.stderr.write(__version__ + "\n")
            return 0
        cli.check(options)
    except cli.UsageError as error:
        fail_usage(str(error))
    log.verbosity = options.v
    threading.excepthook = lambda died: log.unexpected(
        f"thread {died.thread.name if died.thread else '?'} has ended", died.exc_value
    )
    # The name is only for those who look at processes.
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("flanneld")
    daemon = Daemon(options, make_store, grace=grace)
    code = daemon.run()
    sys.stderr.flush()
    if daemon.start_anew:
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - there is no shell to want
    os._exit(code)  # threads that wait for a store or a client must not hold up the end
