"""What torch.hub.load(FOLDER, NAME, ..., source="local") finds in this folder."""

from dataclasses import replace as _replace

import dnl
from dnl import DenoisedNonLocal as DenoisedNonLocal  # a name for torch.hub, too

dependencies = ["torch", "numpy", "PIL"]


def network(
    num_classes: int = 19,
    preset: str = "paper",
    backbone: str = "resnet101",
    weights: str = "none",
    channels: int = 512,
) -> dnl.Network:
    """A whole network, in training mode: `dnl.Network` says what goes in and comes out.
    preset: paper or released. backbone: resnet18, resnet34, resnet50, resnet101. weights, of the
    backbone: none (random), imagenet (downloaded), a file. channels: of F. ValueError if wrong."""
    if preset not in dnl.PRESETS:
        raise ValueError(f"preset {preset!r}: expected paper or released")
    config = _replace(dnl.PRESETS[preset], num_classes=num_classes, backbone=backbone)
    net = dnl.build(_replace(config, channels=channels))
    if weights != "none":
        dnl.load_backbone(net.backbone, backbone, weights)
    return net


def trained(checkpoint: str, context: str | None = None) -> dnl.Network:
    """A network trained by train.py, in eval mode on the CPU: images -> logits, as `dnl.Network`.
    context: MODULE:FACTORY, if training had one. InputError, a ValueError, for other files."""
    from checkpoint import load_network  # here: it imports modules of common names, as data

    return load_network(checkpoint, "cpu", context)[0]
