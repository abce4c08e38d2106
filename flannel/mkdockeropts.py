"""mk-docker-opts: the Docker daemon's options that follow from subnet.env, as a file for its unit's EnvironmentFile."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flannel import subnetenv

NAMES = ("mk-docker-opts", "mk-docker-opts.sh")
SUBNET_FILE = "/run/flannel/subnet.env"
DOCKER_FILE = "/run/docker_opts.env"
_PREFIX = "DOCKER_OPT_"

USAGE = f"""Usage: mk-docker-opts [-f SUBNET-ENV] [-d DOCKER-ENV] [-i] [-c] [-m] [-k NAME]

Writes the Docker daemon's options for this node's subnet.
  -f FILE  what flanneld wrote (default {SUBNET_FILE})
  -d FILE  what to write (default {DOCKER_FILE})
  -i       one variable an option, such as DOCKER_OPT_MTU, and nothing else unless -c is there too
  -c       all options in one variable, and nothing else unless -i is there too
  -k NAME  the name of that one variable (default DOCKER_OPTS)
  -m       leave --ip-masq out
"""


class Refused(Exception):
    """Nothing can be written; the text says why."""


class Wanted(NamedTuple):
    """What the command line asks for."""

    subnet_file: str = SUBNET_FILE
    docker_file: str = DOCKER_FILE
    single: bool = False
    combined: bool = False
    masquerade: bool = True
    name: str = "DOCKER_OPTS"


def parse(words: Sequence[str]) -> Wanted:
    """Read the command line. Raises Refused."""
    import getopt

    try:
        found, rest = getopt.getopt(list(words), "f:d:icmk:h?")
    except getopt.GetoptError as error:
        raise Refused(f"{error}\n{USAGE}") from None
    if rest:
        raise Refused(f"nobody reads {rest[0]!r}\n{USAGE}")
    given = dict(found)
    if "-h" in given or "-?" in given:
        raise Refused(USAGE)
    both = "-i" not in given and "-c" not in given
    name = given.get("-k", "DOCKER_OPTS")
    if not (name.isascii() and name.isidentifier()):
        raise Refused(f"-k is {name!r}, not a variable's name")
    return Wanted(
        given.get("-f", SUBNET_FILE), given.get("-d", DOCKER_FILE), both or "-i" in given, both or "-c" in given,
        "-m" not in given, name,
    )  # fmt: skip


def render(wanted: Wanted, flannel: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """The file's text. `flannel` is what subnet.env says; options that the environment has already are kept.

    Raises Refused.
    """
    options = {name: value for name, value in environment.items() if name.startswith(_PREFIX)}
    options[_PREFIX + "BIP"] = f"--bip={_value(flannel, 'FLANNEL_SUBNET')}"
    options[_PREFIX + "MTU"] = f"--mtu={_value(flannel, 'FLANNEL_MTU')}"
    if wanted.masquerade:
        given = _value(flannel, "FLANNEL_IPMASQ")
        if given not in ("true", "false"):
            raise Refused(f"FLANNEL_IPMASQ is {given!r}, neither true nor false")
        # One of the two masquerades, and not both.
        options[_PREFIX + "IPMASQ"] = f"--ip-masq={'false' if given == 'true' else 'true'}"
    lines = [f'{name}="{options[name]}"' for name in sorted(options)] if wanted.single else []
    if wanted.combined:
        before = environment.get(wanted.name, "")
        words = [f"{before} " if before else "", *(options[name] for name in sorted(options))]
        lines.append(f'{wanted.name}="{" ".join(words)}"')
    return "\n".join(lines) + "\n"


def _value(flannel: Mapping[str, str], key: str) -> str:
    value = flannel.get(key, "")
    if not value:
        raise Refused(f"{key} is missing: has flanneld started?")
    if not all(letter.isalnum() or letter in ".:/" for letter in value):
        raise Refused(f"{key} is {value!r}, which is no value of flanneld's")
    return value


def _read(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip().partition("=") for line in file]
    except OSError as error:
        raise Refused(f"cannot read {path}, which flanneld writes when it is ready: {error.strerror}") from None
    return {key: value.strip("\"'") for key, equals, value in lines if equals}


def _write(path: str, text: str) -> None:
    """Replace the file; a device or a pipe, such as /dev/stdout, must not be replaced. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as output:
            output.write(text)
    else:
        subnetenv.write(path, text)


def _is_routed_elsewhere(path: str) -> str:
    """The gateway by which the main table leads to this node's own subnet; empty where it does not."""
    from flannel.kernel import rtnl
    from flannel.kernel.netlink import Netlink

    subnet = subnetenv.read(path).subnet
    if subnet is None:
        return ""
    own = (int(subnet.network_address), subnet.prefixlen)
    for seen in rtnl.dump_routes(Netlink()):
        if (seen.route.dst, seen.route.length) == own and seen.route.gateway:
            from ipaddress import IPv4Address

            return f"{subnet} via {IPv4Address(seen.route.gateway)}"
    return ""


def main(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Write the file; exit status 1 where that cannot be done, or where Docker's bridge would not get its packets."""
    try:
        wanted = parse(words)
        _write(wanted.docker_file, render(wanted, _read(wanted.subnet_file), environment))
        elsewhere = _is_routed_elsewhere(wanted.subnet_file)
        if elsewhere:
            raise Refused(f"the subnet of this node is routed elsewhere: {elsewhere}")
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"mk-docker-opts: {error}\n")
        return 1
    return 0
