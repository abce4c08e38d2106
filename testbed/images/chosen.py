"""Which images the machines of a lab of containers are of: as the run's options say, there, made or pulled."""

from __future__ import annotations

from docker.errors import ImageNotFound

from testbed.engine.find import ENGINE_ERRORS, Engine
from testbed.errors import LabError
from testbed.images import store
from testbed.images.names import references
from testbed.render import Images


def default_image(engine: Engine) -> str:
    """The image that suits an engine: programs of this host where containers can see them."""
    return "host" if engine.local else "full"


def images_of(engine: Engine, name: str, prefix: str = "") -> Images:
    """Have the images in the engine: `name` for all machines, with a mirror's `prefix` its FRR for leaves and spines.

    Raises LabError where the engine has one not and cannot get it, InputError for a prefix that is none.
    """
    node, binds = image_of(engine, name)
    if not prefix:
        return Images(frr=node, node=node, binds=binds)
    if not engine.local:
        what = "machines of a pulled image are wired from outside, and this engine's are out of reach"
        raise LabError(what, where="--image-prefix", hint="run as root where the engine runs")
    return Images(frr=_pulled(engine, references(prefix)["frr"]), node=node, binds=binds, pulled_routers=True)


def image_of(engine: Engine, name: str) -> tuple[str, tuple[str, ...]]:
    """What the engine calls an image, and what containers of it see of the host. Raises LabError where it has none."""
    if name in store.KINDS:
        kind = store.KINDS[name]
        if kind.binds and not engine.local:
            what = f"the image {name} needs this host's files, and the engine is elsewhere"
            raise LabError(what, hint="--image full")
        return store.ensure(engine.client, kind), kind.binds
    if not _has(engine, name):
        raise LabError(
            f"the engine has no image {name}",
            hint=f"`docker pull` or `testbed images import` it, or --image {' or '.join(store.KINDS)}, made here",
        )
    return name, ()


def _pulled(engine: Engine, reference: str) -> str:
    if not _has(engine, reference):
        if engine.private:
            hint = "an engine of the machine's own, or `testbed images import` it from a file by that name"
            raise LabError(f"the private engine has no way out, so it cannot pull {reference}", hint=hint)
        store.pull(engine.client, reference)
    return reference


def _has(engine: Engine, name: str) -> bool:
    try:
        engine.client.images.get(name)
    except ImageNotFound:
        return False
    except ENGINE_ERRORS as error:
        raise LabError(f"the engine cannot say whether it has the image {name}: {store.said(error)}") from error
    return True
