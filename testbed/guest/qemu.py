"""The last way to a guest: QEMU with Debian's kernel, for machines that user-mode-linux does not exist for.

QEMU is taken from PATH, or its packages are unpacked into the user's cache folder; so are the kernel and the modules
that a lab needs.  The guest's root is the host's, as with user-mode-linux, by 9p.  Without KVM it is 5 to 10 times
slower than user-mode-linux: single commands and `kernel check` work well in it, a whole run takes patience.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.guest import initramfs
from testbed.guest.build import Kernel, cache_folder, faults_of_disk, locked, require_space
from testbed.guest.features import lacking_features
from testbed.guest.inside import MODULES
from testbed.guest.source import Apt, GuestUnavailable, debian_suites, unpack_package
from testbed.labs import Progress, Quiet

NEEDED_BYTES = 1 << 30
"""What fetching takes in the cache folder for a while; 150 MB of it stay."""

ACCELERATOR = "TESTBED_QEMU_ACCELERATOR"
"""`kvm` or `tcg`: overrules what was found out by booting."""

KVM = Path("/dev/kvm")
KVM_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """What QEMU and Debian call a kind of machine."""

    program: str
    package: str
    kernel: str
    machine: str
    console: str


ARCHITECTURES: Mapping[str, Architecture] = {
    "x86_64": Architecture("qemu-system-x86_64", "qemu-system-x86", "linux-image-amd64", "pc", "ttyS0"),
    "aarch64": Architecture("qemu-system-aarch64", "qemu-system-arm", "linux-image-arm64", "virt", "ttyAMA0"),
}


def architecture() -> Architecture:
    """This machine's. Raises GuestUnavailable where none is known."""
    try:
        return ARCHITECTURES[platform.machine()]
    except KeyError:
        raise GuestUnavailable(
            f"no guest is known for {platform.machine()}", hint="--kernel host; or run it on amd64 or arm64"
        ) from None


@dataclass(frozen=True, slots=True)
class Machine:
    """A kernel with all that boots it, in a folder of the cache."""

    folder: Path
    program: Path
    libraries: str  # "" for a QEMU of the machine's own
    release: str
    accelerator: str

    @classmethod
    def at(cls, folder: Path) -> Machine:
        """The one in that folder. Raises GuestUnavailable where it is not whole."""
        try:
            facts = json.loads((folder / "boot.json").read_text())
            program, libraries = facts["program"], facts["libraries"]
            machine = cls(folder, Path(program), libraries, facts["release"], facts["accelerator"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GuestUnavailable(f"{folder} holds no guest: {error}", hint="remove it, and try again") from None
        if not os.access(machine.program, os.X_OK):
            raise GuestUnavailable(f"QEMU is gone: {machine.program}", hint=f"remove {folder}, and try again")
        return machine

    @property
    def modules(self) -> Path:
        """The folder of its kernel's modules, by release."""
        return self.folder / "modules"

    @property
    def environment(self) -> dict[str, str]:
        """What QEMU needs in its environment."""
        return {"LD_LIBRARY_PATH": self.libraries} if self.libraries else {}

    def shares(self, writable: Sequence[str]) -> dict[str, str]:
        """The names by which the guest mounts folders."""
        return {path: f"share{number}" for number, path in enumerate(writable)}

    def arguments(
        self, memory: int, channels: tuple[int, int, int], writable: Sequence[str], first: Sequence[str]
    ) -> list[str]:
        """QEMU's arguments; `channels` are inherited descriptors: output, errors, and a socket for control."""
        of = architecture()
        accelerator = os.environ.get(ACCELERATOR) or self.accelerator
        argv = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", of.machine]
        argv += ["-accel", accelerator, "-cpu", "max", "-m", f"{memory >> 20}", "-smp", "1"]
        if self.libraries:
            share = self.folder / "root" / "usr" / "share"
            for data in ("qemu", "seabios", "ipxe/qemu"):
                argv += ["-L", str(share / data)]
        argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        argv += ["-device", "virtio-serial-pci,max_ports=4"]
        out, err, control = channels
        argv += ["-add-fd", f"fd={out},set=1", "-add-fd", f"fd={err},set=2"]
        ends = ("file,append=on,path=/dev/fdset/1", "file,append=on,path=/dev/fdset/2", f"socket,fd={control}")
        for number, end in enumerate(ends):
            argv += ["-chardev", f"{end},id=line{number}", "-device", f"virtconsole,chardev=line{number}"]
        for path, tag, options in (
            ("/", "root", ",readonly=on"),
            *((path, tag, "") for path, tag in self.shares(writable).items()),
        ):
            local = f"local,id={tag},path={_quoted(path)},security_model=none,multidevs=remap{options}"
            argv += ["-fsdev", local, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        line = ["quiet", "panic=-1", f"console={of.console}", "fb_tunnels=none", "mitigations=off"]
        line += ["rcupdate.rcu_expedited=1", "--", *first]
        kernel, files = str(self.folder / "vmlinuz"), str(self.folder / "initrd")
        return [*argv, "-kernel", kernel, "-initrd", files, "-append", " ".join(line)]


def _quoted(path: str) -> str:
    return path.replace(",", ",,")


def of(kernel: Path) -> Machine | None:
    """The machine that a kernel's path stands for; None for a program, which is user-mode-linux."""
    return Machine.at(kernel) if kernel.is_dir() else None


# --- finding and fetching


def machine_in(folder: Path) -> Kernel | None:
    """The kernel that QEMU boots from that folder; None where it is not whole."""
    try:
        machine = Machine.at(folder)
        lacks = lacking_features((folder / "config").read_text())
    except (GuestUnavailable, OSError):
        return None
    return Kernel(folder, machine.release, "qemu", f"QEMU ({machine.accelerator}) with Debian's kernel", lacks)


def _name() -> str:
    """What the folder's name begins with: another choice of modules is another folder."""
    chosen = hashlib.sha256(f"{initramfs.BOOT} {MODULES} {initramfs.SCRIPT!r}".encode()).hexdigest()[:8]
    return f"qemu-{platform.machine()}-{chosen}"


def find_qemu() -> Kernel | None:
    """The kernel and the QEMU that were fetched before; None where there are none."""
    try:
        places = sorted(cache_folder().glob(f"{_name()}-*"))
    except GuestUnavailable:
        return None
    return next((kernel for place in reversed(places) if (kernel := machine_in(place))), None)


def obtain_qemu(progress: Progress | None = None) -> Kernel:
    """Return QEMU with Debian's kernel, fetched now unless it is here. Raises GuestUnavailable where it cannot be."""
    architecture()
    if kernel := find_qemu():
        return kernel
    progress = progress or Quiet()
    folder = cache_folder()
    require_space(folder, NEEDED_BYTES, "fetching QEMU and a kernel")
    with locked(folder, progress), faults_of_disk(folder, "QEMU and a kernel cannot be fetched"):
        kernel = find_qemu()
        if kernel is None:
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
                kernel = _fetch(Path(scratch), folder, progress)
    return kernel


def _fetch(scratch: Path, folder: Path, progress: Progress) -> Kernel:
    of, suite = architecture(), debian_suites()[0]
    result = scratch / "result"
    result.mkdir()
    with progress.step(f"Looking for Debian's kernel in {suite}"):
        apt = Apt(scratch / "apt", suite, installed=True)
        apt.update()
        package = apt.shown(of.kernel, "Depends").split()[0]
    with progress.step(f"Fetching {package}, 70 MB"):
        unpack_package(apt.download(package), scratch / "kernel")
        unpack_package(apt.download("busybox-static"), scratch / "busybox")
    release = package.removeprefix("linux-image-").removesuffix("-unsigned")
    place = folder / f"{_name()}-{release}"
    program = shutil.which(of.program)
    libraries = ""
    if program is None:
        with progress.step("Fetching QEMU, which is not installed, 30 MB"):
            _fetch_qemu(apt, of, result / "root")
        inside = next((result / "root").glob("usr/bin/" + of.program))
        program = str(place / inside.relative_to(result))
        triplet = f"{platform.machine()}-linux-gnu"
        libraries = ":".join(str(place / "root" / part / triplet) for part in ("usr/lib", "lib"))
    boot = scratch / "kernel" / "boot"
    shutil.copy(boot / f"vmlinuz-{release}", result / "vmlinuz")
    shutil.copy(boot / f"config-{release}", result / "config")
    unpacked = next(path for path in (scratch / "kernel").glob(f"**/lib/modules/{release}") if path.is_dir())
    modules = initramfs.take_modules(unpacked, result / "modules" / release)
    busybox = next(path for path in (scratch / "busybox").glob("**/bin/busybox") if path.is_file())
    (result / "initrd").write_bytes(initramfs.archive(busybox, modules))
    facts = {"schema": 1, "program": program, "libraries": libraries, "release": release, "accelerator": "tcg"}
    (result / "boot.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(place, ignore_errors=True)
    result.rename(place)
    if os.getuid() and os.access(KVM, os.R_OK | os.W_OK):
        with progress.step("Trying whether KVM runs a guest here"):
            if _boots(place, "kvm"):
                (place / "boot.json.new").write_text(json.dumps(facts | {"accelerator": "kvm"}, indent=1) + "\n")
                (place / "boot.json.new").rename(place / "boot.json")
    kernel = machine_in(place)
    if kernel is None:
        raise GuestUnavailable(f"what was fetched into {place} is not whole", hint="remove it, and try again")
    return kernel


def _fetch_qemu(apt: Apt, of: Architecture, root: Path) -> None:
    """QEMU and those of the libraries that it needs which are not installed."""
    try:
        apt.run("apt-get", "install", "--download-only", "-y", "--no-install-recommends", of.package)
    except GuestUnavailable as error:
        hint = f"as root: apt-get install --no-install-recommends {of.package}"
        raise GuestUnavailable(error.what, where=error.where, hint=hint) from None
    for package in sorted((apt.folder / "cache" / "archives").glob("*.deb")):
        if not package.name.startswith(("linux-image", "busybox-static")):
            unpack_package(package, root)


TRUE = """
import sys
from pathlib import Path
from testbed.guest.run import run
sys.exit(run(["true"], kernel=Path(sys.argv[1])))
"""


def _boots(folder: Path, accelerator: str) -> bool:
    """Whether a guest comes up so: a device being there says nothing of it."""
    env = {**os.environ, ACCELERATOR: accelerator}
    argv = [sys.executable, "-c", TRUE, str(folder)]
    try:
        return not subprocess.run(argv, env=env, capture_output=True, check=False, timeout=KVM_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return False
