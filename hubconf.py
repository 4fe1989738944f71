"""What torch.hub.load(FOLDER, NAME, ..., source="local") finds here: `network`, `trained`, and the block `DenoisedNonLocal`."""

from dataclasses import replace as _replace

import dnl

dependencies = ["torch", "numpy", "PIL"]


def network(
    num_classes: int = 19, preset: str = "paper", backbone: str = "resnet101", weights: str = "none"
) -> dnl.Network:
    """A whole network, in training mode: `dnl.Network` says what goes in and comes out.

    preset: paper or released. backbone: resnet18, resnet34, resnet50, resnet101. weights: of the backbone, none (all random),
    imagenet (torchvision's are downloaded), or a file. ValueError for any other name, and for a file that does not fit.
    """
    if preset not in dnl.PRESETS:
        raise ValueError(f"preset {preset!r}: expected paper or released")
    net = dnl.build(_replace(dnl.PRESETS[preset], num_classes=num_classes, backbone=backbone))
    if weights != "none":
        dnl.load_backbone(net.backbone, backbone, weights)
    return net


def trained(checkpoint: str, context: str | None = None) -> dnl.Network:
    """The network of a checkpoint of train.py, in eval mode on the CPU: images (B, 3, H, W), normalised -> logits (B, n, H, W).

    context: MODULE:FACTORY again, where training was given one. `data.InputError`, a ValueError, for a file that is none.
    """
    from checkpoint import (
        load_network,  # here, since it brings modules of common names: data, runtime
    )

    return load_network(checkpoint, "cpu", context)[0]
