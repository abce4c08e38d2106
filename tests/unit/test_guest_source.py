"""Which kernel source is taken, and what is said where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.guest import source
from testbed.guest.source import GuestUnavailable, Source
from testbed.labs import Quiet


def programs(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> None:
    """A PATH on which there are these shell scripts, and what scripts need."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def keyring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "keyring.gpg"
    path.touch()
    monkeypatch.setattr(source, "KEYRINGS", (path,))
    return path


def test_the_newest_tested_version_is_taken() -> None:
    names = ["linux-source-7.3", "linux-source-7.10", "linux-source-7.2", "linux-source-6.12", "linux-source"]
    assert source.usable(names, "sid") == ["linux-source-7.3", "linux-source-7.2"]


@pytest.mark.parametrize("names", [[], ["linux-source-6.12"], ["linux-source-7.10", "linux-source-8.0"]])
def test_an_untested_version_is_named_and_not_taken(names: list[str]) -> None:
    with pytest.raises(GuestUnavailable) as raised:
        source.usable(names, "sid")
    assert all(name in str(raised.value) for name in ["sid", *names])
    assert raised.value.hint


def test_versions_are_compared_as_numbers() -> None:
    assert Source("linux-source-7.10", "7.10.1-1").series > Source("linux-source-7.9", "7.9.8-1").series


def test_the_mirror_is_that_of_the_machine_s_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(source.MIRROR_VARIABLE, raising=False)
    lines = (
        "Other stable http://other.test/x",
        "Debian stable-security http://s.test/d",
        "Debian stable http://m.test/debian/",
    )
    programs(monkeypatch, tmp_path / "bin", apt_get="".join(f"echo '{line}'\n" for line in lines))
    assert source.mirror() == "http://m.test/debian"
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://given.test/debian/")
    assert source.mirror() == "http://given.test/debian"


@pytest.mark.parametrize("apt", [None, "echo 'Ubuntu noble http://u.test/ubuntu'"])
def test_without_a_debian_mirror_the_cure_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apt: str | None
) -> None:
    monkeypatch.delenv(source.MIRROR_VARIABLE, raising=False)
    programs(monkeypatch, tmp_path / "bin", **({"apt_get": apt} if apt else {}))
    with pytest.raises(GuestUnavailable) as raised:
        source.mirror()
    assert (source.MIRROR_VARIABLE if apt else "Debian or Ubuntu") in raised.value.hint


def test_nothing_is_fetched_without_debian_s_keyring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "KEYRINGS", (tmp_path / "none",))
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://m.test/debian")
    with pytest.raises(GuestUnavailable, match="keyring"):
        source.Apt(tmp_path / "apt")


def test_apt_trusts_the_keyring_alone_and_touches_nothing_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keyring: Path
) -> None:
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://m.test/debian")
    apt = source.Apt(tmp_path / "apt")
    listed = (tmp_path / "apt" / "sources.list").read_text()
    assert listed == f"deb [signed-by={keyring}] http://m.test/debian {source.SUITES[0]} main\n"
    dumped = subprocess.run(["apt-config", "dump"], env=apt.environment, capture_output=True, text=True, check=False)
    if dumped.returncode == 0:
        found = dict(line.rstrip(";").split(" ", 1) for line in dumped.stdout.splitlines() if '"' in line)
        for key in ("Dir::State", "Dir::State::lists", "Dir::Cache", "Dir::Etc::sourcelist", "Dir::Etc::sourceparts"):
            assert found[key].strip('"').startswith(str(tmp_path)), key


def test_a_failing_apt_is_told_with_its_words_and_a_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keyring: Path
) -> None:
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://m.test/debian")
    apt = source.Apt(tmp_path / "apt")
    programs(monkeypatch, tmp_path / "bin", apt_get="echo 'E: Failed to fetch x  404  Not Found' >&2; exit 100")
    apt.environment["PATH"] = str(tmp_path / "bin")
    with pytest.raises(GuestUnavailable) as raised:
        apt.sources()
    assert "404  Not Found" in str(raised.value)
    assert source.MIRROR_VARIABLE in raised.value.hint


APT_GET = """case "$*" in
*update*) grep -q {listed} "$(dirname "$APT_CONFIG")/sources.list" || {{ echo "E: no Release" >&2; exit 100; }} ;;
*download*{there}=*) touch "${{2%=*}}_1_all.deb" ;;
*) echo 'E: 404  Not Found' >&2; exit 100 ;;
esac"""
APT_CACHE = """case "$*" in
*search*) echo 'linux-source-7.2 - x'; echo 'linux-source-7.3 - x' ;;
*show*) echo 'Version: 7.9-1' ;;
esac"""


@pytest.mark.parametrize(
    ("listed", "there", "suite", "package"),
    [
        ("trixie-backports", "7.3", "trixie-backports", "linux-source-7.3"),
        ("trixie-backports", "7.2", "trixie-backports", "linux-source-7.2"),
        ("sid", "7.3", "sid", "linux-source-7.3"),
    ],
)
@pytest.mark.usefixtures("keyring")
def test_where_a_package_is_gone_the_next_of_the_tested_range_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, there: str, suite: str, package: str
) -> None:
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://m.test/debian")
    tools = tmp_path / "bin"
    for tool in ("grep", "dirname", "touch"):
        tools.mkdir(exist_ok=True)
        (tools / tool).symlink_to(str(shutil.which(tool)))
    programs(monkeypatch, tools, apt_get=APT_GET.format(listed=listed, there=there), apt_cache=APT_CACHE)
    found, file = source.fetch_source(tmp_path / "apt", Quiet())
    assert (found.package, found.version) == (package, "7.9-1")
    assert file.is_relative_to(tmp_path / "apt" / suite)
    assert file.exists()


@pytest.mark.usefixtures("keyring")
def test_where_every_source_is_gone_all_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(source.MIRROR_VARIABLE, "http://m.test/debian")
    programs(monkeypatch, tmp_path / "bin", apt_get="echo 'E: 404  Not Found' >&2; exit 100")
    with pytest.raises(GuestUnavailable) as raised:
        source.fetch_source(tmp_path / "apt", Quiet())
    assert str(raised.value).count("404  Not Found") == 1
    assert source.MIRROR_VARIABLE in raised.value.hint


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
def test_a_broken_package_is_told(tmp_path: Path) -> None:
    package = tmp_path / "broken.deb"
    package.write_bytes(b"half of it")
    with pytest.raises(GuestUnavailable, match="cannot be unpacked"):
        source.unpack(package, Source("linux-source-7.2", "7.2.1-1"), tmp_path / "tree")
