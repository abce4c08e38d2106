"""What every part of the CNI plugin needs: its errors, JSON without the json package, and subnet.env."""

from __future__ import annotations

from flannel.cni import system as os

TYPE_CHECKING = False  # importing typing would cost more than all the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn

INCOMPATIBLE_VERSION, BAD_ENVIRONMENT, DECODING_FAILED, BAD_CONFIG, NOT_AVAILABLE, OTHER = 1, 4, 6, 7, 50, 999


class CniError(Exception):
    """What the runtime is told: one of CNI's codes, a message, and details."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code, self.msg, self.details = code, msg, details


def read_all(fd: int) -> bytes:
    """Read until the other end closes."""
    parts = []
    while part := os.read(fd, 65536):
        parts.append(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# -- JSON --------------------------------------------------------------------------------------------------------------


class _Plain:
    """How json.loads would set up its scanner. Importing json costs 10 ms, for the `re` that it does not need here."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        """Refuse NaN and Infinity, which are no JSON."""
        raise ValueError(f"{name} is no JSON")


def decode(data: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError."""
    text = data.decode().strip(" \t\r\n")
    try:
        from _json import make_scanner

        value, end = make_scanner(_Plain)(text, 0)  # type: ignore[arg-type]
        if end == len(text):
            return value
    except Exception:  # noqa: BLE001, S110 - by itself the scanner cannot name a fault, but the package does
        pass
    import json

    try:
        return json.loads(text, parse_constant=_Plain.parse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def encode(value: Any) -> bytes:
    """Return a value's JSON text: compact, keys sorted, as upstream writes it."""
    try:
        from _json import encode_basestring_ascii, make_encoder

        encoder = make_encoder({}, repr, encode_basestring_ascii, None, ":", ",", True, False, False)
    except (ImportError, TypeError):
        import json

        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return "".join(encoder(value, 0)).encode()


# -- subnet.env --------------------------------------------------------------------------------------------------------


def read_subnet_env(path: str) -> dict[str, Any]:
    """Return networks and subnets (CIDRs, masked), mtu and ip_masq. Raises CniError that names file and line."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace")
        return parse_subnet_env(text)
    except OSError as error:
        reason = f"open {path}: {error.strerror}"
    except ValueError as error:
        reason = f"{path}: {error}"
    hint = "flanneld writes it when it is ready; look at the log of this node's flannel pod"
    raise CniError(OTHER, f"failed to load flannel 'subnet.env' file: {reason}. {hint}")


def parse_subnet_env(text: str) -> dict[str, Any]:
    """Return what `read_subnet_env` does. Nothing is trimmed or unquoted. Raises ValueError."""
    found: dict[str, Any] = {}
    for number, ended in enumerate(text.split("\n"), 1):
        line = ended.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise ValueError(f"line {number}, {line!r}, has no '='")
        try:
            _take(found, key, value)
        except ValueError as error:
            raise ValueError(f"line {number}, {key}: {error}") from None
    missing = [
        *(() if "networks4" in found or "networks6" in found else ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK")),
        *(() if "subnet4" in found or "subnet6" in found else ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET")),
        *(() if "mtu" in found else ("FLANNEL_MTU",)),
        *(() if "ip_masq" in found else ("FLANNEL_IPMASQ",)),
    ]
    if missing:
        raise ValueError(f"it is missing {', '.join(missing)}")
    return found


def _take(found: dict[str, Any], key: str, value: str) -> None:
    if key in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"):
        networks = [masked(cidr) for cidr in value.split(",")]
        found["networks6" if "IPV6" in key else "networks4"] = list(dict.fromkeys(networks))
    elif key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"):
        found["subnet6" if "IPV6" in key else "subnet4"] = masked(value)
    elif key == "FLANNEL_MTU":
        if not (value.isascii() and value.isdigit()) or int(value) > 0xFFFFFFFF:
            raise ValueError(f"{value!r} is no MTU")
        found["mtu"] = int(value)
    elif key == "FLANNEL_IPMASQ":
        found["ip_masq"] = value == "true"


def masked(cidr: str) -> str:
    """Return a CIDR without its host bits: 10.244.1.1/24 is 10.244.1.0/24. Raises ValueError."""
    from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

    address, slash, length = cidr.partition("/")
    family = AF_INET6 if ":" in address else AF_INET
    try:
        packed = inet_pton(family, address)
    except (OSError, ValueError):
        raise ValueError(f"{cidr!r} is no CIDR") from None
    bits = len(packed) * 8
    if not slash or not (length.isascii() and length.isdigit()) or int(length) > bits:
        raise ValueError(f"{cidr!r} is no CIDR")
    host_bits = bits - int(length)
    base = int.from_bytes(packed, "big") >> host_bits << host_bits
    return f"{inet_ntop(family, base.to_bytes(len(packed), 'big'))}/{int(length)}"
