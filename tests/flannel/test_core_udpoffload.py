"""Large packets of the udp backend: cut as the kernel would have done it, and joined to what they were."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network

import pytest
from scapy.layers.inet import IP, TCP, UDP

from flannel.backends.udpoffload import (
    NEEDS_CHECKSUM,
    NO_OFFLOAD,
    TCP4,
    VNET,
    Joiner,
    cut,
    finish_checksum,
    word_sum,
)

OWN = IPv4Network("10.244.2.0/24")
SOURCE, TARGET = "10.244.1.5", "10.244.2.7"
SOURCE_PORT, TARGET_PORT = 40000, 80


def joiner() -> Joiner:
    return Joiner(int(OWN.network_address), int(OWN.netmask))


def joined(data: bytes, size: int) -> list[bytes]:
    """What the device is given for one receive, a bytes a write."""
    buffer = bytearray(data + b"of an earlier packet" * 200)
    return [b"".join(bytes(piece) for piece in pieces) for pieces in joiner().pieces(buffer, len(data), size)]


def tcp(
    payload: bytes, *, seq: int = 1000, flags: str = "A", ttl: int = 64, number: int = 7, options: bool = True,
    ip_options: bytes = b"", target: str = TARGET, port: int = TARGET_PORT, window: int = 500,
) -> bytes:  # fmt: skip
    """A packet with right checksums, made by another hand."""
    ip = IP(src=SOURCE, dst=target, ttl=ttl, id=number, flags="DF", options=ip_options)
    stamp = [("NOP", None), ("NOP", None), ("Timestamp", (77, 88))] if options else []
    header = TCP(sport=SOURCE_PORT, dport=port, seq=seq, ack=5, flags=flags, window=window, options=stamp)
    return bytes(ip / header / payload)


def pseudo_sum(packet: bytes) -> int:
    """What the kernel leaves in a checksum that its device is to finish."""
    header = (packet[0] & 0xF) * 4
    return (word_sum(packet[12:20]) + packet[9] + len(packet) - header) % 0xFFFF or 0xFFFF


def unfinished(packet: bytes, offset: int) -> bytearray:
    place = (packet[0] & 0xF) * 4 + offset
    return bytearray(packet[:place] + pseudo_sum(packet).to_bytes(2, "big") + packet[place + 2 :])


def hop_taken(packet: bytes) -> bytes:
    one = IP(packet)
    one.ttl -= 1
    del one.chksum
    return bytes(one)


@pytest.mark.parametrize("size", [0, 1, 2, 19, 20, 255, 256, 257, 1419, 1432, 4096, 4097, 4098, 9001, 65000, 65507])
def test_the_sum_is_that_of_all_words(size: int) -> None:
    data = random.Random(size).randbytes(size)
    padded = data + b"\0" * (size & 1)
    expected = sum(padded[at] << 8 | padded[at + 1] for at in range(0, len(padded), 2)) % 0xFFFF
    assert word_sum(data) == word_sum(memoryview(data)) == expected


@pytest.mark.parametrize("size", [0, 1, 300, 1433])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_checksum_is_finished(protocol: str, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    ip = IP(src=SOURCE, dst=TARGET)
    right = bytes(ip / TCP(sport=1, dport=2) / payload if protocol == "tcp" else ip / UDP(sport=1, dport=2) / payload)
    offset = 16 if protocol == "tcp" else 6
    packet = unfinished(right, offset)
    header = bytearray(VNET.pack(NEEDS_CHECKSUM, 0, 0, 0, 20, offset))
    longer = packet + b"of an earlier packet"
    assert finish_checksum(header, longer, len(packet))
    assert longer[: len(packet)] == right


def test_a_udp_checksum_of_zero_is_written_as_ones() -> None:
    right = unfinished(bytes(IP(src=SOURCE, dst=TARGET) / UDP(sport=1, dport=2) / b"ab"), 6)
    right[28:30] = (-(word_sum(right[20:28])) % 0xFFFF).to_bytes(2, "big")
    assert finish_checksum(bytearray(VNET.pack(NEEDS_CHECKSUM, 0, 0, 0, 20, 6)), right, len(right))
    assert right[26:28] == b"\xff\xff"


def test_what_needs_no_checksum_is_left_as_it_is() -> None:
    packet = bytearray(tcp(b"x"))
    before = bytes(packet)
    assert finish_checksum(bytearray(NO_OFFLOAD), packet, len(packet))
    assert packet == before


@pytest.mark.parametrize(("start", "offset"), [(0, 16), (20, 4000), (19, 16), (65535, 65535)])
def test_a_checksum_in_no_place_is_refused(start: int, offset: int) -> None:
    packet = bytearray(tcp(b"x" * 100))
    before = bytes(packet)
    assert not finish_checksum(bytearray(VNET.pack(NEEDS_CHECKSUM, 0, 0, 0, start, offset)), packet, len(packet))
    assert packet == before


@pytest.mark.parametrize("ip_options", [b"", b"\x01\x01\x01\x01"])
@pytest.mark.parametrize("flags", ["A", "PA", "FPA"])
@pytest.mark.parametrize(
    ("length", "size"), [(1433, 1432), (2864, 1432), (14_321, 1432), (65_000, 1432), (60_000, 8_000), (9_001, 88)]
)
def test_a_large_packet_is_cut_as_the_kernel_would(length: int, size: int, flags: str, ip_options: bytes) -> None:
    payload = random.Random(length).randbytes(length)
    first, number = 0xFFFFFFFF - 3000, 0xFFFE  # both wrap within the packet
    large = unfinished(tcp(payload, seq=first, flags=flags, number=number, ip_options=ip_options), 16)
    head = len(large) - length
    buffer = large + b"of an earlier packet" * 200
    bursts = cut(bytearray(VNET.pack(NEEDS_CHECKSUM, TCP4, head, size, 20, 16)), buffer, len(large))
    sent = []
    for burst in bursts:
        assert len(burst.pieces) // 2 <= 64
        assert sum(map(len, burst.pieces)) <= 65507
        one = [bytes(burst.pieces[at]) + bytes(burst.pieces[at + 1]) for at in range(0, len(burst.pieces), 2)]
        assert {len(packet) for packet in one[:-1]} <= {burst.size}
        assert len(one[-1]) <= burst.size
        sent += one
    parts = [payload[at : at + size] for at in range(0, length, size)]
    expected = [
        tcp(
            part, seq=(first + at * size) & 0xFFFFFFFF, number=(number + at) & 0xFFFF, ip_options=ip_options,
            flags=flags if at == len(parts) - 1 else "A",
        )
        for at, part in enumerate(parts)
    ]  # fmt: skip
    assert sent == expected


@pytest.mark.parametrize(
    ("kind", "size", "change"),
    [
        (3, 100, {}),
        (TCP4, 0, {}),
        (TCP4 | 0x80, 100, {}),
        (TCP4, 100, {9: 17}),
        (TCP4, 100, {0: 0x41}),
        (TCP4, 100, {32: 0x10}),
        (TCP4, 65535, {}),
    ],
)
def test_what_cannot_be_cut_is_dropped(kind: int, size: int, change: dict[int, int]) -> None:
    packet = bytearray(tcp(b"x" * 1000))
    for place, value in change.items():
        packet[place] = value
    assert cut(bytearray(VNET.pack(1, kind, 40, size, 20, 16)), packet, len(packet)) == []


def burst(count: int, size: int, last: int, *, flags: str = "A", **more: int) -> list[bytes]:
    rest = random.Random(count)
    sizes = [size] * (count - 1) + [last]
    return [
        tcp(rest.randbytes(one), seq=5000 + at * size, number=at, flags=flags if at == count - 1 else "A", **more)  # type: ignore[arg-type]
        for at, one in enumerate(sizes)
    ]


@pytest.mark.parametrize(("count", "last"), [(2, 1420), (2, 1), (40, 1420), (44, 777), (3, 1419)])
@pytest.mark.parametrize("flags", ["A", "PA", "FPA"])
def test_a_burst_becomes_one_packet(count: int, last: int, flags: str) -> None:
    packets = burst(count, 1420, last, flags=flags)
    (written,) = joined(b"".join(packets), len(packets[0]))
    payload = b"".join(packet[52:] for packet in packets)
    assert VNET.unpack(written[: VNET.size]) == (NEEDS_CHECKSUM, TCP4, 52, 1420, 20, 16)
    whole = hop_taken(tcp(payload, seq=5000, number=0, flags=flags))
    assert written[VNET.size :] == bytes(unfinished(whole, 16))


def other(change: str) -> list[bytes]:
    """A burst whose third packet does not belong to it."""
    packets = burst(5, 1420, 1420)
    third = IP(packets[2])
    if change == "checksum":
        return [*packets[:2], packets[2][:-1] + bytes([packets[2][-1] ^ 1]), *packets[3:]]
    fields = {
        "port": (third[TCP], "dport", 81), "sequence": (third[TCP], "seq", 1), "window": (third[TCP], "window", 9),
        "acknowledgement": (third[TCP], "ack", 6), "flags": (third[TCP], "flags", "AU"), "hops": (third, "ttl", 9),
        "service": (third, "tos", 8), "fragment": (third, "frag", 3), "source": (third, "src", "10.244.1.6"),
        "options": (third[TCP], "options", [("NOP", None), ("NOP", None), ("Timestamp", (77, 89))]),
    }  # fmt: skip
    layer, name, value = fields[change]
    setattr(layer, name, value)
    del third.chksum, third[TCP].chksum
    return [*packets[:2], bytes(third), *packets[3:]]


@pytest.mark.parametrize(
    "change",
    ["port", "sequence", "window", "acknowledgement", "flags", "hops", "service", "fragment", "source", "options",
     "checksum"],
)  # fmt: skip
def test_what_belongs_to_no_burst_goes_alone(change: str) -> None:
    packets = other(change)
    written = joined(b"".join(packets), len(packets[0]))
    alone = NO_OFFLOAD + hop_taken(packets[2])
    assert alone in written
    if change == "checksum":
        assert written[:3] == [NO_OFFLOAD + hop_taken(packet) for packet in packets[:3]], "nothing is joined unseen"
        assert len(written) == 4
    else:
        assert [VNET.unpack(one[: VNET.size])[1] for one in written] == [TCP4, 0, TCP4]


def test_packets_of_two_flows_keep_their_order() -> None:
    mixed = [one for pair in zip(burst(4, 1420, 1420), burst(4, 1420, 1420, port=81), strict=True) for one in pair]
    assert joined(b"".join(mixed), 1472) == [NO_OFFLOAD + hop_taken(packet) for packet in mixed]


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45" * 19,
        tcp(b"x", target="10.244.3.7"),
        tcp(b"x", ttl=1),
        b"\x65" + tcp(b"x")[1:],
        b"\x44" + tcp(b"x")[1:],
        tcp(b"x" * 50)[:-1],
        tcp(b"x")[:2] + b"\0\x13" + tcp(b"x")[4:],
    ],
)
def test_a_datagram_that_is_no_packet_for_us_is_dropped(packet: bytes) -> None:
    assert joined(packet, len(packet)) == []
    good = tcp(b"y" * max(0, len(packet) - 52), options=True)
    if len(good) == len(packet):
        assert joined(packet + good, len(packet)) == [NO_OFFLOAD + hop_taken(good)]


def test_any_bytes_do_no_harm() -> None:
    rest = random.Random(20)
    good = b"".join(burst(4, 500, 500))
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(rest.randrange(12)):
            data[rest.randrange(len(data))] = rest.randrange(256)
        length, size = rest.randrange(len(data) + 1), rest.choice((552, 552, 1, 20, 39, 40, rest.randrange(1, 2300)))
        given = bytes(data[:length])
        for one in joined(given, size):
            assert int(IPv4Address(one[26:30])) & int(OWN.netmask) == int(OWN.network_address)
        header = bytearray(rest.randbytes(VNET.size))
        header[1] = rest.choice((TCP4, rest.randrange(256)))
        finish_checksum(header, bytearray(data), len(data))
        for burst_ in cut(header, bytearray(data), len(data)):
            assert all(len(piece) for piece in burst_.pieces)
