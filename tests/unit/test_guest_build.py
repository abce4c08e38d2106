"""The cache of guest kernels, and what a build needs before it starts."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed import doctor
from testbed.errors import InputError, LabError
from testbed.guest import build, kernels
from testbed.guest.features import SYMBOLS, lacking_features
from testbed.guest.source import GuestUnavailable, Source
from testbed.labs import Progress, Quiet

SOURCE = Source("linux-source-7.2", "7.2.12-1~bpo13+1")
SETTINGS = build.fragment_settings((build.configuration_folder() / "fragment").read_text())


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(build, "compiler", lambda: "gcc 1")
    monkeypatch.setattr(build, "require_compiler", lambda: None)
    return build.cache_folder()


def keep(cache: Path, source: Source = SOURCE, program: bytes = b"a kernel", built_by: str = "gcc 1") -> Path:
    """A finished build, as `build` leaves it."""
    place = cache / build.fingerprint(SETTINGS, source, built_by)
    place.mkdir()
    (place / "linux").write_bytes(program)
    facts = {
        "source": source.package,
        "version": source.version,
        "compiler": built_by,
        "sha256": hashlib.sha256(b"a kernel").hexdigest(),
        "built_at": "2026-01-01T00:00:00Z",
    }
    (place / "build.json").write_text(json.dumps(facts))
    return place


def test_a_build_is_found_again(cache: Path) -> None:
    place = keep(cache)
    found = build.find_built()
    assert found is not None
    assert found.path == place / "linux"
    assert found.version == SOURCE.version
    assert build.build() == found


def test_the_newest_series_is_taken(cache: Path) -> None:
    newest = keep(cache, Source("linux-source-7.3", "7.3.1-1"))
    keep(cache)
    found = build.find_built()
    assert found is not None
    assert found.path.parent == newest


@pytest.mark.parametrize("spoil", ["half a kernel", "no record", "half a record", "no kernel"])
def test_what_is_half_written_is_as_if_it_were_not_there(cache: Path, spoil: str) -> None:
    place = keep(cache)
    if spoil == "half a kernel":
        (place / "linux").write_bytes(b"a ker")
    elif spoil == "no record":
        (place / "build.json").unlink()
    elif spoil == "half a record":
        (place / "build.json").write_text((place / "build.json").read_text()[:30])
    else:
        (place / "linux").unlink()
    assert build.find_built() is None


def test_another_configuration_source_or_compiler_is_another_build() -> None:
    names = {
        build.fingerprint(SETTINGS, SOURCE, "gcc 1"),
        build.fingerprint(SETTINGS[1:], SOURCE, "gcc 1"),
        build.fingerprint(SETTINGS, Source(SOURCE.package, "7.2.13-1"), "gcc 1"),
        build.fingerprint(SETTINGS, SOURCE, "gcc 2"),
    }
    assert len(names) == 4


def test_a_comment_in_the_configuration_changes_nothing() -> None:
    text = "# why\nCONFIG_A=y\n\n# CONFIG_B is not set\n"
    assert build.fragment_settings(text) == ("CONFIG_A=y", "# CONFIG_B is not set")


def test_another_compiler_s_build_is_not_taken_while_there_is_a_compiler(cache: Path) -> None:
    keep(cache, built_by="gcc 2")
    assert build.cached(cache, SETTINGS, "gcc 1") is None
    assert build.cached(cache, SETTINGS, None) is not None


def test_what_a_killed_build_left_is_removed_and_a_failed_one_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / ".building-old").mkdir()

    def fail(scratch: Path, *_: object) -> None:
        (scratch / "half").write_text("")
        raise GuestUnavailable("the mirror is gone")

    monkeypatch.setattr(build, "_build_in", fail)
    with pytest.raises(GuestUnavailable, match="mirror"):
        build.build()
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_who_waits_for_another_s_build_takes_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()

    class Seen:
        @contextmanager
        def step(self, text: str) -> Iterator[None]:
            if "Waiting" in text:
                waiting.set()
            yield

    monkeypatch.setattr(build, "_build_in", lambda *_: pytest.fail("built twice"))
    found: list[build.Kernel] = []
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(build.build(Seen())))
        other.start()
        assert waiting.wait(10)
        place = keep(cache)
    other.join(10)
    assert found[0].path.parent == place


def test_everything_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda program: None if program in {"gcc", "flex"} else "/bin/x")
    with pytest.raises(GuestUnavailable) as raised:
        build.require_compiler()
    assert "apt-get install" in raised.value.hint
    assert {"gcc", "flex"} <= set(raised.value.hint.split())


def test_arm64_is_told_its_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(GuestUnavailable) as raised:
        build.require_compiler()
    assert "QEMU" in raised.value.hint


def test_a_full_disk_is_told_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 100 << 20))
    monkeypatch.setattr(build, "_build_in", lambda *_: pytest.fail("it began"))
    with pytest.raises(GuestUnavailable) as raised:
        build.build()
    assert "100 MiB are free" in raised.value.what
    assert "XDG_CACHE_HOME" in raised.value.hint


def test_no_cache_folder_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GuestUnavailable) as raised:
        build.cache_folder()
    assert "XDG_CACHE_HOME" in raised.value.hint


def test_a_lacking_symbol_is_found() -> None:
    config = "CONFIG_VETH=y\nCONFIG_TUN=m\n# CONFIG_BRIDGE is not set\n"
    assert build.lacking(config, ("VETH", "TUN", "BRIDGE", "VXLAN")) == ["TUN", "BRIDGE", "VXLAN"]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_a_source_that_drops_what_is_needed_is_told_loudly(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    there = "".join(f"CONFIG_{symbol}=y\\n" for symbol in build.must_have() if symbol != "WIREGUARD")
    (tree / "Makefile").write_text(f"allnoconfig:\n\t@printf '{there}' >.config\n")
    with pytest.raises(LabError, match="WIREGUARD"):
        build.configure(tree, build.configuration_folder() / "fragment", tmp_path / "log")


def test_the_configuration_asks_for_all_that_it_must_have() -> None:
    asked = set(build.lacking("\n".join(SETTINGS), build.must_have()))
    assert asked <= {"SECCOMP_FILTER"}, "turned on by another, in this list alone"


@needs_make
def test_a_build_that_fails_shows_the_compiler_s_words(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(
        "linux:\n\t@echo '  CC      net/x.o'; echo 'x.c:1: error: no such thing' >&2; false\n"
    )
    with pytest.raises(LabError) as raised:
        build.compile_kernel(tmp_path, tmp_path / "log", Quiet())
    assert "no such thing" in str(raised.value)
    assert str(tmp_path / "log") in raised.value.hint


def test_the_next_way_is_tried_and_every_one_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(what: str, hint: str) -> Callable[[Progress], build.Kernel]:
        def way(_: Progress) -> build.Kernel:
            raise GuestUnavailable(what, hint=hint)

        return way

    ways = {"uml": closed("no compiler", "install one"), "packaged": closed("no mirror", "name one")}
    monkeypatch.setattr(kernels, "WAYS", ways)
    with pytest.raises(GuestUnavailable) as raised:
        kernels.obtain_kernel()
    for words in ("no compiler", "no mirror"):
        assert words in raised.value.what
    assert raised.value.hint == "install one; or name one"
    packaged = build.Kernel(Path("/usr/bin/linux.uml"), "6.1", "packaged", lacks=("wireguard",))
    monkeypatch.setattr(kernels, "WAYS", ways | {"packaged": lambda _: packaged})
    assert kernels.obtain_kernel() == packaged
    assert kernels.obtain_kernel(needs=["vxlan"]) == packaged
    with pytest.raises(GuestUnavailable, match="has no wireguard"):
        kernels.obtain_kernel(needs=["wireguard", "vxlan"])
    with pytest.raises(GuestUnavailable, match="no compiler"):
        kernels.obtain_kernel(way="uml")
    with pytest.raises(InputError, match="vmware"):
        kernels.obtain_kernel(way="vmware")


def test_what_a_configuration_lacks_is_told_as_features() -> None:
    whole = "".join(f"CONFIG_{symbol}=m\n" for symbol in build.must_have())
    assert lacking_features(whole) == ()
    assert lacking_features(whole.replace("CONFIG_WIREGUARD=m", "# CONFIG_WIREGUARD is not set")) == ("wireguard",)
    assert {"iptables_nft", "nftables"} <= set(lacking_features(whole.replace("CONFIG_NF_TABLES=m\n", "")))


def test_every_feature_is_known_by_symbols_that_are_checked() -> None:
    assert set(SYMBOLS) >= set(doctor._FEATURES)
    assert {symbol for symbols in SYMBOLS.values() for symbol in symbols} <= set(build.must_have())
