"""The table of modules at which a network may fork (`codistill list branch-points`)."""

from __future__ import annotations

from codistill.models import build, resolve
from codistill.peers.branch_points import branch_points, find_default_fork, library_source
from codistill.peers.branches import can_fork
from codistill.peers.inputs import dummy_input
from codistill.peers.split_head import split_head
from codistill.utils import InputError


def branch_point_rows(model: str, image_size: int | None = None) -> list[dict[str, str]]:
    """Return a table of the modules at which a network of 100 classes may fork, in the order in which they run.

    Each is tried as training does, so that none is offered that is refused afterwards.

    Args:
        model: Name of the network (see `codistill.models.resolve`).
        image_size: Height and width of the images; default the network's own, 224 for a library's, else 32.

    Raises:
        InputError: there is no such network, or it does not take the images.

    >>> [row["module"] for row in branch_point_rows("resnet8")][:6]
    ['bn1', 'layer1', 'layer1.0', 'layer2', 'layer2.0', 'layer3 (default)']
    """
    if image_size is not None and image_size < 8:
        raise InputError(f"--image-size is {image_size}; give 8 or more")
    factory = resolve(model)
    source = library_source(factory)
    size = image_size or (32 if source is None else source.native_size or 224)
    network = build(factory, num_classes=100, in_channels=3, image_size=image_size)
    example = dummy_input(network, 3, size)
    member = split_head(network, example)
    points = [p for p in branch_points(member.body, member.head_path, example) if can_fork(member, p.path, example)]
    default = find_default_fork(model, member, example)
    total = sum(p.numel() for p in member.parameters())
    head = sum(p.numel() for p in member.head.parameters())
    return [
        {
            "module": point.path + (" (default)" if point.path == default else ""),
            "entering": " x ".join(map(str, point.input_shape)),
            "in every branch": f"{100 * (point.branch_parameters + head) / total:.0f} %",
            "parameters per branch": f"{point.branch_parameters + head:,}",
        }
        for point in points
    ]
