"""For whom a lab is rendered: containerlab, kind, Clabernetes, or all of them."""

from __future__ import annotations

from collections.abc import Mapping

from testbed import byhand, clabernetes
from testbed.errors import InputError
from testbed.flannelspec import FlannelSpec
from testbed.model import LabSpec
from testbed.render import CLAB, CLAB_KIND, FABRIC_IN_KIND, FLANNEL, KIND, WORKLOADS, Images, render_all

TARGETS = ("clab", "kind", "clabernetes")
ALL = "all"

_FILES = {"clab": (CLAB,), "kind": (CLAB_KIND, KIND, FLANNEL, WORKLOADS)}


def render_target(
    lab: LabSpec,
    flannel: FlannelSpec,
    target: str = ALL,
    *,
    images: Images | None = None,
    artefacts: str = "artefacts",
    bundled: str = "flannel",
) -> Mapping[str, str]:
    """Every file that `testbed render --target` writes, by its path in the output folder.

    `artefacts` is the folder with the CNI plugins for kind, `bundled` that of the flannel that comes with this
    project.  Raises InputError for a target there is not and for a flannel that does not fit the lab, LabError where
    a file does not say what the model says.
    """
    if target not in (*TARGETS, ALL):
        raise InputError(f"nothing is rendered for {target!r}", hint=f"one of {', '.join((*TARGETS, ALL))}")
    targets = TARGETS if target == ALL else (target,)
    images = images or Images()
    everything = render_all(lab, flannel, images=images, artefacts=artefacts)
    wanted = {name for one in targets for name in _FILES.get(one, ())}
    files = {name: text for name, text in everything.items() if name in wanted}
    if {"clab", "kind"} & set(targets):
        files |= {name: text for name, text in everything.items() if name.startswith("frr/")}
        files |= {f"{byhand.ADDRESSES}/{n.name}.batch": byhand.node_addresses(lab, n) for n in lab.nodes}
    if "clab" in targets:
        files |= byhand.flannel_files(flannel)
    if "kind" in targets:
        for node in lab.cluster_nodes:
            batch = byhand.node_addresses(lab, node, underlay=FABRIC_IN_KIND)
            files[f"{byhand.FABRIC_ADDRESSES}/{node.name}.batch"] = batch
    if "clabernetes" in targets:
        files[clabernetes.FILE] = clabernetes.render_clabernetes(lab, images)
        clabernetes.check_clabernetes(files[clabernetes.FILE], lab)
    files[byhand.README] = byhand.render_readme(lab, flannel, images, targets, bundled)
    return files
