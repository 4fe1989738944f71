"""The costs of Table V against closed forms, and the runner with a stand-in for train.py."""

import json
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

import dnl
import recipe
import synthetic
from data import open_dataset
from paper import complexity, noise, runs, tables
from paper.test_noise import checkpoint
from runtime import InputError, import_factory

META = torch.device("meta")  # counts, without arithmetic

STAND_IN = """
import json, os, sys, time
from pathlib import Path
here, value = Path(__file__).parent, lambda flag: sys.argv[sys.argv.index(flag) + 1]
out, epochs, log = Path(value("--out")), int(value("--epochs")), Path(value("--out")) / "log.jsonl"
with open(out / "starts", "a") as f:
    f.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\\n")
if (here / "broken").exists() and out.name.startswith((here / "broken").read_text()):
    sys.exit("no such luck")
lines = [json.dumps({"settings": {"epochs": epochs}})]
if log.exists():
    lines = log.read_text().splitlines()
for epoch in range(len(lines), epochs + 1):
    time.sleep(float((here / "pace").read_text()))
    with open(out / "epochs", "a") as f:
        f.write(f"{epoch}\\n")
    miou = (int(value("--seed")) + 5) / 10 + (epoch == 1) / 20
    lines.append(json.dumps({"epoch": epoch, "miou": miou}))
    (out / "part").write_text("\\n".join(lines))
    os.replace(out / "part", log)
"""


@pytest.fixture
def script(tmp_path):
    """A train.py that takes no time: mIoU (5 + seed) / 10, 0.05 more after the first epoch."""
    (tmp_path / "pace").write_text("0")
    (tmp_path / "train.py").write_text(STAND_IN)
    return tmp_path / "train.py"


def run(script, *, table="ablation", seeds=(0,), jobs=2, epochs=2):
    return tables.run_table(
        table, script.parent / "out", seeds, jobs, ["--epochs", str(epochs)], script
    )


def lines(path):
    return path.read_text().split() if path.exists() else []


def made_up(folder, name, seed, mious, epochs=2, **settings):
    """A cell whose log holds these scores."""
    usual = {"data": "folder", "backbone": "resnet50", "preset": "paper", "epochs": epochs}
    settings = usual | {"crop": 64, "batch": 4} | settings
    cell = runs.Cell(name, seed, folder / f"{name}-seed{seed}", (), settings)
    cell.out.mkdir()
    log = [{"settings": cell.settings}, *({"epoch": i, "miou": m} for i, m in enumerate(mious, 1))]
    (cell.out / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    return cell


# ---- Table V


def test_costs_are_those_of_the_formulas():
    """2 a multiply-add, from the shapes alone: C = 512, C' = 64, N = 48 * 48, n = 19."""
    C, K, N, n, side = 512, 64, 48 * 48, 19, 48
    projections, ours = 2 * (2 * N * C * K + N * C * C), 2 * N * N * (K + C)
    crossed = projections + 2 * N * 2 * side * (K + C)
    given = projections + ours + 2 * N * N * n  # P^T P
    s_l = 2 * N * 9 * K  # counted or not: it may be a matrix product or element-wise
    expected = {
        "NL": (projections + ours, 328_321, 7.63),
        "CCNet, R = 1": (crossed, 328_321, 1.76),
        "CCNet, R = 2": (2 * crossed, 328_321, 3.53),
        "DANet": (projections + ours + 4 * N * C * C, 328_322, 10.04),
        "DRANet*": (None, 1_463_106, 0.73),
        "Denoised NL, map route, P given": (given, 327_681, 7.83),
        "Denoised NL, value route, P given": (given, 327_681, 7.83),
        "Denoised NL, value route, own P": (given + 2 * N * C * n, 327_681 + C * n + n, 7.87),
        "OCNet": (None, 920_576, 9.66),
        "PPM": (None, 4_982_784, 21.75),
        "ASPP": (None, 4_460_032, 19.93),
    }
    assert [block.name for block in complexity.BLOCKS] == list(expected)
    for block in complexity.BLOCKS:
        flops, parameters, rounded = expected[block.name]
        gflops, got = complexity.count_costs(block)
        assert (got, round(gflops, 2)) == (parameters, rounded), block.name
        more = (0, s_l) if block.name.startswith("Denoised") else (0,)
        assert flops is None or gflops * 1e9 - flops in more, block.name


def test_map_route_is_the_same_block():
    torch.manual_seed(0)
    block, maps = dnl.DenoisedNonLocal(16, 5).double(), complexity.MapRoute(16, 5).double()
    maps.load_state_dict({k: torch.randn_like(v) for k, v in block.state_dict().items()})
    block.load_state_dict(maps.state_dict())
    x, p = torch.randn(2, 16, 4, 7).double(), torch.randn(2, 5, 4, 7).double()
    torch.testing.assert_close(maps(x), block(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(maps(x, p), block(x, p), rtol=1e-10, atol=1e-10)


def test_complexity_prints_each_block_beside_the_paper(monkeypatch, capsys):
    monkeypatch.setattr(complexity, "SIDE", 6)
    few = [b for b in complexity.BLOCKS if b.given or b.name in ("NL", "DANet", "OCNet")]
    monkeypatch.setattr(complexity, "BLOCKS", few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tables.main(["complexity", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    rows = {r["method"]: r for r in json.loads(last)["rows"]}
    N = 6 * 6  # NL's peak: q, k, v, A V and gamma A V; then the sum, A V being gone
    assert rows["NL"]["memory"] * 2**20 == 4 * N * (64 + 64 + 3 * 512)
    assert all(r["time"] > 0 and r["memory"] > 0 for r in rows.values())
    assert sum(line.startswith("|") for line in text) == 2 + len(few)
    assert "eval mode without gradient, fp32, CPU" in text[-1] and "MiB" in text[-1]


# ---- tables


def test_mean_and_sample_deviation(tmp_path):
    cells = [made_up(tmp_path, "none", s, [0.9, m]) for s, m in enumerate((0.5, 0.6, 0.7))]
    cells.append(made_up(tmp_path, "dnl", 0, [0.1, 0.25]))
    cells.append(made_up(tmp_path, "dnl", 1, [0.8]))  # unfinished
    row = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in tables.score_table(cells).splitlines()
        if line.startswith("|")
    }
    assert row["Method"] == ["runs", "mIoU, %", "deviation", "best epoch", "paper R-50"]
    assert row["Baseline"] == ["3", "60.00", "10.00", "90.00", "76.7"]
    assert row["Denoised NL"] == ["1", "25.00", "", "25.00", "82.0"]


@pytest.mark.parametrize(
    "backbone, head, figure",
    [
        ("resnet101", "paper R-101 |", "83.5 |"),
        ("resnet18", "paper R-50 / R-101 |", "82.0 / 83.5 |"),
    ],
)
def test_papers_figure_is_that_of_the_backbone(tmp_path, backbone, head, figure):
    cell = made_up(tmp_path, "dnl", 0, [0.1, 0.2], backbone=backbone)
    text = tables.score_table([cell]).splitlines()
    assert text[0].endswith(" " + head) and text[2].endswith(" " + figure) and backbone in text[4]


def test_rows_are_the_networks_they_name():
    flags = ["--backbone", "resnet18", "--channels", "32", "--preset", "released"]
    contexts, configs = {}, {}
    for cell in [
        c for table in tables.TABLES for c in tables.cells_of(table, Path("out"), [3], flags)
    ]:
        args = recipe.parse_training(cell.argv, 1)
        assert (args.seed, args.preset, args.out) == (3, "released", cell.out)
        with META:
            config = recipe.configuration(args, 19)
            contexts[cell.name] = dnl.build(config, import_factory(config.context)).context
            configs[cell.name] = config
    readings = ("dnl-supervised", "dnl-res3-logits", "dnl-res3")
    assert [configs[name].p_from for name in readings] == ["feature", "res3_logits", "res3"]
    assert [configs[name].p_supervised for name in readings] == [True, False, False]
    switches = {
        name: (contexts[name].gr, contexts[name].kernel) for name in ("nl", "gr", "lr", "dnl")
    }
    assert switches == {"nl": (False, 0), "gr": (True, 0), "lr": (False, 3), "dnl": (True, 3)}
    assert isinstance(contexts["none"], torch.nn.Identity)
    assert {
        type(contexts[n]).__name__ for n in ("ppm", "aspp", "ocnet", "ccnet", "danet", "dranet")
    } == {"PyramidPooling", "AtrousPyramid", "ObjectContext", "CrissCross", "Dual"}
    assert hasattr(contexts["danet"].position, "query") and hasattr(
        contexts["dranet"].position, "encoders"
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["ablation", "--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["ablation", "--seeds", *map(str, range(21))], "--seeds: got 21, expected at most 20"),
        (["ablation", "--", "--seed", "4"], "--seed among train.py's flags"),
        (["ablation", "--no-gr"], "--no-gr among train.py's flags"),
        (["ablation", "--coarse-weight", "1"], "--coarse-weight among train.py's flags"),
        (["compare", "--context", "nl"], "--context among train.py's flags"),
        (["compare", "--epoch5", "nl"], "unrecognized arguments: --epoch5 nl"),
        (["complexity", "--seeds", "4"], "--seeds: not a flag of complexity"),
    ],
)
def test_wrong_flags_are_named_before_anything_runs(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        tables.main(argv)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "gains, p",
    [
        ([1, 2, 3], 2 / 8),  # only all plus and all minus are as far
        ([1, 1, -1, 1], 10 / 16),  # a sum of 2 or 4, of either sign
        ([0, 0], 1),
        ([0.1] * 10, 2 / 1024),
    ],
)
def test_the_paired_test_counts_signs(gains, p):
    assert tables.sign_flip_p(gains) == p
    sums = [
        sum(s * g for s, g in zip(signs, gains)) for signs in product((1, -1), repeat=len(gains))
    ]
    assert p == sum(abs(s) >= abs(sum(gains)) - 1e-9 for s in sums) / len(sums)


def test_runs_of_one_seed_are_compared(tmp_path):
    cells = [made_up(tmp_path, "nl", s, [0.1, m]) for s, m in enumerate((0.5, 0.6, 0.7))]
    cells += [made_up(tmp_path, "dnl", s, [0.1, m]) for s, m in ((0, 0.52), (2, 0.71))]
    line = tables.paired_table(cells, [("dnl", "nl")]).splitlines()[2]
    expected = ["Denoised NL - NL", "2", "+1.50", "+1.00 to +2.00", "0.500"]
    assert [c.strip() for c in line.split("|")[1:-1]] == expected


def test_the_attention_of_finished_runs_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.SIZES, "val", 1)
    cells = [
        made_up(tmp_path, n, 0, [0.1, 0.2], context=c) for n, c in (("dnl", "dnl"), ("nl", "nl"))
    ]
    cells.append(made_up(tmp_path, "none", 0, [0.1, 0.2], context="none"))
    cells.append(made_up(tmp_path, "dnl", 1, [0.1], context="dnl"))  # unfinished
    for cell in cells:
        checkpoint(cell.out / "last.pt", context=cell.settings["context"])
    flags = ["--device", "cpu"]
    tables.measure_attention(cells, flags)
    measured = [tables.attention_means(cell) is not None for cell in cells]
    assert measured == [True, True, False, False]
    dataset = open_dataset("synthetic", None, "val")
    net = checkpoint(tmp_path / "c.pt")
    own = noise.measure(net, dataset, queries=16, seed=0, device=torch.device("cpu"))
    expected = [f"{x:.3f}" for x in own.means.nanmean(1).tolist()]
    shown = [line.split("|")[1:-1] for line in tables.attention_table(cells).splitlines()]
    assert [c.strip() for c in shown[2]] == ["Denoised NL", "1", *expected]
    assert [c.strip() for c in shown[3]][-3:] == ["", "", ""]  # no gate
    monkeypatch.setattr(tables, "measure", None)
    tables.measure_attention(cells, flags)


@pytest.mark.parametrize("content", ["", "[1]", '{"inter A": 0.5}', '{"of": null}'])
def test_another_attention_json_is_measured_again(tmp_path, monkeypatch, content):
    monkeypatch.setitem(synthetic.SIZES, "val", 1)
    cell = made_up(tmp_path, "dnl", 0, [0.1, 0.2], context="dnl")
    checkpoint(cell.out / "last.pt")
    (cell.out / "attention.json").write_text(content)
    assert tables.attention_means(cell) is None
    tables.measure_attention([cell], [])
    assert tables.attention_means(cell).keys() == {*noise.MEASURES}
    cell = made_up(tmp_path / "dnl-seed0", "dnl", 0, [0.1, 0.2, 0.3], epochs=3, context="dnl")
    (tmp_path / "dnl-seed0" / "attention.json").rename(cell.out / "attention.json")
    assert tables.attention_means(cell) is None  # trained on since


def test_a_checkpoint_that_cannot_be_measured_is_a_warning(tmp_path, capsys):
    cell = made_up(tmp_path, "dnl", 0, [0.1, 0.2], context="dnl")
    (cell.out / "last.pt").write_bytes(b"PK")
    tables.measure_attention([cell], [])
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "not measured: " in told and "last.pt" in told


# ---- the runner


def test_runs_every_cell_and_writes_the_results(script, capsys):
    assert run(script, seeds=(0, 2), epochs=3) == 0
    out = script.parent / "out"
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    names = tables.TABLES["ablation"]
    assert [(r["method"], r["seed"]) for r in results] == [
        (name, seed) for seed in (0, 2) for name in names
    ]
    assert all(
        r["miou"] == (5 + r["seed"]) / 10 and r["best"] == pytest.approx(r["miou"] + 0.05)
        for r in results
    )
    table = (out / "table.md").read_text()
    assert table.count(" 60.00 |     14.14 |      65.00 |") == len(names)
    assert f"python -m paper.tables ablation --out {out} --seeds 0 2 -- --epochs 3" in table
    printed = capsys.readouterr().out
    assert "epoch 48/48 of all runs, left 0:00:00" in printed and table in printed


def test_finished_runs_are_not_repeated(script):
    assert run(script) == run(script, seeds=(0, 1)) == 0
    for folder in (script.parent / "out").glob("*-seed*"):
        assert len(lines(folder / "starts")) == 1 and lines(folder / "epochs") == ["1", "2"]


def test_a_failed_run_is_shown_and_the_others_go_on(script, capsys):
    (script.parent / "broken").write_text("gr-")
    assert run(script) == 1
    shown = capsys.readouterr().err
    assert "gr-seed0: failed, exit status 1" in shown and "no such luck" in shown
    assert len((script.parent / "out" / "results.jsonl").read_text().splitlines()) == 7
    (script.parent / "broken").unlink()
    assert run(script) == 0
    starts = {f"{name}-seed0": 1 for name in tables.TABLES["ablation"]} | {"gr-seed0": 2}
    folders = (script.parent / "out").glob("*-seed*")
    assert {f.name: len(lines(f / "starts")) for f in folders} == starts


def test_a_run_without_a_score_has_failed(script, capsys):
    script.write_text("print('nothing done')")
    assert run(script) == 1
    assert capsys.readouterr().err.count("failed, exit status 0") == len(tables.TABLES["ablation"])


def test_finished_runs_of_other_settings_are_refused(script):
    run(script, epochs=2)
    with pytest.raises(
        InputError, match=r"none-seed0: finished with other settings .epochs 2 -> 3.: repeat"
    ):
        run(script, epochs=3)


def test_finished_runs_on_another_data_set_are_refused(tmp_path, monkeypatch):
    made_up(
        tmp_path,
        "none",
        0,
        [0.1, 0.2],
        data="synthetic",
        images=512,
        classes=["a", "b"],
        class_weights=None,
    )
    first = tables.cells_of(
        "ablation",
        tmp_path,
        [0],
        ["--epochs", "2", "--backbone", "resnet50", "--crop", "64", "--batch", "4"],
    )[0]
    with pytest.raises(
        InputError, match=r"finished with other settings \(classes .'a', 'b'. -> .'sky'"
    ):
        first.result()


def test_class_weights_are_compared_by_value(tmp_path):
    (tmp_path / "w.json").write_text(
        json.dumps({"classes": synthetic.CLASSES, "splits": {"train": {"weights": [0.5] * 8}}})
    )
    flags = ["--epochs", "2", "--class-weights", str(tmp_path / "w.json")]
    first = tables.cells_of("ablation", tmp_path, [0], flags)[0]
    first.out.mkdir()
    log = [{"settings": first.settings}, {"epoch": 1, "miou": 0.1}, {"epoch": 2, "miou": 0.2}]
    (first.out / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    assert first.result()["miou"] == 0.2 and first.settings["class_weights"] == [0.5] * 8


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "{}",
        "[1]",
        "null",
        '{"settings": {"epochs": 2}}\n{"epoch": 1}',
        '{"settings": {}}',
        '{"settings": {"epochs": 2}}\n{"epoch": 2, "miou": "0.5"}',
        '{"settings": {"epochs": 2}}\n{"epoch": 2, "miou": NaN}',
    ],
)
def test_a_log_of_no_run_is_one_line(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"log\.jsonl: not the log of a run") as e:
        runs.Cell("dnl", 0, tmp_path, (), {}).result()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "visible, expected", [(None, {"0", "1"}), ("4,7", {"4", "7"}), ("5", {"5"})]
)
def test_gpus_in_turn(script, monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (script.parent / "pace").write_text("0.1")
    run(script, epochs=1)
    assert {gpu for f in (script.parent / "out").glob("*/starts") for gpu in lines(f)} == expected


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on(script, number):
    """Some cells are finished and others in the middle when the signal comes.

    No epoch is done twice after it.
    """
    out = script.parent / "out"
    (script.parent / "pace").write_text("0.3")
    code = (
        "import sys; from pathlib import Path; from paper import tables; "
        f"tables.run_table.__defaults__ = (Path({str(script)!r}),); sys.exit(tables.main())"
    )
    flags = ("ablation", "--out", str(out), "--seeds", "0", "--jobs", "2", "--epochs", "3")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        cwd=Path(tables.__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,  # a shell's background job would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(lambda: len(lines(out / "results.jsonl")) and lines(out / "lr-seed0" / "epochs"))
        (script.parent / "pace").write_text("30")  # the epoch after the present one
        process.send_signal(number)
        assert "the same command goes on" in process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    with runs.locked(out):  # the children are gone too
        done = {f.parent.name: lines(f) for f in out.glob("*/epochs")}
        starts = {f.parent.name: len(lines(f)) for f in out.glob("*/starts")}
    finished = {name for name, epochs in done.items() if len(epochs) == 3}
    assert finished and set(done) - finished
    (script.parent / "pace").write_text("0")
    assert run(script, epochs=3) == 0
    for folder in out.glob("*-seed*"):
        assert len(lines(folder / "starts")) == starts.get(folder.name, 0) + (
            folder.name not in finished
        )
        assert lines(folder / "epochs") == ["1", "2", "3"]


def test_one_command_at_a_time_and_none_beside_a_run_left_behind(script, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "pace").write_text("60")
    (cell,) = tables.cells_of("ablation", out, [0], ["--epochs", "1"])[:1]
    with runs.locked(out) as lock:
        with pytest.raises(InputError, match="another command, or a run it left, works there"):
            run(script)
        child = runs.start(cell, 0, 1, script, lock)
    try:
        with pytest.raises(InputError, match="a run it left, works there"):
            run(script, epochs=1)
    finally:
        child.kill()
        child.wait()
    (tmp_path / "pace").write_text("0")
    assert run(script, epochs=1) == 0
