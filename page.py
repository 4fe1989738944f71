"""The attention page: an HTML file that shows what any pixel of an image attends to.

A pixel's rows of A, A', A'' and P_class are a function of Q, K and P, which are small. The page
holds these three and computes the rows itself, so it needs no network and no library. Its markup,
style and script are attention_page.html.
"""

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

import dnl
from attention import attention_inputs
from decode import decode_label
from pictures import Picture, colorize, heat
from runtime import InputError, quote

PIXELS = 1024 * 2048  # a larger image is reduced to this, where F has 8192 positions
PHOTO = 1600  # the longest side of the photograph in the page, in pixels
TEMPLATE = Path(__file__).with_name("attention_page.html")


def attention_html(
    net: dnl.Network,
    image: np.ndarray,
    ids: np.ndarray,
    confidence: np.ndarray,
    checkpoint: dict[str, Any],
    name: str,
    label: Path | None = None,
) -> str:
    """The page of an image (H, W, 3) uint8 called `name`. The network passes `require_attention`.

    ids, confidence (H, W) uint8: as of `evaluate.predict_ids`. label: the image's label file.
    InputError if it cannot be read or has another size.
    """
    layers = {"predicted": ids}
    note = "the predicted classes, since no label was given"
    if label is not None:
        layers["true"] = read_label(label, checkpoint, ids.shape)
        note = f"the true classes, of {label.name}"
    photo = Image.fromarray(image)
    data = network_part(net, photo)
    size = data["size"]
    data |= {name: encode(labels_at(layer, size)) for name, layer in layers.items()}
    data["confidence"] = encode(labels_at(confidence, size))
    small = photo.copy()
    small.thumbnail((PHOTO, PHOTO), Resampling.BILINEAR)
    data["photo"] = data_url(small, "JPEG", quality=85)
    data["layers"] = {}
    for kind, layer in layers.items():
        mask = colorize(layer, checkpoint["colors"]).resize(small.size, Resampling.NEAREST)
        data["layers"][kind] = data_url(mask, "PNG")
    data["heat"] = heat(np.linspace(0, 1, 256)).tolist()
    data["classes"] = checkpoint["classes"]
    data["colors"] = checkpoint["colors"]
    data["name"] = name
    data["note"] = (
        f"Noise is measured against {note}. Inter-class: the part of a map outside the pixel's "
        "class. Intra-class: 0 if the map is even over the class, 1 if it is a single pixel."
    )
    return fill_template(data)


@torch.inference_mode()
def network_part(net: dnl.Network, photo: Picture) -> dict[str, Any]:
    """What the page needs of the network, and the sizes of the photograph and of F."""
    block = cast(dnl.DenoisedNonLocal, net.context)  # require_attention has checked this
    W, H = photo.size
    facts = f"{W}x{H} pixels"
    if W * H > PIXELS:
        factor = (PIXELS / (W * H)) ** 0.5
        smaller = (max(1, round(W * factor)), max(1, round(H * factor)))
        photo = photo.resize(smaller, Resampling.BILINEAR)
        facts += f", too many for a page: computed at {photo.width}x{photo.height}"
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    q, k, p, size = attention_inputs(net, image.to(block.gamma.device))
    h, w = size
    titles = {"A": "A: softmax of Q·K"}
    if p is not None:
        titles["A'"] = "A': after Global Rectifying, A x P_class"
    if block.kernel:
        titles["A''"] = f"A'': after Local Retention, windows of {block.kernel}x{block.kernel}"
    if p is not None:
        titles["P_class"] = "P_class: sigmoid of P·P"
    return {
        "image": [W, H],
        "size": size,
        "kernel": block.kernel,
        "titles": titles,
        "facts": f"{facts}; F {w}x{h}; gamma {block.gamma.item():.3g}.",
        "q": encode_matrix(q[0]),
        "k": encode_matrix(k[0]),
        "p": None if p is None else encode_matrix(p[0]),
    }


def encode_matrix(x: Tensor) -> dict[str, Any]:
    """x (R, N) in 24 bits: low + step * code, with a low and a step for each row.

    Of logits up to 1e4, as trained networks have, 16 bits would not leave the maps equal.
    """
    values = x.double().cpu().numpy()
    low = values.min(1)
    step = (values.max(1) - low) / (2**24 - 1)
    step[step == 0] = 1  # an even row
    codes = np.rint((values - low[:, None]) / step[:, None]).astype("<u4")
    three = codes[..., None].view(np.uint8)[..., :3]
    return {"low": low.tolist(), "step": step.tolist(), "codes": encode(three)}


def encode(array: np.ndarray) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(array.tobytes()).decode()


def data_url(picture: Picture, kind: str, **options: Any) -> str:
    """A picture as a URL that holds it."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def labels_at(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The label (H, W) at the positions of F (h, w): the corners of F are those of the image."""
    y, x = (np.linspace(0, n - 1, m).round().astype(int) for n, m in zip(label.shape, size))
    return label[y][:, x]


def read_label(path: Path, checkpoint: dict[str, Any], size: tuple[int, ...]) -> np.ndarray:
    """The label file of an image of `size` (H, W). InputError if it has another size."""
    label = decode_label(path, checkpoint["data"], checkpoint["colors"])
    if label.shape != size:
        H, W = size
        got = f"{label.shape[1]}x{label.shape[0]}"
        raise InputError(f"{quote(path)}: got {got} pixels, expected {W}x{H} as the image has")
    return label


def fill_template(data: dict[str, Any]) -> str:
    """The page with its data. Its policy allows its own style and script, and no request at all.

    Names come from strangers: without "<" they cannot end the element that holds the data.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("style", "script"):
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        text = cast(re.Match[str], found)[1]  # the template has both
        digest = hashlib.sha256(text.encode()).digest()
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'")
    page = page.replace("{{policy}}", "; ".join(rules))
    return page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
