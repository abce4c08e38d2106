"""What QEMU is started with and boots from, and how Debian's packages become a guest without being installed."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import os
import platform
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from testbed.guest import initramfs, kernels, packaged, qemu, source
from testbed.guest.build import Kernel
from testbed.guest.features import SYMBOLS
from testbed.guest.runs import needs
from testbed.guest.source import GuestUnavailable
from testbed.labs import Quiet


def module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def test_modules_are_taken_with_all_that_they_need_and_no_others(tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "kernel"
    tree.mkdir(parents=True)
    (tree / "9p.ko").write_bytes(module("9pnet", "netfs"))
    (tree / "9pnet.ko.xz").write_bytes(lzma.compress(module()))
    (tree / "netfs.ko.gz").write_bytes(gzip.compress(module()))
    (tree / "virtio_pci.ko").write_bytes(module("virtio-ring", "builtin"))
    (tree / "virtio-ring.ko").write_bytes(module())
    (tree / "vxlan.ko").write_bytes(module("udp_tunnel"))
    (tree / "udp_tunnel.ko").write_bytes(module())
    (tree / "floppy.ko").write_bytes(module())
    boot = initramfs.take_modules(tree, tmp_path / "taken")
    names = [path.stem for path in boot]
    assert set(names) == {"virtio_ring", "virtio_pci", "9pnet", "netfs", "9p"}
    assert names.index("virtio_ring") < names.index("virtio_pci")
    assert max(names.index("9pnet"), names.index("netfs")) < names.index("9p")
    assert (tmp_path / "taken/9pnet.ko").read_bytes() == module(), "as finit_module() takes it"
    there = {path.stem for path in (tmp_path / "taken").glob("*.ko")}
    assert {"vxlan", "udp_tunnel"} <= there
    assert "floppy" not in there
    lines = (tmp_path / "taken/modules.dep").read_text().splitlines()
    assert "vxlan.ko: udp_tunnel.ko" in lines
    assert "virtio_pci.ko: virtio_ring.ko" in lines, "what is built in is no file"


def test_an_unknown_compression_is_told(tmp_path: Path) -> None:
    (tmp_path / "9p.ko.zz").write_bytes(b"")
    with pytest.raises(GuestUnavailable, match=r"9p\.ko\.zz"):
        initramfs.take_modules(tmp_path, tmp_path / "taken")


def read_cpio(data: bytes) -> dict[str, tuple[int, tuple[int, int], bytes]]:
    """The entries of an archive in cpio's format `newc`: name → mode, device, content."""
    found: dict[str, tuple[int, tuple[int, int], bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        field = [int(data[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        name = data[at + 110 : at + 110 + field[11] - 1].decode()
        assert data[at + 110 + field[11] - 1] == 0
        start = (at + 110 + field[11] + 3) // 4 * 4
        at = (start + field[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert len(data) == at
            return found
        found[name] = (field[1], (field[9], field[10]), data[start : start + field[6]])


def test_the_initramfs_is_an_archive_that_a_kernel_reads(tmp_path: Path) -> None:
    busybox, net = tmp_path / "busybox", tmp_path / "net.ko"
    busybox.write_bytes(b"odd")
    net.write_bytes(b"\1" * 6)
    found = read_cpio(gzip.decompress(initramfs.archive(busybox, [net])))
    assert found["bin/busybox"] == (0o100755, (0, 0), b"odd")
    assert found["modules/000-net.ko"] == (0o100644, (0, 0), b"\1" * 6)
    assert found["init"][0] == 0o100755
    assert found["dev/console"] == (0o020600, (5, 1), b"")
    assert list(found).index("bin") < list(found).index("bin/busybox"), "folders come before what is in them"


@pytest.fixture
def boot(tmp_path: Path) -> Path:
    folder = tmp_path / "qemu"
    folder.mkdir()
    facts = {"program": shutil.which("true"), "libraries": "", "release": "6.1", "accelerator": "tcg"}
    (folder / "boot.json").write_text(json.dumps(facts))
    (folder / "config").write_text("".join(f"CONFIG_{s}=m\n" for symbols in SYMBOLS.values() for s in symbols))
    return folder


def test_qemu_shares_the_root_for_reading_and_the_rest_by_name(boot: Path) -> None:
    machine = qemu.of(boot)
    assert machine is not None
    argv = machine.arguments(1 << 30, (7, 8, 9), ["/a", "/b,c"], ["/usr/bin/python3", "x"])
    shared = [argv[position + 1] for position, word in enumerate(argv) if word == "-fsdev"]
    assert [("readonly=on" in words.split(",")) for words in shared] == [True, False, False]
    assert "path=/b,,c," in shared[2], "a comma in a path is two"
    assert machine.shares(["/a", "/b,c"]) == {"/a": "share0", "/b,c": "share1"}
    assert argv[-1].endswith(" -- /usr/bin/python3 x")
    assert "fd=7,set=1" in argv
    assert "socket,fd=9,id=line2" in argv


def test_a_program_is_no_machine_and_half_a_folder_is_told(boot: Path) -> None:
    assert qemu.of(boot / "config") is None
    (boot / "boot.json").write_text('{"program"')
    with pytest.raises(GuestUnavailable):
        qemu.of(boot)


def test_a_qemu_that_was_removed_is_told(boot: Path) -> None:
    facts = json.loads((boot / "boot.json").read_text())
    (boot / "boot.json").write_text(json.dumps(facts | {"program": "/no/qemu"}))
    with pytest.raises(GuestUnavailable, match="/no/qemu"):
        qemu.of(boot)


CONFIG = "".join(f"CONFIG_{s}=y\\n" for symbols in SYMBOLS.values() for s in symbols if s != "WIREGUARD")
UML = f"""#!/bin/sh
case $1 in --version) echo 6.1.9 ;; --showconfig) printf '{CONFIG}' ;; esac
"""


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A mirror whose package is a shell script, and a cache of the test's own."""
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "apt-get": '#!/bin/sh\ncase "$*" in *download*) touch user-mode-linux_1_amd64.deb ;; esac\n',
        "apt-cache": "#!/bin/sh\necho 'Version: 6.1um9'\n",
        "dpkg-deb": f'#!/bin/sh\nmkdir -p "$3/usr/bin" && cp {tmp_path}/linux.uml "$3/usr/bin/linux.uml"\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "linux.uml").write_text(UML)
    (tmp_path / "linux.uml").chmod(0o755)
    monkeypatch.setattr(source, "KEYRINGS", (keyring,))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://m.test/debian")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return tmp_path


def test_debian_s_kernel_is_fetched_once_and_what_it_lacks_is_known(mirror: Path) -> None:
    (mirror / "cache/testbed/guest-kernel/.fetching-killed").mkdir(parents=True)
    found = packaged.obtain_packaged(Quiet())
    assert (found.version, found.way, found.lacks) == ("6.1.9", "packaged", ("wireguard",))
    assert found.path.is_relative_to(mirror / "cache")
    (mirror / "bin/apt-get").unlink()
    assert packaged.obtain_packaged(Quiet()) == found
    assert [path.name for path in (mirror / "cache/testbed/guest-kernel").glob(".*")] == []


@pytest.mark.parametrize(("ways", "words"), [(packaged, "user-mode-linux"), (qemu, "QEMU and a kernel")])
def test_what_is_fetched_needs_a_disk_that_takes_it(
    mirror: Path, monkeypatch: pytest.MonkeyPatch, ways: ModuleType, words: str
) -> None:
    def full(*_: object) -> Kernel:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ways, "_fetch", full)
    obtain = getattr(ways, f"obtain_{ways.__name__.rpartition('.')[2]}")
    with pytest.raises(GuestUnavailable, match=f"{words} cannot be fetched: No space left") as raised:
        obtain(Quiet())
    assert "XDG_CACHE_HOME" in raised.value.hint
    monkeypatch.setattr(ways, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(GuestUnavailable, match=f"{words} takes .* MiB are free") as raised:
        obtain(Quiet())
    assert "XDG_CACHE_HOME" in raised.value.hint


def test_a_kernel_that_is_brought_along_is_asked_what_it_has(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, str(mirror / "linux.uml"))
    found = kernels.obtain_kernel()
    assert (found.path, found.way, found.lacks) == (mirror / "linux.uml", "given", ("wireguard",))
    with pytest.raises(GuestUnavailable, match="has no wireguard"):
        kernels.obtain_kernel(needs=["wireguard"])
    fetched = packaged.obtain_packaged(Quiet())
    (fetched.path.parents[1] / "lib/uml/modules").mkdir(parents=True)
    monkeypatch.setenv(kernels.VARIABLE, str(fetched.path))
    assert kernels.obtain_kernel().way == "packaged", "which is slower"
    (mirror / "linux.uml").write_text("#!/bin/sh\n")
    for path, words in (
        (mirror / "linux.uml", "no guest kernel"),
        (mirror / "gone", "no program"),
        (mirror, "no guest"),
    ):
        monkeypatch.setenv(kernels.VARIABLE, str(path))
        with pytest.raises(GuestUnavailable, match=words):
            kernels.obtain_kernel()


def test_a_kernel_may_lie_in_the_root_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "/no-such-linux")
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(kernels, "user_mode_linux", lambda path: Kernel(path, "6.1", "packaged"))
    found = kernels.given()
    assert found is not None
    assert (found.path, found.way) == (Path("/no-such-linux"), "given")


def test_a_package_that_does_not_start_here_is_told_and_not_kept(mirror: Path) -> None:
    (mirror / "linux.uml").write_text("#!/bin/sh\nexit 127\n")
    with pytest.raises(GuestUnavailable, match="does not start here"):
        packaged.obtain_packaged(Quiet())
    assert packaged.find_packaged() is None
    assert not list((mirror / "cache/testbed/guest-kernel").glob("packaged-*"))


def test_on_arm64_qemu_is_the_one_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    asked: list[str] = []

    def fetch(scratch: Path, folder: Path, progress: object) -> Kernel:
        asked.append(qemu.architecture().package)
        return Kernel(folder / "x", "6.1", "qemu")

    monkeypatch.setattr(qemu, "_fetch", fetch)
    assert kernels.obtain_kernel().way == "qemu"
    assert asked == ["qemu-system-arm"]
    for way in ("uml", "packaged"):
        with pytest.raises(GuestUnavailable) as raised:
            kernels.obtain_kernel(way=way)
        assert "QEMU" in raised.value.hint
    assert os.listdir(tmp_path / "testbed/guest-kernel") == ["lock"]


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ([], "iptables_nft"),
        (["--rules", "iptables-legacy"], "iptables_legacy"),
        (["--net-conf", "EnableNFTables=true"], "nftables"),
        (["--net-conf=EnableNFTables=true"], "nftables"),
        (["--net-conf", "EnableNFTables=false"], "iptables_nft"),
    ],
)
def test_a_guest_has_to_have_the_rules_that_the_run_asks_for(options: list[str], rules: str) -> None:
    assert rules in needs("vxlan", options)
