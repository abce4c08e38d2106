"""What a check does to rules is undone behind it, in nftables too, whatever flanneld does about it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from testbed.labs.base import Place, Result
from testbed.probes.rules import rules_put_back

IPV4, IPV6 = "ip flannel-ipv4", "ip6 flannel-ipv6"
TEXT = "table ip flannel-ipv4 {\n\tchain postrtg {\n\t\taccept\n\t}\n}\n"


RULES6 = "*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n"


class Kernel:
    """A machine that keeps tables of nftables, as text, and those of ip6tables where it has that."""

    name = "worker1"

    def __init__(self, *, rules6: str | None = "", **tables: str) -> None:
        self.rules6 = rules6
        self.tables = {IPV4: tables.get("ipv4", ""), IPV6: ""}
        self.written: list[str] = []

    def run(self, argv: list[str], *, stdin: str = "", check: bool = True) -> Result:
        out, code = "", 0
        if argv[:3] == ["nft", "list", "table"]:
            out = self.tables[" ".join(argv[3:])]
            assert out or not check, "nft fails where there is no such table"
        elif argv[0] == "nft":
            assert argv[1:] == ["-f", "-"]
            self.written.append(stdin)
        elif argv[0] == "ip6tables-nft-save":
            out, code = self.rules6 or "", 0 if self.rules6 is not None else 1
            assert code == 0 or not check, "this kernel has nothing for it"
        elif argv[0] == "ip6tables-nft-restore":
            self.rules6 = stdin
        else:
            assert argv[0] in ("iptables-nft-save", "iptables-nft-restore"), argv
        return Result(self.name, tuple(argv), code, out, "", 0.0)


def fail(kernel: Kernel, meanwhile: str) -> None:
    """A check that changes the table and then fails."""
    with rules_put_back(cast("Place", kernel), "nftables"):
        kernel.tables[IPV4] = meanwhile
        raise AssertionError("the check's own")


@pytest.mark.parametrize(
    ("before", "meanwhile", "written"),
    [
        (TEXT, TEXT, []),
        (TEXT, TEXT.replace("accept", "drop"), [f"table {IPV4}\ndelete table {IPV4}\n{TEXT}"]),
        (TEXT, "", [f"table {IPV4}\ndelete table {IPV4}\n{TEXT}"]),
        ("", TEXT, [f"delete table {IPV4}"]),
    ],
)
def test_flannel_s_tables_are_as_they_were(before: str, meanwhile: str, written: list[str]) -> None:
    kernel = Kernel(ipv4=before)
    with pytest.raises(AssertionError, match="the check's own"):
        fail(kernel, meanwhile)
    assert kernel.written == written


def test_with_iptables_nothing_of_nftables_is_touched() -> None:
    kernel: Any = Kernel(ipv4=TEXT)
    with rules_put_back(kernel, "iptables-nft"):
        kernel.tables[IPV4] = ""
    assert kernel.written == []


@pytest.mark.parametrize("before", [RULES6, "", None])
def test_rules_of_ipv6_are_as_they_were(before: str | None) -> None:
    kernel: Any = Kernel(rules6=before)
    with rules_put_back(kernel, "iptables-nft"):
        kernel.rules6 = RULES6.replace("ACCEPT", "DROP") if before else before
    assert kernel.rules6 == before
