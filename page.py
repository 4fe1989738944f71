"""The attention page: an HTML file that shows what any pixel of an image attends to.

A pixel's rows of A, A', A'' and P_class are a function of Q, K and P, which are small. The page
holds these three and computes the rows itself, so it needs no network and no library. Its markup,
style and script are attention_page.html.
"""

import hashlib
import io
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

import dnl
from attention import attention_inputs
from checkpoint import base_of
from classes import numbers_of
from data import base_factor, scaled
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
    base: int | None = None,
) -> str:
    """The page of an image (H, W, 3) uint8 called `name`. The network passes `require_attention`.

    ids, confidence (H, W) uint8: as of `evaluate.predict_ids`. label: the image's label file. base:
    --base, if given. InputError if the label cannot be read or has another size.
    """
    layers = {"predicted": ids}
    against = "the predicted classes, since no label was given"
    if label is not None:
        layers["true"] = decode_label(
            label, checkpoint["data"], len(checkpoint["classes"]), numbers_of(checkpoint["colors"])
        )
        H, W = layers["true"].shape
        if ids.shape != (H, W):
            expected = f"{ids.shape[1]}x{ids.shape[0]} as the image has"
            raise InputError(f"{quote(label)}: got {W}x{H} pixels, expected {expected}")
        against = f"the true classes, of {quote(label.name)}"
    photo = Image.fromarray(image)
    data = network_part(net, photo, base_of(checkpoint, base))
    size = data["size"]
    photo.thumbnail((PHOTO, PHOTO), Resampling.BILINEAR)
    data["photo"] = data_url(photo, "jpeg", quality=85)
    data["confidence"] = base64(at_positions(confidence, size))
    data["layers"] = {}
    for kind, layer in layers.items():
        data[kind] = base64(at_positions(layer, size))
        mask = colorize(layer, checkpoint["colors"])
        data["layers"][kind] = data_url(mask.resize(photo.size, Resampling.NEAREST), "png")
    data |= {key: checkpoint[key] for key in ("classes", "colors")}
    data["heat"] = heat(np.linspace(0, 1, 256)).tolist()
    data["name"] = name
    data["note"] = (
        f"Noise is measured against {against}. Inter-class: the part of a map outside the pixel's "
        "class. Intra-class: 0 if the map is even over the class, 1 if it is a single pixel."
    )
    return fill_template(data)


@torch.inference_mode()
def network_part(net: dnl.Network, photo: Picture, base: int) -> dict[str, Any]:
    """What the page needs of the network, and the sizes of the photograph and of F."""
    block = cast(dnl.DenoisedNonLocal, net.context)  # require_attention has checked this
    W, H = photo.size
    facts = f"{W}x{H} pixels"
    factor = base_factor((H, W), base)
    most = (PIXELS / (W * H)) ** 0.5
    if most < (factor or 1):  # too many for a page
        factor = most
    if factor is not None:
        height, width = scaled((H, W), factor)
        facts += f", computed at {width}x{height}"
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    q, k, p, size = attention_inputs(net, image.to(block.gamma.device), factor)
    h, w = size
    titles = {"A": "A: softmax of Q·K"}
    if p is not None:
        titles["A'"] = "A': after Global Rectifying"
    if block.kernel:
        titles["A''"] = f"A'': after Local Retention, {block.kernel}x{block.kernel}"
    if p is not None:
        titles["P_class"] = "P_class: sigmoid of P·P"
    matrices = {"q": q, "k": k, "p": p}
    return {
        **{key: None if x is None else encode_matrix(x[0]) for key, x in matrices.items()},
        "image": (W, H),
        "size": size,
        "kernel": block.kernel,
        "titles": titles,
        "facts": f"{facts}; F {w}x{h}; gamma {block.gamma.item():.3g}.",
    }


def encode_matrix(x: Tensor) -> dict[str, Any]:
    """x (R, N) in 24 bits: low + step * code, with a low and a step for each row.

    Logits of trained networks reach 1e4. With 16-bit floats the maps would be off by a tenth.
    """
    values = x.cpu().double().numpy()
    low = values.min(1)
    step = (values.max(1) - low) / (2**24 - 1)
    step[step == 0] = 1  # an even row
    codes = np.rint((values - low[:, None]) / step[:, None]).astype("<u4")
    three_bytes = codes[..., None].view(np.uint8)[..., :3]
    return {"low": low.tolist(), "step": step.tolist(), "codes": base64(three_bytes)}


def at_positions(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """x (H, W) at the nearest pixel to each position of F (h, w), corners on corners."""
    rows, columns = (np.linspace(0, n - 1, m).round().astype(int) for n, m in zip(x.shape, size))
    return x[rows][:, columns]


def base64(content: np.ndarray | bytes) -> str:
    """The bytes in base64."""
    return b64encode(bytes(content)).decode()


def data_url(picture: Picture, kind: str, **options: Any) -> str:
    """A picture as a URL that holds it. kind: jpeg or png."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64(file.getvalue())}"


def fill_template(data: dict[str, Any]) -> str:
    """The page with its data. Its policy allows its own style and script, and no request at all.

    Names come from strangers: without "<" they cannot end the element that holds the data.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64(hashlib.sha256(text.encode()).digest())
        rules.append(f"{tag}-src 'sha256-{digest}'")
    page = page.replace("{{policy}}", "; ".join(rules))
    return page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
