"""net-conf.json: its keys with their types, the rules that flannel has for them, and overrides from the command line.

flannel reads it as Go reads JSON: keys in any case, unknown keys ignored, null is as if absent.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from testbed.errors import Fault

DEFAULT_VNI = 1
DEFAULT_VXLAN_PORT = 8472
DEFAULT_UDP_PORT = 8285
DEFAULT_WIREGUARD_PORT = 51820
MIN_PSK = 96
"""Shortest pre-shared key that flannel's ipsec takes, in characters."""

SUPPORTED = ("vxlan", "host-gw", "ipip", "udp", "wireguard", "ipsec")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a net-conf.json; `key` as `Backend.VNI`."""

    key: str
    what: str
    hint: str = ""
    lab_only: bool = False  # flannel elsewhere takes it; a lab cannot


Kind = Callable[[Any], str]
"""Checks a decoded value; returns what it should be, or an empty string where it is right."""


def _boolean(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _string(value: Any) -> str:
    return "" if isinstance(value, str) else "a string"


def _integer(low: int, high: int) -> Kind:
    def check(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"a number from {low} to {high}"

    return check


def _parsed(parse: Callable[[str], object], what: str) -> Kind:
    def check(value: Any) -> str:
        try:
            if isinstance(value, str):
                parse(value)
                return ""
        except ValueError:
            pass
        return what

    return check


def _cidr4(text: str) -> None:
    if "/" not in text:
        raise ValueError(text)
    IPv4Network(text, strict=False)


def _cidr6(text: str) -> None:
    if "/" not in text:
        raise ValueError(text)
    IPv6Network(text, strict=False)


_CIDR4, _CIDR6 = _parsed(_cidr4, "an IPv4 network such as 10.244.0.0/16"), _parsed(_cidr6, "an IPv6 network")
_IP4, _IP6 = _parsed(IPv4Address, "an IPv4 address"), _parsed(IPv6Address, "an IPv6 address")

TOP: Mapping[str, Kind] = {
    "EnableIPv4": _boolean,
    "EnableIPv6": _boolean,
    "EnableNFTables": _boolean,
    "Network": _CIDR4,
    "IPv6Network": _CIDR6,
    "SubnetMin": _IP4,
    "SubnetMax": _IP4,
    "IPv6SubnetMin": _IP6,
    "IPv6SubnetMax": _IP6,
    "SubnetLen": _integer(1, 30),
    "IPv6SubnetLen": _integer(1, 126),
}

_PORT, _MTU = _integer(0, 65535), _integer(0, 65535)

BACKEND_KEYS: Mapping[str, Mapping[str, Kind]] = {
    "vxlan": {
        "VNI": _integer(1, 2**24 - 1),
        "Port": _PORT,
        "MTU": _MTU,
        "GBP": _boolean,
        "Learning": _boolean,
        "DirectRouting": _boolean,
    },
    "host-gw": {},
    "ipip": {"DirectRouting": _boolean},
    "udp": {"Port": _integer(1, 65535)},
    "wireguard": {
        "ListenPort": _integer(1, 65535),
        "ListenPortV6": _integer(1, 65535),
        "MTU": _MTU,
        "PSK": _string,
        "PersistentKeepaliveInterval": _integer(0, 65535),
        "Mode": lambda v: "" if v in ("separate", "auto", "ipv4", "ipv6") else "separate, auto, ipv4 or ipv6",
    },
    "ipsec": {"PSK": _string, "UDPEncap": _boolean, "ESPProposal": _string},
}


ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "alloc": (),
    "extension": (
        "PreStartupCommand",
        "PostStartupCommand",
        "ShutdownCommand",
        "SubnetAddCommand",
        "SubnetRemoveCommand",
    ),
    "tencent-vpc": ("AccessKeyID", "AccessKeySecret"),
    "ali-vpc": ("AccessKeyID", "AccessKeySecret"),
    "aws-vpc": ("RouteTableID",),
    "gce": (),
}
"""Backends of upstream, some of them of old versions only, that a lab cannot deploy, with their keys."""

WINDOWS_KEYS = ("Name", "MacPrefix")
"""Keys that only flannel on Windows reads."""


def unknown_keys(conf: Mapping[str, Any]) -> list[Problem]:
    """The keys of a net-conf.json in canonical spelling that flannel would ignore, with the nearest known one.

    `lab_only` marks those that mean something elsewhere: to another backend, or on Windows.
    """
    problems = [_unknown(key, key, (*TOP, "Backend")) for key in conf if key not in (*TOP, "Backend")]
    backend = conf.get("Backend")
    if isinstance(backend, Mapping):
        kind = str(backend.get("Type"))
        known = ("Type", *(BACKEND_KEYS.get(kind) or ELSEWHERE.get(kind) or ()))
        if kind in BACKEND_KEYS or kind in ELSEWHERE:
            problems += [_unknown(key, f"Backend.{key}", known, kind) for key in backend if key not in known]
    return problems


def _unknown(key: str, path: str, known: tuple[str, ...], backend: str = "") -> Problem:
    others = [name for name, keys in BACKEND_KEYS.items() if key.lower() in {k.lower() for k in keys}]
    what = f"flannel's {backend or 'configuration'} has no such key and ignores it"
    if backend and key.lower() in {name.lower() for name in WINDOWS_KEYS}:
        return Problem(path, "only flannel on Windows reads it", lab_only=True)
    if others:
        place = "it belongs into Backend" if not backend else f"it is a key of {', '.join(others)}"
        return Problem(path, what, place, lab_only=bool(backend))
    if backend and key in TOP:
        return Problem(path, what, "it belongs beside Backend, not into it")
    spelt = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), spelt, 1)
    return Problem(path, what, f"did you mean {spelt[close[0]]}?" if close else f"its keys are {', '.join(known)}")


def canonical(raw: Any) -> tuple[dict[str, Any], list[Problem]]:
    """Return a decoded net-conf.json with its keys in the documented spelling, nulls left out, and what is wrong."""
    if not isinstance(raw, dict):
        return {}, [Problem("", "has to be a JSON object")]
    result: dict[str, Any] = {}
    for name, value in raw.items():
        key = _spelling(name, (*TOP, "Backend"))
        if value is not None:
            result[key] = value
    backend = result.get("Backend")
    if isinstance(backend, dict):
        kind = next((v for k, v in backend.items() if k.lower() == "type" and isinstance(v, str)), "")
        known = ("Type", *BACKEND_KEYS.get(kind.lower(), {}))
        keys = {_spelling(k, known): v for k, v in backend.items() if v is not None}
        if isinstance(keys.get("Type"), str):
            keys["Type"] = keys["Type"].lower()
        result["Backend"] = keys
    return result, check(result)


def _spelling(name: str, known: tuple[str, ...]) -> str:
    return next((key for key in known if key.lower() == name.lower()), name)


def check(conf: Mapping[str, Any]) -> list[Problem]:
    """Every problem of a net-conf.json in canonical spelling, by the rules that flanneld has in etcd mode."""
    problems = [
        Problem(key, f"{conf[key]!r} is not {wanted}")
        for key, kind in TOP.items()
        if key in conf and (wanted := kind(conf[key]))
    ]
    problems += _check_backend(conf.get("Backend"))
    wrong = {problem.key for problem in problems}
    if conf.get("EnableIPv4", True) is False:
        if conf.get("EnableIPv6") is not True:
            problems.append(Problem("EnableIPv4", "neither IPv4 nor IPv6 is left", "set EnableIPv6 to true"))
    elif "Network" not in conf:
        problems.append(Problem("Network", "missing", "the network that pods get their addresses from"))
    elif not wrong & {"Network", "SubnetLen", "SubnetMin", "SubnetMax"}:
        problems += _check_family(conf, "", IPv4Network(conf["Network"], strict=False), 30)
    if conf.get("EnableIPv6") is True:
        if "IPv6Network" not in conf:
            problems.append(Problem("IPv6Network", "missing", "EnableIPv6 needs it"))
        elif not wrong & {"IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"}:
            problems += _check_family(conf, "IPv6", IPv6Network(conf["IPv6Network"], strict=False), 126)
    return problems


def _check_backend(backend: Any) -> list[Problem]:
    if backend is None:
        hint = "flannel's documentation promises vxlan without it and its code takes udp: name the Type"
        return [Problem("Backend", "missing", hint, lab_only=True)]
    if not isinstance(backend, Mapping):
        return [Problem("Backend", "has to be an object with a Type")]
    kind = backend.get("Type")
    if not isinstance(kind, str) or kind not in BACKEND_KEYS:
        given = "missing" if kind is None else f"{kind!r} is no backend that can run here"
        elsewhere = isinstance(kind, str) and kind in ELSEWHERE
        close = difflib.get_close_matches(str(kind), (*SUPPORTED, *ELSEWHERE), 1)
        near = f"did you mean {close[0]}? " if close and not elsewhere else ""
        return [Problem("Backend.Type", given, f"{near}these are: {', '.join(SUPPORTED)}", elsewhere)]
    keys = BACKEND_KEYS[kind]
    problems = [
        Problem(f"Backend.{key}", f"{backend[key]!r} is not {wanted}")
        for key, check_value in keys.items()
        if key in backend and (wanted := check_value(backend[key]))
    ]
    psk = backend.get("PSK")
    if kind == "ipsec" and (psk is None or (isinstance(psk, str) and len(psk) < MIN_PSK)):
        problems.append(Problem("Backend.PSK", f"ipsec needs a key of at least {MIN_PSK} characters"))
    return problems


def subnet_len(network: IPv4Network | IPv6Network, given: int | None = None) -> int:
    """Prefix length of a node's subnet: the one given, else flannel's choice."""
    if given:
        return int(given)
    four = isinstance(network, IPv4Network)
    usual, widest = (24, 22) if four else (64, 62)
    return usual if network.prefixlen <= widest else network.prefixlen + 2


def _check_family(
    conf: Mapping[str, Any], prefix: str, network: IPv4Network | IPv6Network, longest: int
) -> list[Problem]:
    length = subnet_len(network, conf.get(f"{prefix}SubnetLen"))
    if length > longest or length < network.prefixlen + 2:
        what = f"subnets of /{length} in {network}: a Network has to hold at least four, of /{longest} at the longest"
        return [Problem(f"{prefix}SubnetLen", what)]
    problems = []
    for end in ("Min", "Max"):
        key = f"{prefix}Subnet{end}"
        if key not in conf:
            continue
        address = type(network.network_address)(conf[key])
        if address not in network:
            problems.append(Problem(key, f"{address} is not in the Network {network}"))
        elif int(address) % (1 << (network.max_prefixlen - length)):
            problems.append(Problem(key, f"{address} does not start a subnet of /{length}"))
    if not problems and f"{prefix}SubnetMin" in conf and f"{prefix}SubnetMax" in conf:
        low, high = (type(network.network_address)(conf[f"{prefix}Subnet{end}"]) for end in ("Min", "Max"))
        if int(low) > int(high):
            problems.append(Problem(f"{prefix}SubnetMin", "lies behind SubnetMax, so no subnet is left"))
    return problems


def override(conf: Mapping[str, Any], overrides: Mapping[str, str], faults: list[Fault]) -> dict[str, Any]:
    """Return a net-conf.json with the `--net-conf KEY=VALUE` of the command line in it; appends to `faults`.

    Keys of the backend may be written with or without `Backend.`.  Values are read by the key's type.
    """
    result = dict(conf)
    backend = dict(conf.get("Backend") or {})
    own = BACKEND_KEYS.get(str(backend.get("Type")), {})
    for name, text in overrides.items():
        inner = name[len("backend.") :] if name.lower().startswith("backend.") else name
        key = _spelling(inner, (*own, *TOP, "Type", "Backend"))
        if key in ("Type", "Backend"):
            faults.append(Fault("--net-conf", 0, name, "the run's name chooses the backend", "name another run"))
        elif key in own:
            _set(backend, key, text, own[key], faults)
        elif key in TOP and inner == name:
            _set(result, key, text, TOP[key], faults)
        else:
            close = difflib.get_close_matches(inner, (*own, *TOP), n=1)
            hint = f"did you mean {close[0]}?" if close else f"keys: {', '.join((*own, *TOP))}"
            faults.append(Fault("--net-conf", 0, name, f"{backend.get('Type')} has no such key", hint))
    return result | {"Backend": backend}


_NUMBER = re.compile(r"-?[0-9]{1,18}")


def _set(target: dict[str, Any], key: str, text: str, kind: Kind, faults: list[Fault]) -> None:
    value: Any = text
    if text in ("true", "false"):
        value = text == "true"
    elif _NUMBER.fullmatch(text):
        value = int(text)
    if kind is _string:
        value = text
    wanted = kind(value)
    if wanted:
        faults.append(Fault("--net-conf", 0, key, f"{text!r} is not {wanted}"))
    else:
        target[key] = value
