"""Debian's kernel source: found and fetched by apt with a state of its own, so that the machine's stays untouched."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import LabError
from testbed.labs import Progress

TESTED = ((7, 2), (7, 3))
"""The first and the last version of the kernel that the configuration is known to work with."""

SUITES = ("trixie-backports", "forky", "sid")
"""Where a source is looked for, in this order: backports drops a version when the next one comes."""

MIRROR_VARIABLE = "TESTBED_DEBIAN_MIRROR"
KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
FETCH_SECONDS = 900.0


class GuestUnavailable(LabError):
    """This way to a guest kernel is closed here; another may be open."""


@dataclass(frozen=True, slots=True)
class Source:
    """A package of kernel source. `version` is Debian's."""

    package: str
    version: str

    @property
    def series(self) -> tuple[int, ...]:
        """`(7, 2)` of `linux-source-7.2`."""
        return series(self.package)


def series(package: str) -> tuple[int, ...]:
    """The kernel version in a package's name; () where there is none."""
    found = re.fullmatch(r"linux-source-(\d+)\.(\d+)", package)
    return tuple(int(part) for part in found.groups()) if found else ()


def usable(packages: Sequence[str], suite: str) -> list[str]:
    """The packages of the tested range, newest first. Raises GuestUnavailable where a suite has none."""
    known = sorted((series(name), name) for name in packages if series(name))
    found = [name for version, name in reversed(known) if TESTED[0] <= version <= TESTED[1]]
    if found:
        return found
    first, last = (".".join(map(str, version)) for version in TESTED)
    there = ", ".join(name for _, name in known) or "no linux-source-* at all"
    raise GuestUnavailable(
        f"{suite} has no kernel source of version {first} to {last}, which this test-bed is tested with, but {there}",
        hint="a newer test-bed knows newer kernels; a guest kernel that was built before goes on working",
    )


def mirror() -> str:
    """The Debian mirror that this machine's apt uses. Raises GuestUnavailable where there is none."""
    if given := os.environ.get(MIRROR_VARIABLE):
        return given.rstrip("/")
    argv = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(SITE)", "Created-By: Packages"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise GuestUnavailable(
            "the guest kernel is built from Debian's kernel source, which apt-get fetches; there is none here",
            hint="run it on Debian or Ubuntu, or bring a guest kernel built there",
        ) from None
    for line in done.stdout.splitlines():
        origin, _, rest = line.partition(" ")
        codename, _, site = rest.partition(" ")
        if origin == "Debian" and "security" not in codename:
            return site.rstrip("/")
    raise GuestUnavailable(
        "no Debian mirror is known to apt on this machine, and the guest kernel is built from Debian's source",
        hint=f"apt-get update; or set {MIRROR_VARIABLE} to the address of a Debian mirror",
    )


def keyring() -> Path:
    """Debian's own archive keyring. Raises GuestUnavailable where it is not installed."""
    for path in KEYRINGS:
        if path.is_file():
            return path
    raise GuestUnavailable(
        "Debian's archive keyring is missing, so nothing can tell whether the kernel source is Debian's",
        hint="as root: apt-get install debian-archive-keyring",
    )


class Apt:
    """apt with its lists, its cache and its configuration in a folder of ours."""

    def __init__(self, folder: Path, suite: str = SUITES[0], *, installed: bool = False) -> None:
        """Of one suite of Debian; what is `installed` on this machine counts as there, else nothing does.

        Raises GuestUnavailable where there is no mirror, or nothing to check its signatures by.
        """
        self.folder, self.suite = folder, suite
        for name in ("lists/partial", "cache/archives/partial", "etc"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(f"deb [signed-by={keyring()}] {mirror()} {suite} main\n")
        # Nothing of the machine's own apt: neither its sources nor its preferences, and no user of its own to be.
        settings = {
            "Dir::State": folder,
            "Dir::State::status": "/var/lib/dpkg/status" if installed else folder / "status",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "etc",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": folder / "etc",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "APT::Sandbox::User": "",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::AllowInsecureRepositories": "false",
        }
        configuration = folder / "apt.conf"
        configuration.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        self.environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C.UTF-8"}

    def run(self, *argv: str, cwd: Path | None = None) -> str:
        """Run one of apt's programs; returns its output. Raises GuestUnavailable."""
        try:
            done = subprocess.run(
                argv,
                env=self.environment,
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=FETCH_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise GuestUnavailable(
                f"`{' '.join(argv[:2])}` took more than {FETCH_SECONDS:.0f} s", hint="try again with a better network"
            ) from None
        if done.returncode:
            said = "\n".join(line for line in done.stderr.splitlines() if line.startswith(("E:", "W:")))
            raise GuestUnavailable(
                f"nothing can be had from Debian's mirror: `{' '.join(argv[:2])}` failed\n{said[-1500:]}".rstrip(),
                hint=f"is the network there? {MIRROR_VARIABLE} names another mirror",
            )
        return done.stdout

    def update(self) -> None:
        """Fetch the mirror's lists. Raises GuestUnavailable."""
        self.run("apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any")

    def shown(self, package: str, key: str) -> str:
        """What the mirror's lists say of a package; "" where they do not. Raises GuestUnavailable without it."""
        shown = self.run("apt-cache", "show", "--no-all-versions", package)
        said = (line.partition(": ")[2] for line in shown.splitlines() if line.startswith(f"{key}: "))
        return next(said, "")

    def sources(self) -> list[Source]:
        """Look at the mirror, and return the sources of the tested range, newest first. Raises GuestUnavailable."""
        self.update()
        listed = self.run("apt-cache", "search", "--names-only", r"^linux-source-[0-9.]+$")
        packages = usable([line.split(" ", 1)[0] for line in listed.splitlines()], self.suite)
        return [Source(package, self.shown(package, "Version")) for package in packages]

    def download(self, package: str, version: str = "") -> Path:
        """Download a package, its signature checked by apt; returns the file. Raises GuestUnavailable."""
        archives = self.folder / "cache" / "archives"
        self.run("apt-get", "download", f"{package}={version}" if version else package, cwd=archives)
        found = sorted(archives.glob(f"{package}_*.deb"))
        if not found:
            raise GuestUnavailable(f"apt-get downloaded no {package}", hint="try again")
        return found[-1]

    def fetch(self, source: Source) -> Path:
        """Download a source package. Raises GuestUnavailable."""
        return self.download(source.package, source.version)


def debian_suites() -> tuple[str, ...]:
    """Where packages of programs that run on this machine come from: its own release, then the oldest known to do."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        system = {}
    own = [system["VERSION_CODENAME"]] if system.get("ID") == "debian" and "VERSION_CODENAME" in system else []
    return tuple(dict.fromkeys([*own, "bookworm"]))


def unpack_package(package: Path, folder: Path) -> None:
    """Unpack a package's files into a folder. Raises GuestUnavailable."""
    folder.mkdir(exist_ok=True)
    try:
        done = subprocess.run(["dpkg-deb", "-x", package, folder], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise GuestUnavailable("dpkg-deb is missing", hint="run it on Debian or Ubuntu") from None
    if done.returncode:
        raise GuestUnavailable(
            f"{package.name} cannot be unpacked\n{done.stderr.strip()[-500:]}",
            where=str(folder),
            hint="free some space there, try again",
        )


def fetch_source(folder: Path, progress: Progress) -> tuple[Source, Path]:
    """Download the newest source of the tested range that can be had; returns it and its package.

    Raises GuestUnavailable, where none can, with what closes each of the ways.
    """
    faults: list[GuestUnavailable] = []
    keyring(), mirror()  # without these no suite can be had
    for suite in SUITES:
        try:
            with progress.step(f"Looking for Debian's newest kernel source in {suite}"):
                apt = Apt(folder / suite, suite)
                sources = apt.sources()
        except GuestUnavailable as error:
            faults.append(error)
            continue
        for source in sources:
            try:
                with progress.step(f"Fetching {source.package} {source.version}, 160 MB"):
                    return source, apt.fetch(source)
            except GuestUnavailable as error:
                faults.append(error)
    raise GuestUnavailable(
        "no kernel source can be had\n" + "\n".join(dict.fromkeys(fault.what for fault in faults)), hint=faults[0].hint
    )


#: What a guest kernel's build never reads, by pattern: half of the source's size.
LEFT_OUT = (
    *("*/arch/[a-tv-w]*/*.[chS]", "*/arch/xtensa/*.[chS]", "*/Documentation/*.rst", "*/drivers/gpu/drm/*.[ch]"),
    *("*/tools/testing", "*.dts", "*.dtsi"),
)


def unpack(package: Path, source: Source, folder: Path) -> None:
    """Unpack the kernel's source out of Debian's package into a folder. Raises GuestUnavailable."""
    folder.mkdir()
    for program in ("dpkg-deb", "tar", "xz"):
        if shutil.which(program) is None:
            raise GuestUnavailable(f"{program} is missing", hint=f"install {program}")
    member = f"./usr/src/{source.package}.tar.xz"
    into = ["tar", "-x", "-C", str(folder), "--no-same-owner", "--strip-components=1", "--wildcards"]
    steps = (
        ["dpkg-deb", "--fsys-tarfile", str(package)],
        ["tar", "-xO", member],
        ["xz", "-dc", "-T0"],
        [*into, *(f"--exclude={pattern}" for pattern in LEFT_OUT)],
    )
    processes: list[subprocess.Popen[bytes]] = []
    for argv in steps:
        before = processes[-1].stdout if processes else subprocess.DEVNULL
        processes.append(subprocess.Popen(argv, stdin=before, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        if not isinstance(before, int) and before is not None:
            before.close()
    errors = [process.communicate()[1] for process in reversed(processes)]
    if any(process.returncode for process in processes):
        said = b"\n".join(reversed(errors)).decode(errors="replace").strip()[-1000:]
        raise GuestUnavailable(
            f"the kernel source cannot be unpacked\n{said}", where=str(folder), hint="free some space there, try again"
        )
