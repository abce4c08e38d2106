"""What is wrong with a user's manifests for flannel, found without any lab or cluster."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.errors import Fault
from testbed.manifestcluster import Network, check_keys, check_network, check_versions
from testbed.manifestdaemon import check_daemon
from testbed.manifestobjects import Findings, Manifest
from testbed.manifestrights import check_accounts, check_rights


def check_manifest(manifest: Manifest, pod_cidrs: Sequence[tuple[Network, str]] = ()) -> Findings:
    """Check what a cluster makes of a manifest that was read. What reading it found is not told again.

    `pod_cidrs` are the networks of the cluster's pods as far as they are known, each with who said so.
    """
    findings = Findings()
    check_keys(manifest, findings)
    check_network(manifest, pod_cidrs, findings)
    check_versions(manifest, findings)
    check_accounts(manifest, findings)
    for daemon in manifest.daemons:
        check_daemon(manifest, daemon, findings)
        check_rights(manifest, daemon, findings)
    return Findings(in_order(findings.faults), in_order(findings.warnings))


def in_order(faults: Sequence[Fault]) -> list[Fault]:
    """The faults by file and line, each once."""
    return sorted(dict.fromkeys(faults), key=lambda fault: (fault.file, fault.line))
