"""The guest's root is root to every program, whoever started the guest."""

from __future__ import annotations

from tests.guest.test_run import Guest, anybody

__all__ = ["anybody"]


def test_a_setuid_program_of_the_host_s_root_runs_as_the_guest_s(anybody: Guest) -> None:
    script = "mkdir /tmp/here && mount -t tmpfs none /tmp/here && grep -c /tmp/here /proc/mounts"
    done = anybody.run("sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, b"1\n"), done.stderr.decode()
