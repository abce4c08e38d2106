"""alloc: a subnet for the node, and nothing else; how packets get to other nodes is somebody else's business."""

from __future__ import annotations

from flannel import log
from flannel.backends.base import Backend
from flannel.interface import External
from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf, unread_keys


class AllocBackend(Backend):
    """See flannel-behaviour.md, section 3.8."""

    name = "alloc"

    def __init__(self, conf: NetConf, external: External) -> None:
        self.mtu = external.mtu
        self._external = external
        for note in unread_keys(conf, ()):
            log.warning(note)

    def attrs(self) -> LeaseAttrs:
        """What is published: the address alone, as upstream does."""
        return LeaseAttrs(self._external.public)
