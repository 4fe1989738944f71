"""page.py: the attention page, read and used in a browser (Debian's chromium, chromium-driver)."""

import json
import re
import shutil
import subprocess
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, blocks, files, make_checkpoint, predicted, status_of
from PIL import Image

import attention
import dnl
import page
import predict
from classes import palette
from evaluate import predict_ids
from paper import noise
from pictures import HEAT

# ---- the browser

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync"""


class Browser:
    """A headless browser, driven by the WebDriver protocol over plain HTTP."""

    def __init__(self, url, profile):
        self.url = url
        options = {"args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self.post("", capabilities={"alwaysMatch": wanted})["sessionId"]
        self.url = f"{url}/{session}"

    def post(self, path, method="POST", **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path, address=""):
        self.logged()
        self.post("/url", url="about:blank")  # else a new address alone would not load the page
        self.post("/url", url=path.as_uri() + address)

    def run(self, script):
        """What a script returns in the page."""
        return self.post("/execute/sync", script=script, args=[])

    def text(self, name):
        """The text of an element, after the next frame."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        self.post("/execute/async", script=frames, args=[])
        return self.run(f"return document.getElementById('{name}').textContent")

    def act(self, kind, *actions):
        """Real input: of a "mouse", a "touch" or a "key"."""
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        if kind == "key":
            source = {"type": "key", "id": kind}
        actions = [{"type": name} | values for name, values in actions]
        self.post("/actions", actions=[source | {"actions": actions}])

    def emulate(self, width, scheme):
        """Show pages at this width, in this colour scheme ("light" or "dark")."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        feature = {"name": "prefers-color-scheme", "value": scheme}
        cdp = "/goog/cdp/execute"
        self.post(cdp, cmd="Emulation.setDeviceMetricsOverride", params=size)
        self.post(cdp, cmd="Emulation.setEmulatedMedia", params={"features": [feature]})

    def logged(self):
        """(messages, addresses of requests but data:) since the last call."""
        messages = [entry["message"] for entry in self.post("/se/log", type="browser")]
        events = self.post("/se/log", type="performance")
        events = [json.loads(event["message"])["message"] for event in events]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [event["request"]["url"] for event in sent]
        return messages, [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        for line in driver.stdout:
            started = re.search(r"started successfully on port (\d+)", line)
            if started:
                break
        profile = tmp_path_factory.mktemp("profile")
        browser = Browser(f"http://127.0.0.1:{started[1]}/session", profile)
        yield browser
        browser.post("", method="DELETE")
    finally:
        driver.kill()
        driver.communicate()


# ---- pages

CLASSES = ["road", "car", "</script><img src=x onerror=alert(1)>", "tree", "sky"]
H, W = 97, 145


def network(preset="paper", sharpness=1.0, **options):
    """A small network of random weights. sharpness: factor of the logits Q.K."""
    torch.manual_seed(1)
    config = replace(dnl.PRESETS[preset], num_classes=5, backbone="resnet18", channels=32)
    net = dnl.build(replace(config, **options)).eval()
    with torch.no_grad():
        net.context.query.weight.mul_(sharpness)
    return net


def write_page(net, path, label=None, image=None):
    """The page of an image, and what `denoised_maps` takes of it."""
    image = blocks(H, W) if image is None else image
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    with torch.inference_mode():
        *inputs, size = attention.attention_inputs(net, tensor)
    ids, confidence = predict_ids(net, tensor, "", device=CPU)
    facts = {"data": "folder", "classes": CLASSES, "colors": palette(5)}
    html = page.attention_html(net, image, ids, confidence, facts, "a <b>.jpg", label)
    path.write_text(html, encoding="utf-8")
    return *inputs, size, ids, confidence


def data_of(path):
    return json.loads(re.search('id="data">(.*?)</script>', path.read_text())[1])


def at_positions(label, size):
    return noise.labels_at(torch.from_numpy(label), size).long()


TITLES = "return [...document.querySelectorAll('#maps h2')].map((title) => title.textContent)"
INTRUDER = """
window.blocked = [];
addEventListener("securitypolicyviolation", (event) => blocked.push(event.blockedURI));
document.body.innerHTML += "<img src=http://127.0.0.1:9/x.png onerror=alert(1)>";
const script = document.body.appendChild(document.createElement("script"));
script.append("window.ran = 1");
"""
COLORS = """
const ground = (e) => {
  const color = getComputedStyle(e).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" && e.parentElement ? ground(e.parentElement) : color;
};
const withText = [...document.querySelectorAll("body *")].filter((e) => e.getClientRects().length
  && [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()));
return withText.map((e) => [e.textContent, getComputedStyle(e).color, ground(e)]);
"""


def luminance(color):
    """The relative luminance of a CSS colour rgb(...), as WCAG defines it."""
    c = np.array([int(x) for x in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


# ---- what it shows


@pytest.mark.parametrize(
    "preset, sharpness", [("paper", 1), ("released", 1), ("paper", 3e4), ("released", 1e5)]
)
def test_the_page_computes_the_maps_the_bars_and_the_noise(browser, tmp_path, preset, sharpness):
    label = np.random.default_rng(3).integers(0, 5, (11, 17), np.uint8)
    label = label.repeat(9, 0).repeat(9, 1)[:H, :W]
    label[:20, :50] = 255
    Image.fromarray(label).save(tmp_path / "label.png")
    net = network(preset, sharpness)
    q, k, p, size, ids, _ = write_page(net, tmp_path / "p.html", tmp_path / "label.png")
    assert sharpness == 1 or torch.bmm(q.transpose(1, 2), k).abs().max() > 1e4
    q, k, p = q.double(), k.double(), p.double()
    ids, label = at_positions(ids, size), at_positions(label, size)
    browser.open(tmp_path / "p.html")
    for name, x in (("Q", q), ("K", k), ("P", p)):
        held = torch.tensor(browser.run(f"return {name}"), dtype=torch.float64)
        assert (held - x.flatten()).abs().max() < 1e-6 * x.abs().max()
    for j in (11, 37, len(label) - 1):
        query = torch.tensor([j])
        maps = dnl.denoised_maps(q, k, p, size, net.context.kernel, query)
        expected = dict(zip(("A", "A'", "A''"), maps))
        expected["P_class"] = dnl.class_affinity(p, query)
        got = browser.run(f"show({j}); return mapsOf({j})")
        assert list(got) == list(expected)
        for name, row in expected.items():
            shown = torch.tensor(got[name], dtype=torch.float64)
            assert (shown - row[0, 0]).abs().max() <= 2e-3 * row.max()
        widths = "row.bars.map(([, bar]) => parseFloat(bar.style.width) / 100)"
        bars = dict(browser.run(f"return rows.map((row) => [row.id, {widths}])"))
        assert list(bars) == ids.unique().tolist()
        assert np.allclose(np.sum([*bars.values()], 0), 1, atol=1e-5)
        for i, row in enumerate(maps):
            for c, shares in bars.items():
                assert abs(shares[i] - row[0, 0, ids == c].sum() / row.sum()) < 1e-3
            measured = browser.run(f"return noiseOf(mapsOf({j})[attention[{i}]], {j})")
            known = label[j] != 255
            for shown, measure in zip(measured, (noise.inter_class, noise.intra_class)):
                value = measure(row[0], label, label[query])
                if known and value.isfinite():
                    assert abs(shown - value) < 1e-3
                else:
                    assert shown is None
    assert browser.logged() == ([], [(tmp_path / "p.html").as_uri()])


def test_without_a_label_noise_is_measured_against_the_predicted_classes(browser, tmp_path):
    net = network()
    q, k, p, size, ids, confidence = write_page(net, tmp_path / "p.html")
    browser.open(tmp_path / "p.html")
    label = at_positions(ids, size)
    rows = dnl.denoised_maps(q, k, p, size, 3, torch.tensor([30]))[2][0]
    shown = browser.run("""return noiseOf(mapsOf(30)["A''"], 30)""")
    assert abs(shown[0] - noise.inter_class(rows, label, label[[30]])) < 1e-3
    assert "the predicted classes, since no label was given" in browser.text("note")
    sure = at_positions(confidence, size)[30] / 255
    assert f"{CLASSES[label[30]]}, probability {100 * sure:.1f} %" in browser.run(
        "show(30); return byId('pixel').textContent"
    )


@pytest.mark.parametrize(
    "options, maps",
    [
        ({"context": "nl"}, ["A"]),
        ({"gr": False}, ["A", "A''"]),
        ({"lr": False}, ["A", "A'", "P_class"]),
        ({"kernel": 5}, ["A", "A'", "A''", "P_class"]),
    ],
)
@pytest.mark.parametrize("size", [(33, 50), (1, 70), (70, 1)])
def test_maps_that_are_missing_are_left_out_at_odd_sizes(browser, tmp_path, options, maps, size):
    net = network(**options)
    q, k, p, size, *_ = write_page(net, tmp_path / "p.html", image=blocks(*size))
    for draw in ("heat", "contours"):
        browser.open(tmp_path / "p.html", f"#0,0,own,{draw}")
        assert [name.split(":")[0] for name in browser.run(TITLES)] == maps
        got = browser.run("return mapsOf(1)[attention.at(-1)]")
        expected = dnl.denoised_maps(q, k, p, size, net.context.kernel, torch.tensor([1]))[2]
        assert np.allclose(got, expected[0, 0], atol=2e-3 * float(expected.max()))
        corner = "panels[0].context.getImageData(0, 0, 1, 1).data[3]"
        assert draw == "contours" or browser.run(f"return {corner}") == 255
        assert browser.logged()[0] == []
    assert bool(browser.text("gr")) == ("A'" in maps)
    assert bool(browser.text("lr")) == ("A''" in maps)


def test_heat_is_brightest_at_the_maximum_and_the_pixel_is_marked(browser, tmp_path):
    size = write_page(network(sharpness=100), tmp_path / "p.html")[3]
    browser.open(tmp_path / "p.html", f"#{W - 1},0")
    i = np.argmax(browser.run("return mapsOf(kept).A"))
    y, x = np.unravel_index(i, size)
    x, y = (min(place * n // (m - 1), n - 1) for place, n, m in zip((x, y), (800, 535), size[::-1]))
    drawn = browser.run(f"return [...panels[0].context.getImageData({x}, {y}, 1, 1).data]")
    assert np.abs(np.subtract(drawn[:3], HEAT[-1])).max() <= 6
    middle = "const a = {}.getBoundingClientRect(); return [a.x + a.width / 2, a.y + a.height / 2]"
    mark = browser.run(middle.format("document.querySelector('.mark')"))
    corner = "const a = photo.getBoundingClientRect(); return [a.right, a.top]"
    assert np.abs(np.subtract(mark, browser.run(corner))).max() < 3


# ---- what people do with it


def test_mouse_finger_keys_switches_and_address(browser, tmp_path):
    _, _, _, (h, w), *_ = write_page(network(), tmp_path / "p.html")
    browser.emulate(1400, "light")
    browser.open(tmp_path / "p.html", "#0,0")
    boxes = browser.run(
        "return [...document.querySelectorAll('.stack')].map((s) => s.getBoundingClientRect())"
    )

    def at(box, x, y):
        """A movement onto pixel x, y of a picture."""
        place = (box["x"] + (x + 0.5) * box["width"] / W, box["y"] + (y + 0.5) * box["height"] / H)
        return "pointerMove", {"x": round(place[0]), "y": round(place[1]), "duration": 0}

    def pixel():
        return tuple(map(int, browser.text("pixel").split(":")[0].split(",")))

    def address():
        return browser.run("return location.hash")

    down, up = ("pointerDown", {"button": 0}), ("pointerUp", {"button": 0})
    step = (W - 1) / (w - 1)
    assert pixel() == (0, 0) and address() == "#0,0,own,heat,75,nothing"
    browser.act("mouse", at(boxes[0], W - 1, H - 1))
    assert pixel() == (W - 1, H - 1) and address().startswith("#0,0,")
    browser.act("mouse", at({"x": 5, "y": 5, "width": 1, "height": 1}, 0, 0))
    assert pixel() == (0, 0)  # the mouse has left
    browser.act("mouse", at(boxes[2], W - 1, 0), down, up)
    assert pixel() == (W - 1, 0) and address().startswith(f"#{W - 1},0,")
    for key, expected in (
        ("\ue012", (round(W - 1 - step), 0)),  # left
        ("\ue013", (round(W - 1 - step), 0)),  # up, where the image ends
        ("\ue015", (round(W - 1 - step), round((H - 1) / (h - 1)))),  # down
        ("\ue014", (W - 1, round((H - 1) / (h - 1)))),  # right
    ):
        browser.act("key", ("keyDown", {"value": key}), ("keyUp", {"value": key}))
        assert pixel() == expected and address().startswith("#{},{},".format(*expected))
    browser.act("touch", at(boxes[0], 0, 0), down, at(boxes[0], 0, H - 1), up)
    assert pixel() == (0, H - 1) and address().startswith(f"#0,{H - 1},")

    def drawn():
        return browser.run("return panels.map(({ context }) => context.canvas.toDataURL())")

    own = drawn()
    for name, value in (("scale", "one"), ("draw", "contours"), ("over", "predicted")):
        browser.run(
            f"const s = byId('{name}'); s.value = '{value}'; s.dispatchEvent(new Event('input'))"
        )
    browser.act("key", ("keyDown", {"value": "\ue004"}), ("keyUp", {"value": "\ue004"}))
    assert address() == f"#0,{H - 1},one,contours,75,predicted"
    changed = drawn()
    assert all(a != b for a, b in zip(own, changed))
    assert browser.run("return byId('layer').naturalWidth") == W
    assert not browser.run("return byId('layer').hidden")
    link = address()
    browser.open(tmp_path / "p.html", link)
    assert drawn() == changed and address() == link
    browser.run("location.hash = '#0,0,own,heat,40,nothing'")
    assert pixel() == (0, 0)
    assert browser.run("return panels[0].context.canvas.style.opacity") == "0.4"
    browser.open(tmp_path / "p.html", "#junk,9999,<b>,heat,,true")
    assert address().endswith(",own,heat,75,nothing")
    assert browser.logged()[0] == []


def test_names_are_text_and_nothing_is_requested(browser, tmp_path):
    write_page(network(), tmp_path / "p.html")
    browser.open(tmp_path / "p.html")
    assert browser.run("return document.title") == "a <b>.jpg"
    assert CLASSES[2] in browser.text("shares")
    assert browser.run("return document.scripts.length") == 2
    assert browser.logged() == ([], [(tmp_path / "p.html").as_uri()])
    browser.run(INTRUDER)
    fetched = "fetch('http://127.0.0.1:9/').catch(() => arguments[0]())"
    browser.post("/execute/async", script=fetched, args=[])
    assert sorted(set(browser.run("return blocked"))) == [
        "http://127.0.0.1:9/",
        "http://127.0.0.1:9/x.png",
        "inline",
    ]
    assert browser.run("return window.ran") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_contrast_and_width(browser, tmp_path, width, scheme):
    write_page(network(), tmp_path / "p.html")
    browser.emulate(width, scheme)
    browser.open(tmp_path / "p.html")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    pairs = browser.run(COLORS)
    assert len(pairs) > 20
    for text, color, ground in pairs:
        bright, dark = sorted(map(luminance, (color, ground)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, color, ground)
    lightness = luminance(pairs[0][2])
    assert lightness > 0.9 if scheme == "light" else lightness < 0.1


# ---- what predict.py does


def test_predict_writes_the_page(checkpoint, photo, tmp_path, capsys):
    out = tmp_path / "o"
    assert predicted(checkpoint, photo, "--out", out, "--page") == 0
    assert files(out) == ["photo.png", "photo_attention.html", "photo_overlay.png"]
    assert "true" not in data_of(out / "photo_attention.html")
    label = tmp_path / "label.png"
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(label)
    flags = ["--out", out, "--page", "--label", label]
    assert predicted(checkpoint, photo, *flags) == 0
    assert data_of(out / "photo_attention.html")["true"]
    Image.fromarray(np.zeros((40, 55), np.uint8)).save(label)
    assert predicted(checkpoint, photo, *flags) == 1
    assert "got 55x40 pixels, expected 56x40" in capsys.readouterr().err


def test_wrong_flags_are_one_line(checkpoint, photo, tmp_path, capsys):
    Image.fromarray(blocks(40, 56)).save(photo.with_name("b.png"))
    nothing = make_checkpoint(tmp_path / "none.pt", ["a", "b"], context="none")
    for flags, message in (
        ([checkpoint, photo, "--label", photo], "expected --page and one image"),
        ([checkpoint, photo.parent, "--page", "--label", photo], "expected --page and one image"),
        (
            [checkpoint, photo, "--page", "--format", "ade20k"],
            "leave out --confidence, --attention",
        ),
        ([nothing, photo, "--page"], "context 'none' has no attention maps"),
    ):
        assert status_of(predict.main, *flags, "--out", tmp_path / "o") == 2
        assert message in capsys.readouterr().err


def test_a_page_of_1024_x_2048_has_at_most_6_mb(tmp_path, monkeypatch):
    def inputs(net, image, factor):
        assert image.shape == (3, 1024, 2048)
        q, k, p = (torch.randn(1, n, 8192) for n in (64, 64, 19))
        return q, k, p, (64, 128)

    monkeypatch.setattr(page, "attention_inputs", inputs)
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    image = Image.fromarray(image).resize((2048, 1024), Image.Resampling.BICUBIC)
    ids = np.zeros((1024, 2048), np.uint8)
    facts = {"classes": ["a"] * 19, "colors": palette(19)}
    html = page.attention_html(network(), np.array(image), ids, ids, facts, "a")
    assert len(html.encode()) <= 6e6


def test_a_larger_image_is_reduced(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PIXELS", H * W // 4)
    write_page(network(), tmp_path / "p.html")
    data = data_of(tmp_path / "p.html")
    assert data["image"] == [W, H]
    assert data["facts"].startswith("145x97 pixels, computed at 72x48; F 5x3;")
    browser.open(tmp_path / "p.html", f"#{W - 1},{H - 1}")
    assert browser.text("pixel").startswith(f"{W - 1}, {H - 1}: ")
