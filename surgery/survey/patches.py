"""What the tokens of an image are in each layer: CLS, registers, patches, and patches of high norm among them.

Encoders that lack a place for what concerns the whole image put it on patches with little to say, whose norms stand out
(Darcet et al. 2024, arXiv 2309.16588); massive activations of such models stand there, on CLS or on registers (Sun et
al. 2024, arXiv 2402.17762, section 5). Of a recording the same is asked, with frames in place of patches.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..anatomy.calls import Call
from ..live.port import Batch, Images
from ..live.stream import Observer
from .across import auto_massive
from .softmax import BLOCK, Softmax

HIGH = 3.0  # times the median norm of an image's patches, from which on one of them is an outlier
SHOWN = 4  # images whose norms are shown, place by place
SIDE = 96  # pixels of their pictures in a report
KINDS = ("cls", "register", "special", "patch")


class Kinds(Observer):
    """By layer, means over images:

    * `cls_norm`, `register_norm`, `special_norm`, `patch_norm`: L2 norms of tokens by kind (mean over those of an
      image), None where there is no such token; `patch_norm_max`: of the longest patch.
    * `high_norm`: share of patches that are at least three times as long as the median patch of their image.
    * `to_cls`, `to_registers`, `to_high`: attention of all patches that goes to CLS, to all registers, and to patches
      of high norm in what the block reads, mean over heads. None where there are none.
    """

    def __init__(self, port: Images) -> None:
        self.port = port
        self.high: dict[Batch, torch.Tensor] = {}  # (B, patches), of the layer that the next block reads
        self.sums: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        port, found = self.port, self.sums[layer]
        norms = states.float().norm(dim=-1)  # (B, T)
        patches = norms[:, port.special :]
        middle = patches.median(dim=1, keepdim=True).values
        high = (patches >= HIGH * middle) & (middle > 0)
        self.high[batch] = high
        after = port.cls + port.registers
        ends = {"cls": (0, port.cls), "register": (port.cls, after), "special": (after, port.special)}
        for kind, (start, stop) in ends.items():
            if start < stop <= port.special:
                found[f"{kind}_norm"] += norms[:, start:stop].mean(dim=1).tolist()
        found["patch_norm"] += patches.mean(dim=1).tolist()
        found["patch_norm_max"] += patches.amax(dim=1).tolist()
        found["high_norm"] += high.float().mean(dim=1).tolist()

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        port, found, every = self.port, self.sums[block + 1], self.high.pop(batch)
        patches = torch.arange(port.special, port.tokens)
        for image, high in enumerate(every):
            softmax = Softmax(call.of_row(image))
            given = [softmax.weights(part)[0][0].mean(dim=0).sum(dim=0) for part in patches.split(BLOCK)]
            weights = torch.stack(given).sum(dim=0) / len(patches)  # (T,), what patches give to each place
            if port.cls:
                found["to_cls"].append(weights[0].item())
            if port.registers:
                found["to_registers"].append(weights[port.cls : port.cls + port.registers].sum().item())
            if high.any():
                found["to_high"].append(weights[port.special : port.tokens][high].sum().item())

    def rows(self) -> dict[int, dict]:
        """Layer -> the keys above."""
        names = [*(f"{kind}_norm" for kind in KINDS), "patch_norm_max", "high_norm"]
        found = {}
        for layer, sums in sorted(self.sums.items()):
            keys = names if layer == 0 else [*names, "to_cls", "to_registers", "to_high"]
            found[layer] = {key: sum(sums[key]) / len(sums[key]) if sums.get(key) else None for key in keys}
        return found


class Standing(Observer):
    """Which tokens of each image stand out most, in the layer where one does so most, before the last.

    Those with an entry of ten times an ordinary token's largest (`across.auto_massive`), and those that are three times
    as long as the median token.
    """

    def __init__(self) -> None:
        self.found: dict[int, list[list[int]]] = defaultdict(list)  # by layer, of each image
        self.ratios: dict[int, list[float]] = defaultdict(list)

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        for row in states.float():
            places, ordinary = auto_massive(row)
            norms = row.norm(dim=-1)
            longest = (norms >= HIGH * norms.median()).nonzero().flatten().tolist() if norms.median() > 0 else []
            self.found[layer].append(sorted({*places[:, 0].tolist(), *longest}))
            self.ratios[layer].append(float(row.abs().max() / ordinary) if ordinary > 0 else 0.0)

    def chosen(self) -> list[list[int]]:
        """The tokens of each image."""
        inner = sorted(self.found)[1:-1] or sorted(self.found)
        return self.found[max(inner, key=lambda layer: sum(self.ratios[layer]))]


class NormMaps(Observer):
    """Norms of the patches of the first images in every layer, as they lie in the image."""

    def __init__(self, port: Images) -> None:
        self.port = port
        self.norms: dict[int, list[torch.Tensor]] = defaultdict(list)  # layer -> of each image (rows, columns)

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        room = SHOWN - len(self.norms[layer])
        for image in states[: max(room, 0), self.port.special :].float().norm(dim=-1):
            self.norms[layer].append(image.reshape(self.port.grid).cpu())

    def to_dict(self, names: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """`images`: `name`, `png` (base64) and `norms` by layer of each that is shown; `layers`: after the first block,
        halfway and at three quarters, where a patch stands out most, and the last."""
        last = max(self.norms)
        stands_out = {at: max(float(one.max() / one.median()) for one in self.norms[at]) for at in range(1, last + 1)}
        layers = sorted({1, (last + 1) // 2, 3 * last // 4, max(stands_out, key=stands_out.__getitem__), last} - {0})
        return {
            "layers": layers,
            "images": [
                {
                    "name": name,
                    "png": _png(picture),
                    "norms": [[[round(x, 3) for x in row] for row in self.norms[at][index].tolist()] for at in layers],
                }
                for index, (name, picture) in enumerate(zip(names[:SHOWN], pictures, strict=False))
            ],
        }


def _png(picture: Image.Image) -> str:
    written = io.BytesIO()
    picture.save(written, "png")
    return base64.b64encode(written.getvalue()).decode("ascii")
