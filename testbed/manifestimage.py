"""What an image's name says: flannel's version, and the architecture of images for one alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ARCHITECTURES = ("amd64", "arm64", "arm", "ppc64le", "s390x", "riscv64", "mips64le", "386")

ARCHITECTURE_LABELS = ("kubernetes.io/arch", "beta.kubernetes.io/arch")

OS_LABELS = ("kubernetes.io/os", "beta.kubernetes.io/os")


def tag_of(image: str) -> str:
    """The tag of an image; "" where it has none."""
    last = image.rsplit("/", 1)[-1].partition("@")[0]
    return last.partition(":")[2]


def version_of(image: str) -> tuple[int, int] | None:
    """Major and minor version of an image's tag; None where it tells none."""
    match = re.match(r"v?(\d{1,4})\.(\d{1,4})(?:\D|$)", tag_of(image))
    return (int(match.group(1)), int(match.group(2))) if match else None


def architecture_of(image: str) -> str:
    """The one architecture that an image is for; "" where it does not say so, as images for many do not."""
    last = image.rsplit("/", 1)[-1].partition("@")[0]
    name, _, tag = last.partition(":")
    found = re.search(rf"[-_]({'|'.join(ARCHITECTURES)})$", tag) or re.search(
        rf"[-_]({'|'.join(ARCHITECTURES)})$", name
    )
    return found.group(1) if found else ""


def selected(pod: Mapping[str, Any], labels: tuple[str, ...]) -> set[str] | None:
    """The values of a label that a pod's node must have, by selector and required affinity; None for any."""
    found: set[str] | None = None
    selector = pod.get("nodeSelector")
    for label in labels:
        if isinstance(selector, dict) and label in selector:
            found = {str(selector[label])}
    terms: Any = pod.get("affinity")
    for key in ("nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"):
        terms = terms.get(key) if isinstance(terms, dict) else None
    in_terms: set[str] = set()
    for term in terms if isinstance(terms, list) else ():
        values = _values(term, labels)
        if values is None:
            return found  # one of the alternatives takes any node
        in_terms |= values
    if in_terms:
        found = in_terms if found is None else found & in_terms
    return found


def _values(term: Any, labels: tuple[str, ...]) -> set[str] | None:
    expressions = term.get("matchExpressions") if isinstance(term, dict) else None
    for expression in expressions if isinstance(expressions, list) else ():
        if isinstance(expression, dict) and expression.get("key") in labels and expression.get("operator") == "In":
            values = expression.get("values")
            return {str(value) for value in values} if isinstance(values, list) else set()
    return None
