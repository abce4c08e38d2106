"""Puts together what flannel is told to do: a run's default, or a net-conf.json, with the command line's overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network
from typing import Any

from testbed import netconf
from testbed.errors import Fault, InputError
from testbed.flannelspec import (
    BACKENDS,
    IPTABLES_NFT,
    NFTABLES,
    RULES,
    TEST_PSK,
    Backend,
    FlannelSpec,
    normalise,
    run_of,
)

DEFAULT_NETWORK = "10.244.0.0/16"
DEFAULT_NETWORK6 = "fd00:10:244::/56"

IPV4_KEYS = ("Network", "SubnetLen", "SubnetMin", "SubnetMax")


def default_cni_conf() -> dict[str, Any]:
    """The conflist of flannel's stock manifest."""
    return {
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


DEFAULT_ARGS = ("--ip-masq", "--healthz-port=8081")
DEFAULT_ENV: Mapping[str, str] = {"EVENT_QUEUE_DEPTH": "5000"}


def _default_net_conf(backend: Backend, rules: str) -> dict[str, Any]:
    keys: dict[str, Any] = {"Type": backend.type}
    if backend.direct:
        keys["DirectRouting"] = True
    if backend.type == "ipsec":
        keys["PSK"] = TEST_PSK
    conf: dict[str, Any] = {"Network": DEFAULT_NETWORK, "EnableNFTables": rules == NFTABLES}
    if backend.dual:
        conf |= {"EnableIPv6": True, "IPv6Network": DEFAULT_NETWORK6}
    return conf | {"Backend": keys}


def default_flannel(
    run_name: str, *, net_conf_overrides: Mapping[str, str] | None = None, rules: str | None = None
) -> FlannelSpec:
    """Return the flannel of a run without a manifest.

    `net_conf_overrides` are the `--net-conf KEY=VALUE` of the command line; `rules` is `--rules`, by default what
    they say.  Raises InputError with every fault.
    """
    backend = BACKENDS[normalise(run_name)]
    if rules is not None:
        check_rules_name(rules)
    return build(
        backend,
        _default_net_conf(backend, rules or IPTABLES_NFT),
        cni_conf=default_cni_conf(),
        args=DEFAULT_ARGS,
        env=DEFAULT_ENV,
        rules=rules,
        overrides=net_conf_overrides or {},
    )


def check_rules_name(rules: str) -> None:
    """Raise InputError where `rules` is none of `RULES`."""
    if rules not in RULES:
        raise InputError(f"there are no rules called {rules!r}", where="--rules", hint=f"these are: {', '.join(RULES)}")


def build(
    backend: Backend,
    net_conf: Mapping[str, Any],
    *,
    cni_conf: Mapping[str, Any],
    args: Iterable[str],
    env: Mapping[str, str],
    rules: str | None = None,
    overrides: Mapping[str, str] | None = None,
    source: str = "built in",
    notes: Iterable[str] = (),
    warnings: Iterable[str] = (),
) -> FlannelSpec:
    """Put a FlannelSpec together from a net-conf.json that was found valid, and the command line's overrides.

    Without `rules` they are what EnableNFTables then says: nftables, or iptables in its nft flavour.  Raises InputError
    where an override is wrong, makes the configuration another run's, or contradicts `rules`.
    """
    faults: list[Fault] = []
    conf = netconf.override(net_conf, overrides or {}, faults)
    if conf.get("EnableIPv4") is False:  # upstream makes IPv4's rules for a Network that nobody uses
        conf = {key: value for key, value in conf.items() if key not in IPV4_KEYS}
    faults += [Fault("--net-conf", 0, p.key, p.what, p.hint) for p in netconf.check(conf)] if not faults else []
    if not faults:
        other = run_of(conf)
        if other != backend.run:
            hint = f"run {other} instead" if other else "leave that key as it is"
            faults.append(Fault("--net-conf", 0, "Backend", f"this is no longer {backend.run}'s configuration", hint))
        if rules is not None and bool(conf.get("EnableNFTables")) != (rules == NFTABLES):
            what = f"contradicts --rules {rules}"
            faults.append(Fault("--net-conf", 0, "EnableNFTables", what, "say it once, by --rules"))
    if faults:
        raise InputError(faults=faults)
    network = IPv4Network(conf.get("Network", DEFAULT_NETWORK), strict=False)
    rules = rules or (NFTABLES if conf.get("EnableNFTables") else IPTABLES_NFT)
    return FlannelSpec(
        backend,
        network,
        conf,
        cni_conf,
        tuple(args),
        dict(env),
        rules=rules,
        source=source,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
