"""BatchNorm folded into the convolution before it: the same network, faster, for prediction."""

import copy
from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dnl

Place = tuple[nn.Module, str]  # a module and the name of one of its children


def fold_batchnorm(net: nn.Module) -> nn.Module:
    """A copy in eval mode with the same outputs, but for rounding.

    The context stays as it is, because it may be anybody's. A network of another class is returned
    itself, in eval mode.
    """
    if not isinstance(net, dnl.Network):
        return net.eval()
    net = copy.deepcopy(net).eval()
    for name, part in net.named_children():
        if name == "context":
            continue
        for module in part.modules():
            for (owner, conv), (other, norm) in conv_norm_pairs(module):
                fused = fuse_conv_bn_eval(getattr(owner, conv), getattr(other, norm))
                setattr(owner, conv, fused)
                setattr(other, norm, nn.Identity())
    return net


def conv_norm_pairs(module: nn.Module) -> Iterator[tuple[Place, Place]]:
    """Where a module of dnl.py runs a convolution and then its BatchNorm."""
    if isinstance(module, nn.Sequential):
        for (conv, first), (norm, second) in pairwise(module.named_children()):
            if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
                yield (module, conv), (module, norm)
    elif isinstance(module, dnl.ResNet | dnl.Block):
        for name, child in module.named_children():
            if not name.startswith("conv"):
                continue
            place: Place = module, name
            if isinstance(child, nn.Sequential):  # the deep stem
                place = child, str(len(child) - 1)
            yield place, (module, name.replace("conv", "bn"))
