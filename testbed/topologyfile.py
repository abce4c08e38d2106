"""The shape of `topologies/NAME.yml`: which keys there are, of what type, in what range."""

from __future__ import annotations

import re
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from testbed.linkfault import LinkFault, quantity

MIN_MTU, MAX_MTU = 1280, 9216
"""What switches carry, and the least that IPv6 needs."""

MAX_SPINES = 64
MAX_NAME = 12
"""Longest name of a machine: with a number of up to three digits after it, it still names an interface."""

CONTROL_PLANE = "master1"
RESERVED_NAMES = ("outside",)

NO_VRFS = ("default", "all", "lo", "main", "local", "unspec")
INTERFACES = r"(swp|node|out|eth|br)[0-9]+"
"""What a VRF, which is a device and a table, cannot be called: those that are there, and the interfaces of leaves."""

RESERVED = {
    "the fabric's loopbacks": IPv4Network("172.31.0.0/16"),
    "this host": IPv4Network("127.0.0.0/8"),
    "link-local": IPv4Network("169.254.0.0/16"),
    "multicast and beyond": IPv4Network("224.0.0.0/3"),
    "no network": IPv4Network("0.0.0.0/8"),
}
"""Networks that a topology's addresses have to leave alone."""


def _name(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("has to be a name; small letters and digits, such as worker1")
    if not re.fullmatch(r"[a-z][a-z0-9]*", value) or len(value) > MAX_NAME:
        raise ValueError(f"{value[:40]!r} is no name; small letters and digits, a letter first, up to {MAX_NAME}")
    return value


def _subnet(value: Any) -> Any:
    if isinstance(value, IPv4Network):
        return value
    try:
        if isinstance(value, str) and "/" in value:
            return IPv4Network(value)
    except ValueError as error:
        if "host bits" in str(error):
            raise ValueError(f"{value} has host bits set; did you mean {IPv4Network(value, strict=False)}?") from None
    raise ValueError(f"{str(value)[:40]!r} is no IPv4 subnet; such as 10.0.0.0/24")


def _address(value: Any) -> Any:
    try:
        if isinstance(value, str):
            return IPv4Address(value)
    except ValueError:
        pass
    raise ValueError(f"{str(value)[:40]!r} is no IPv4 address; such as 203.0.113.8")


Name = Annotated[str, BeforeValidator(_name)]
Subnet = Annotated[IPv4Network, BeforeValidator(_subnet)]
Address = Annotated[IPv4Address, BeforeValidator(_address)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class OptionModel(_Model):
    """One option of a topology, set by `--set NAME=VALUE`."""

    type: Literal["integer", "text"] = "integer"
    default: int | str
    min: int | None = None
    max: int | None = None
    help: str = ""

    @model_validator(mode="after")
    def _default_fits(self) -> OptionModel:
        value, problem = self.read(str(self.default))
        if problem or value != self.default:
            raise ValueError(f"the default {self.default!r} is not of its own type and range")
        return self

    def read(self, text: str) -> tuple[int | str, str]:
        """The option's value from the command line's text, and what is wrong with it."""
        if self.type == "text":
            return text, ""
        low, high = self.min if self.min is not None else "any", self.max if self.max is not None else "any"
        wanted = f"a number from {low} to {high}"
        if not re.fullmatch(r"-?[0-9]{1,9}", text):
            return 0, f"{text[:40]!r} is not {wanted}"
        value = int(text)
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            return 0, f"{value} is not {wanted}"
        return value, ""


class RackModel(_Model):
    """A leaf with the nodes behind it."""

    leaf: Name
    subnet: Subnet
    nodes: list[Name] = Field(min_length=1)


class ClosModel(_Model):
    """A fabric of equal racks."""

    racks: int = Field(ge=1, le=256)
    nodes: int = Field(ge=1, le=1000)
    subnets: Subnet
    prefix: int = Field(ge=8, le=30)


Time = Annotated[float, BeforeValidator(partial(quantity, "time"))]
Percentage = Annotated[float, BeforeValidator(partial(quantity, "percentage"))]
Rate = Annotated[float, BeforeValidator(partial(quantity, "rate"))]


class LinkModel(_Model):
    """What a link does to packets."""

    delay: Time = 0.0
    jitter: Time = 0.0
    loss: Percentage = 0.0
    reorder: Percentage = 0.0
    duplicate: Percentage = 0.0
    corrupt: Percentage = 0.0
    rate: Rate = 0.0
    towards: Name = ""

    @property
    def fault(self) -> LinkFault:
        """The same, as the lab's model has it."""
        return LinkFault(**self.model_dump())


def _vrf(value: Any) -> Any:
    name = _name(value)
    if name in NO_VRFS or re.fullmatch(INTERFACES, name):
        raise ValueError(f"{name} is the name of something else; such as fabric")
    return name


Vrf = Annotated[str, BeforeValidator(_vrf)]


class TopologyModel(_Model):
    """A whole file."""

    description: str = ""
    options: dict[str, OptionModel] = {}
    mtu: int = Field(ge=MIN_MTU, le=MAX_MTU)
    spines: int = Field(ge=0, le=MAX_SPINES)
    outside: Address
    control_plane: Name | None = None
    racks: Annotated[list[RackModel], Field(min_length=1)] | None = None
    clos: ClosModel | None = None
    links: dict[str, LinkModel] = {}
    leaf_vrf: Vrf | None = None
