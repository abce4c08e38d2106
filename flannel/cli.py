"""flanneld's command line and FLANNELD_* environment, in Go's flag syntax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flannel.log import without_userinfo

#: Shown by -version: flannel's version, as the package says it.
PROGRAM = "flanneld"


class UsageError(Exception):
    """The command line or the environment is wrong; the text names flag and value."""


class Flag(NamedTuple):
    """One flag: its kind is `string`, `list`, `int` or `bool`."""

    name: str
    kind: str
    default: Any
    text: str


FLAGS = (
    Flag("etcd-endpoints", "string", "http://127.0.0.1:4001,http://127.0.0.1:2379", "etcd's URLs, comma separated"),
    Flag("etcd-prefix", "string", "/coreos.com/network", "where in etcd the network's keys are"),
    Flag("etcd-keyfile", "string", "", "private key of the client certificate for etcd"),
    Flag("etcd-certfile", "string", "", "client certificate for etcd"),
    Flag("etcd-cafile", "string", "", "certificate authority of etcd's certificate"),
    Flag("etcd-username", "string", "", "user name for etcd"),
    Flag("etcd-password", "string", "", "password for etcd"),
    Flag("iface", "list", (), "external interface, by name or address; the first that exists of several is used"),
    Flag("iface-regex", "list", (), "external interface, by a regular expression over addresses, then names"),
    Flag("iface-can-reach", "string", "", "external interface: the one by which this address is reached"),
    Flag("subnet-file", "string", "/run/flannel/subnet.env", "where the node's subnet and MTU are written"),
    Flag("public-ip", "string", "", "address by which other nodes reach this one"),
    Flag("public-ipv6", "string", "", "IPv6 address by which other nodes reach this one"),
    Flag("subnet-lease-renew-margin", "int", 60, "minutes before its end that a lease is renewed"),
    Flag("ip-masq", "bool", False, "masquerade traffic that leaves the network"),
    Flag("ip-masq-fully-random-disable", "bool", False, "masquerade without random port mapping"),
    Flag("kube-subnet-mgr", "bool", False, "keep leases in the Kubernetes API instead of etcd"),
    Flag("kube-api-url", "string", "", "URL of the Kubernetes API"),
    Flag("kube-annotation-prefix", "string", "flannel.alpha.coreos.com", "prefix of the nodes' annotations"),
    Flag("kubeconfig-file", "string", "", "kubeconfig for the Kubernetes API"),
    Flag("version", "bool", False, "print the version and exit"),
    Flag("healthz-ip", "string", "0.0.0.0", "address of the health server"),
    Flag("healthz-port", "int", 0, "port of the health server; 0 for none"),
    Flag("iptables-resync", "int", 5, "seconds between looks at the rules; 0 for none"),
    Flag("iptables-forward-rules", "bool", True, "accept forwarded traffic of the network"),
    Flag("ip-blackhole-route", "bool", False, "keep a blackhole route for the node's own subnet"),
    Flag("net-config-path", "string", "/etc/kube-flannel/net-conf.json", "network configuration with Kubernetes"),
    Flag("set-node-network-unavailable", "bool", True, "clear the node's NetworkUnavailable condition"),
    Flag("v", "int", 0, "how talkative the log is"),
    Flag("vmodule", "string", "", "accepted, without effect"),
    Flag("log_backtrace_at", "string", "", "accepted, without effect"),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
_SECRET = ("etcd-password",)
_PREFIX = "FLANNELD_"


class Options:
    """The values of all flags, as attributes with underscores.

    `ignored` are the words after the last flag, without secrets; `strange` are FLANNELD_* variables of no flag.
    """

    etcd_endpoints: str
    etcd_prefix: str
    etcd_keyfile: str
    etcd_certfile: str
    etcd_cafile: str
    etcd_username: str
    etcd_password: str
    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: str
    subnet_file: str
    public_ip: str
    public_ipv6: str
    subnet_lease_renew_margin: int
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    kube_subnet_mgr: bool
    kube_api_url: str
    kube_annotation_prefix: str
    kubeconfig_file: str
    version: bool
    healthz_ip: str
    healthz_port: int
    iptables_resync: int
    iptables_forward_rules: bool
    ip_blackhole_route: bool
    net_config_path: str
    set_node_network_unavailable: bool
    v: int
    help: bool
    ignored: tuple[str, ...]
    strange: tuple[str, ...]

    def __init__(
        self, values: Mapping[str, Any], *, wants_help: bool = False, ignored: Sequence[str] = (),
        strange: Sequence[str] = (),
    ) -> None:  # fmt: skip
        for flag in FLAGS:
            setattr(self, flag.name.replace("-", "_"), values.get(flag.name, flag.default))
        self.help = wants_help
        self.ignored = _without_secrets(ignored)
        self.strange = tuple(strange)

    def describe(self) -> str:
        """All values in one line, without secrets."""
        shown = []
        for flag in FLAGS:
            value = getattr(self, flag.name.replace("-", "_"))
            if isinstance(value, str):
                value = without_userinfo(value)
            shown.append(f"{flag.name}={'***' if flag.name in _SECRET and value else value!r}")
        return " ".join(shown)


def _without_secrets(words: Sequence[str]) -> tuple[str, ...]:
    """Words that nobody reads; what follows the name of a flag that holds a secret is masked."""
    shown: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.lstrip("-") in _SECRET and name.startswith("-")
        shown.append("***" if hide else f"{name}=***" if secret and equals else without_userinfo(word))
        hide = secret and not equals
    return tuple(shown)


def _value(flag: Flag, text: str, source: str) -> Any:
    try:
        if flag.kind == "int":
            # Go reads a leading zero as octal, Python refuses it.
            old_octal = len(text.lstrip("+-")) > 1 and text.lstrip("+-")[0] == "0" and text.lstrip("+-")[1].isdigit()
            return int(text, 8 if old_octal else 0)
        if flag.kind == "bool":
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text]
    except (ValueError, KeyError):
        shown = "***" if flag.name in _SECRET else repr(text)
        kind = "a whole number" if flag.kind == "int" else "true or false"
        raise UsageError(f"{source}: {shown} is not {kind}") from None
    return text


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Read the command line, then the environment for what it does not say. Raises UsageError."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest[0]
        if len(word) < 2 or word[0] != "-":
            break
        rest.pop(0)
        if word == "--":
            break
        name, has_value, text = word[2 if word[1] == "-" else 1 :].partition("=")
        if not name or name[0] in "-=":
            raise UsageError(f"bad flag syntax: {word}")
        if name in ("h", "help"):
            return Options(values, wants_help=True)
        flag = _BY_NAME.get(name)
        if flag is None:
            raise UsageError(f"there is no flag -{name}")
        if not has_value:
            if flag.kind == "bool":
                text = "true"
            elif not rest:
                raise UsageError(f"-{name} needs a value")
            else:
                text = rest.pop(0)
        _set(values, flag, text, f"-{name}")
    if not values.get("version"):
        _from_environment(values, environment)
    return Options(values, ignored=rest, strange=_strange(environment))


def _set(values: dict[str, Any], flag: Flag, text: str, source: str) -> None:
    if flag.kind == "list":
        values[flag.name] = (*values.get(flag.name, ()), text)
    else:
        values[flag.name] = _value(flag, text, source)


def _from_environment(values: dict[str, Any], environment: Mapping[str, str]) -> None:
    for flag in FLAGS:
        variable = _variable(flag)
        text = environment.get(variable, "")
        if text and flag.name not in values and flag.name != "version":
            _set(values, flag, text, variable)


def _variable(flag: Flag) -> str:
    return _PREFIX + flag.name.upper().replace("-", "_")


def _strange(environment: Mapping[str, str]) -> list[str]:
    known = {_variable(flag) for flag in FLAGS}
    return sorted(name for name in environment if name.startswith(_PREFIX) and name not in known)


def check(options: Options) -> None:
    """Refuse what no daemon can be started with. Raises UsageError."""
    if not 0 < options.subnet_lease_renew_margin < 24 * 60:
        raise UsageError(
            f"-subnet-lease-renew-margin is {options.subnet_lease_renew_margin}: "
            "it must be more than 0 and less than the 1440 minutes of a lease"
        )
    if not 0 <= options.healthz_port <= 65535:
        raise UsageError(f"-healthz-port is {options.healthz_port}: not a port")


def usage() -> str:
    """The help text."""
    lines = [f"Usage: {PROGRAM} [OPTION]..."]
    for flag in FLAGS:
        kind = "" if flag.kind == "bool" else " " + {"list": "string (repeatable)"}.get(flag.kind, flag.kind)
        default = f" (default {flag.default!r})" if flag.default not in ("", (), False, 0) else ""
        lines.append(f"  -{flag.name}{kind}\n    \t{flag.text}{default}")
    return "\n".join(lines) + "\n"
