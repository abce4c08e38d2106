"""`testbed render --target` and images' names: what is written for whom, and which images it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from testbed.commands.render import render as render_command
from testbed.errors import InputError
from testbed.flannelbuild import default_flannel
from testbed.flannelspec import BACKENDS
from testbed.images.names import FILE, REFERENCE, named_images, references
from testbed.render import Images
from testbed.targets import TARGETS, render_target
from testbed.topology import load_topology

CHECKOUT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_what_it_needs_and_nothing_of_the_others(target: str) -> None:
    lab, flannel = load_topology("racks", "t1"), default_flannel("vxlan")
    files, everything = render_target(lab, flannel, target), render_target(lab, flannel)
    own = {"clab": "lab.clab.yml", "kind": "kind.clab.yml", "clabernetes": "clabernetes.yml"}
    assert {name for name in own.values() if name in files} == {own[target]}
    assert all(files[name] == everything[name] for name in files if name != "README.md")
    titles = [line for line in files["README.md"].splitlines() if line.startswith("## ")]
    assert len(titles) == 1
    assert titles[0] in everything["README.md"]


@pytest.mark.parametrize("run", BACKENDS)
def test_every_file_that_the_readme_uses_is_written(run: str) -> None:
    lab, flannel = load_topology(BACKENDS[run].topology, "t1"), default_flannel(run)
    files = render_target(lab, flannel)
    text = "".join(BLOCK.findall(files["README.md"]))
    used = set(re.findall(r"[<\s]((?:addresses|addresses-eth1|manifests|flannel)/\S+?|\S+\.yml)[;\s]", text))
    wanted = {name.replace("$machine", node.name) for name in used for node in lab.nodes if "$machine" in name}
    wanted |= {name for name in used if "$" not in name}
    assert len(wanted) > len(lab.nodes)
    assert wanted <= set(files)
    machines = re.search(r"for machine in (.*?); do docker exec -i", text)
    assert machines
    assert machines[1].split() == [node.name for node in lab.nodes]
    for line in text.splitlines():
        assert shlex.split(line), line


def test_a_target_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is rendered for 'k3s'"):
        CliRunner().invoke(render_command, ["-o", str(tmp_path / "o"), "--target", "k3s"], catch_exceptions=False)
    assert not (tmp_path / "o").exists()


def test_images_are_named_in_one_file_only() -> None:
    named = {image.name for image in named_images().values() if "/" in image.name}
    elsewhere = []
    for top in ("testbed", "topologies", "kind-configs", "manifests"):
        for path in (CHECKOUT / top).rglob("*"):
            if path.is_file() and path != FILE and path.suffix != ".pyc":
                text = path.read_text(errors="replace")
                elsewhere += [(path.name, name) for name in named if name in text]
    # There it shows what such a name looks like.
    assert [place for place in elsewhere if place[0] != "names.py"] == []


def test_every_name_is_one_and_every_digest_whole() -> None:
    for key, image in named_images().items():
        assert REFERENCE.fullmatch(image.reference()), key
        assert re.fullmatch(r"(sha256:[0-9a-f]{64})?", image.digest), key
        assert not (image.made and image.digest), key
    assert Images().frr == f"{named_images()['frr'].name}@{named_images()['frr'].digest}"


def test_a_mirror_stands_before_what_is_pulled_in_every_file(tmp_path: Path) -> None:
    arguments = ["-o", str(tmp_path), "--image-prefix", "mirror.example:5000/hub", "--name", "t1"]
    CliRunner().invoke(render_command, arguments, catch_exceptions=False)
    found = set()
    for path in tmp_path.rglob("*.yml"):
        found |= set(re.findall(r"^\s*(?:- )?\"?image\"?: \"?([^\"\s]+)", path.read_text(), re.MULTILINE))
    assert len(found) == 6
    assert {name for name in found if not name.startswith("mirror.example:5000/hub/")} == {"testbed-node:latest"}
    assert "docker pull mirror.example:5000/hub/frrouting/frr@sha256:" in (tmp_path / "README.md").read_text()


def test_an_image_of_ones_own_stands_in_the_files(tmp_path: Path) -> None:
    arguments = ["-o", str(tmp_path), "--image", "frr=my/frr:10", "--image-prefix", "mirror.example/"]
    CliRunner().invoke(render_command, arguments, catch_exceptions=False)
    groups = yaml.safe_load((tmp_path / "lab.clab.yml").read_text())["topology"]["groups"]
    assert (groups["router"]["image"], groups["node"]["image"]) == ("my/frr:10", "testbed-node:latest")


@pytest.mark.parametrize(
    ("prefix", "given", "fault"),
    [
        ("https://mirror", {}, "cannot stand before an image"),
        ("mirror example/", {}, "cannot stand before an image"),
        ("-x/", {}, "cannot stand before an image"),
        ("", {"frrr": "a"}, "no image is for 'frrr'"),
        ("", {"frr": "a b"}, "is no name of an image"),
        ("", {"frr": "a\n; rm"}, "is no name of an image"),
        ("", {"frr": "a@sha256:12"}, "is no name of an image"),
    ],
)
def test_what_no_engine_would_take_is_refused(prefix: str, given: dict[str, str], fault: str) -> None:
    with pytest.raises(InputError) as caught:
        references(prefix, given)
    assert fault in json.dumps([found.what for found in caught.value.faults])


def test_dual_stack_is_rendered_with_ipv6_on_the_fabric(tmp_path: Path) -> None:
    CliRunner().invoke(render_command, ["--backend", "dual_stack", "-o", str(tmp_path)], catch_exceptions=False)
    assert " dev eth0 nodad" in (tmp_path / "addresses/worker1.batch").read_text()
