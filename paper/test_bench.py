"""The benchmark's own arithmetic at tiny sizes. No time is asserted."""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dnl
from paper import bench, bench_loader, measure
from paper.bench_network import network, network_cases
from runtime import InputError

CPU = torch.device("cpu")
TINY = replace(dnl.PAPER, backbone="resnet18", channels=16, num_classes=5)


def test_peak_counts_what_was_alive_together():
    held = torch.zeros(10_000)  # before: not counted

    def run():
        first = torch.ones(1000)  # 4000 bytes
        second = torch.ones(3000)  # 16000 together
        del first, second
        return [held[:500] + torch.ones(500)]  # 4000 at most, 2000 remain

    assert measure.peak_memory(run, CPU) == (16_000, 2000)


def test_routes_agree_with_their_formulas():
    size = (3, 4)
    draw = torch.Generator().manual_seed(1)
    q, k, v, p = (torch.randn(1, c, 12, generator=draw, dtype=torch.double) for c in (2, 2, 5, 3))
    out = {name: route(q, k, v, p, size) for name, route in bench.ROUTES.items()}
    assert list(out) == ["value", "map", "nl", "sdpa"]
    value, whole, nl, sdpa = out.values()
    torch.testing.assert_close(value, whole)
    plain = torch.empty_like(v)
    for j in range(12):
        weights = np.exp([float(q[0, :, j] @ k[0, :, i]) for i in range(12)])
        plain[0, :, j] = v[0] @ torch.from_numpy(weights / weights.sum())
    for got in (nl, sdpa):
        torch.testing.assert_close(got, plain)
    assert not torch.allclose(nl, value)


def test_block_rows():
    rows = bench.block_rows(
        (12, 16), ("value", "map", "nl"), 1, CPU, torch.float32, channels=16, classes=3
    )
    assert [(r["pass"], r["route"]) for r in rows] == [
        (p, r) for p in ("forward", "forward+backward") for r in ("value", "map", "nl")
    ]
    out, gradients = 4 * 16 * 192, 4 * (2 + 2 + 16 + 3) * 192
    for row in rows:
        p = 3 if row["route"] != "nl" else 0
        results = out + (gradients - 4 * (3 - p) * 192) * (row["pass"] != "forward")
        assert row["peak"] - row["peak_over_outputs"] == results
    assert rows[1]["peak"] > 9 * 4 * 192**2  # the map route unfolds a whole map


def test_block_ratios():
    def row(n, route, seconds, layout="channels"):
        names = {"dtype": "float32", "layout": layout, "pass": "forward", "route": route}
        return {"n": n, "seconds": seconds} | names

    rows = [row(4, "value", 2.0), row(4, "map", 12.0), row(4, "nl", 4.0), row(16, "value", 90.0)]
    rows += [row(4, "value", 3.0, "pixels"), row(4, "map", 3.0, "pixels")]
    rows.append(row(4, "nl", 1.0, "pixels"))
    assert bench.block_ratios(rows) == {
        "float32 channels forward value/nl": 0.5,
        "float32 channels forward map/value": 6.0,
        "float32 pixels forward value/nl": 3.0,
        "float32 pixels forward map/value": 1.0,
    }


def test_layouts_hold_the_same_numbers():
    drawn = [bench.draw_inputs(12, 16, 3, CPU, torch.float32, layout) for layout in bench.LAYOUTS]
    for a, b in zip(drawn[0][0], drawn[1][0], strict=True):
        assert torch.equal(a, b) and a.shape[2] == 12
        assert a.stride(1) == 1 and b.stride(2) == 1  # what is innermost


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the time used")
def test_another_process_spins_meanwhile():
    """It takes processor time, and ends with its parent, however that ends."""
    parent = f"import subprocess, sys\nc = subprocess.Popen([sys.executable, '-c', {bench.SPIN!r}])"
    parent += "\nprint(c.pid, flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        stat = Path("/proc", process.stdout.readline().strip(), "stat")
        before = stat.read_text().split()[13]
        time.sleep(0.5)
        assert int(stat.read_text().split()[13]) > int(before)
        process.kill()
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("it lives on")
    with bench.spinning() as child:
        assert child.poll() is None
    assert child.poll() is not None


def test_network_report():
    report = network(TINY, (32, 32), 2, "bf16", 1, CPU)
    rows = {(r["what"], r["variant"]): r for r in report["rows"]}
    assert set(rows) == {(w, v) for w in ("training", "inference") for v in ("asked", "plain")}
    asked, plain = rows["training", "asked"], rows["training", "plain"]
    assert (asked["amp"], asked["channels_last"]) == ("bf16", True)
    assert (plain["amp"], plain["channels_last"]) == ("off", False)
    assert asked["flops"] == plain["flops"] > 2 * rows["inference", "plain"]["flops"] > 0
    assert report["ratios"]["training asked/plain"] == pytest.approx(
        asked["seconds"] / plain["seconds"]
    )
    assert asked["share"] == pytest.approx(
        asked["flops_per_second"] / asked["matrix_flops_per_second"]
    )
    net = dnl.build(TINY)
    held = 8 * sum(p.numel() for p in net.parameters()) + sum(b.nbytes for b in net.buffers())
    assert plain["held"] == held


def test_a_training_step_trains():
    torch.manual_seed(0)
    net = dnl.build(TINY)
    before = copy.deepcopy(net.state_dict())
    cases, _ = network_cases(net, 5, (32, 32), 2, "off", False, CPU)
    assert cases["inference"]()[0].shape == (2, 5, 32, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    cases["training"]()
    assert not torch.equal(net.head[0].weight, before["head.0.weight"])


class Rival(torch.nn.Conv2d):
    """A network with the call and the outputs of torchvision's."""

    def __init__(self, num_classes, weights, weights_backbone, aux_loss):
        assert weights is None and weights_backbone is None
        super().__init__(3, num_classes, 1)

    def forward(self, image):
        logits = super().forward(image)
        return {"out": logits, "aux": logits} if self.training else {"out": logits}


def test_torchvisions_networks_have_rows_where_it_is_installed(monkeypatch):
    stand_in = SimpleNamespace(fcn_resnet18=Rival, deeplabv3_resnet18=Rival)
    monkeypatch.setitem(sys.modules, "torchvision.models.segmentation", stand_in)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for batch, names in ((2, ("fcn", "deeplabv3")), (1, ("fcn",))):  # DeepLabV3 needs two images
        rows = network(TINY, (32, 32), batch, "off", 0, CPU)["rows"]
        cases = [(r["what"], r["variant"]) for r in rows[4:]]
        assert cases == [(what, name) for name in names for what in ("training", "inference")]
        assert rows[-1]["flops"] == 2 * batch * 32 * 32 * 3 * 5
    stand_in.__dict__.clear()  # neither network has this backbone
    assert len(network(TINY, (32, 32), 2, "off", 0, CPU)["rows"]) == 4


def test_loader_routes_make_the_same_sample(tmp_path):
    assert bench_loader.make_tree(tmp_path, 3, (64, 128)) > 0
    dataset = data.open_dataset("cityscapes", tmp_path, "train")
    for i in range(3):
        # the scaled image is smaller than the crop in some, larger in others
        image, label = bench_loader.resize_all(dataset, i, 80)
        want, ids, _ = data.sample(dataset, 0, 0, i, 80)
        assert image.shape == (3, 80, 80) and (label == ids.numpy()).mean() > 0.98
        assert np.abs(image.astype(int) - want.numpy()).max() <= 2


def test_loader_report():
    report = bench_loader.loader(2, 32, 1, (64, 128))
    rates = {r["route"]: r["images_per_second"] for r in report["rows"]}
    assert list(rates) == ["resize_all", "crop_first", "cached"]
    assert report["ratios"]["cached/crop_first"] == pytest.approx(
        rates["cached"] / rates["crop_first"]
    )


def test_markdown():
    assert measure.markdown(["a", "b"], [["x", 1], ["long", 22.5]]) == (
        "| a    |    b |\n|------|-----:|\n| x    |    1 |\n| long | 22.5 |"
    )


def test_table_is_in_the_units_of_its_head():
    table = bench.bench_table([{"route": "nl", "seconds": 0.25, "peak": 3 * 2**20}])
    head, _, line = table.replace("|", "").splitlines()
    assert head.split() == ["route", "ms", "peak", "MiB"]
    assert line.split() == ["nl", "250.00", "3.00"]


def test_json_is_the_last_line(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZE", (4, 4))
    monkeypatch.setattr(bench, "LARGE", ((4, 8),))
    assert bench.main(["block", "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {r["n"] for r in report["rows"]} == {16, 32}
    assert set(report) == {"machine", "memory", "rows", "ratios", "busy"}
    assert set(report["machine"]) == {"cpu", "cores", "threads", "torch", "device"}


@pytest.mark.parametrize(
    "argv", [["loader", "--runs", "0"], ["network", "--size", "0", "64"], ["nothing"]]
)
def test_wrong_arguments_are_one_line(argv):
    with pytest.raises(InputError) as e:
        bench.parse_bench(argv)
    assert "\n" not in str(e.value)
