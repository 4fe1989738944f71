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
    """A copy in eval mode with the same outputs, but for rounding. Hooks on a BatchNorm are lost.

    The context is shared and not folded, because it may be anybody's; it is in eval mode then too.
    A network of another class is returned itself, in eval mode.
    """
    if not isinstance(net, dnl.Network):
        return net.eval()
    net = copy.deepcopy(net, {id(net.context): net.context}).eval()
    for name, part in net.named_children():
        if name == "context":
            continue
        for module in part.modules():
            for (owner, conv), (other, norm) in pairs(module):
                first, second = getattr(owner, conv), getattr(other, norm)
                batchnorm = isinstance(second, _BatchNorm) and second.running_mean is not None
                if type(first) is nn.Conv2d and batchnorm:
                    setattr(owner, conv, fuse_conv_bn_eval(first, second))
                    setattr(other, norm, nn.Identity())
    return net


def pairs(module: nn.Module) -> Iterator[tuple[Place, Place]]:
    """Where a module of dnl.py may run a convolution and then its BatchNorm."""
    names = [name for name, _ in module.named_children()]
    if isinstance(module, nn.Sequential):
        for conv, norm in pairwise(names):
            yield (module, conv), (module, norm)
    elif isinstance(module, dnl.ResNet | dnl.Block):
        for name in names:
            if not name.startswith("conv"):
                continue
            place: Place = module, name
            conv1 = getattr(module, name)
            if isinstance(conv1, nn.Sequential):  # the deep stem
                place = conv1, str(len(conv1) - 1)
            yield place, (module, name.replace("conv", "bn"))
