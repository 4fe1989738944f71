"""The folded network against the network itself, in double precision, and what is left alone."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

import dnl
import evaluate
import predict
from fold import fold_batchnorm


def trained(config):
    """A network whose statistics are not those of a fresh one."""
    torch.manual_seed(0)
    net = dnl.build(config).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    nn.init.ones_(net.context.gamma)
    return net


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_outputs_are_the_networks(preset, backbone):
    net = trained(replace(dnl.PRESETS[preset], backbone=backbone, channels=16)).train()
    before = copy.deepcopy(net.state_dict())
    folded = fold_batchnorm(net)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert net.training and net.backbone.bn1.training and not folded.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    image = torch.randn(1, 3, 65, 97).double()
    with torch.no_grad():
        expected, got = net.eval()(image), folded(image)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_statistics_of_several_ranks_are_folded_too():
    net = trained(replace(dnl.PAPER, backbone="resnet18", channels=16))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    folded = fold_batchnorm(synced)
    assert not [m for m in folded.modules() if isinstance(m, nn.SyncBatchNorm)]
    image = torch.randn(1, 3, 33, 49).double()
    with torch.no_grad():
        assert torch.equal(folded(image), fold_batchnorm(net)(image))


@pytest.mark.parametrize("script", [evaluate, predict])
def test_scoring_and_prediction_use_the_folded_network(script, monkeypatch, tmp_path, run_folder):
    def spy(net):
        raise RuntimeError("folded")

    monkeypatch.setattr(script, "fold_batchnorm", spy)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    argv = [str(run_folder / "best.pt"), "--workers", "0"]
    if script is predict:
        argv += [str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    with pytest.raises(RuntimeError, match="folded"):
        script.main(argv)


def test_a_context_of_ones_own_is_left_alone():
    factory = lambda channels, classes: dnl.conv_bn_relu(channels, channels)  # noqa: E731
    net = dnl.build(
        replace(dnl.PAPER, backbone="resnet18", channels=16, context="mine:it"), factory
    )
    assert fold_batchnorm(net).context is net.context


def test_a_context_that_cannot_be_copied_is_shared():
    net = dnl.build(replace(dnl.PAPER, backbone="resnet18", channels=16))
    net.context.map = torch.ones(1, requires_grad=True) * 2  # no leaf of the graph
    assert fold_batchnorm(net).context is net.context


def test_what_is_no_batchnorm_with_statistics_stays():
    net = trained(replace(dnl.PAPER, backbone="resnet18", channels=16))
    net.backbone.layer1[0].bn1 = nn.GroupNorm(4, 64).double()
    net.backbone.layer1[0].bn2 = nn.BatchNorm2d(64, track_running_stats=False).double()
    net.reduce[0] = nn.utils.parametrizations.weight_norm(net.reduce[0])
    image = torch.randn(1, 3, 33, 49).double()
    with torch.no_grad():
        folded = fold_batchnorm(fold_batchnorm(net))
        torch.testing.assert_close(folded(image), net.eval()(image), rtol=1e-9, atol=1e-9)


def test_another_network_is_itself():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert fold_batchnorm(net) is net and not net.training
