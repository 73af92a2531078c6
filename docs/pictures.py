"""Draw the pictures of the concept pages: `python docs/pictures.py --plan plan.json`.

SVG text without a drawing library: the same input gives the same bytes. Each has a light ground of its own, so that it
can be read on a dark page. `--plan` names the plan of the heat map; without it that picture stays as it is.
"""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import Any

from amoeba_export.ir import Architecture, SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.reading import read_json_object

HERE = Path(__file__).parent / "img"

INK, SOFT, LINE, GROUND = "#1b1f24", "#59636e", "#aab3bd", "#ffffff"
BLUE, VIOLET, GREEN, ORANGE = "#3949ab", "#7a3fb0", "#1a7f37", "#b45309"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
NEURONS_A_BLOCK = 32


class Picture:
    """An SVG in the making."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{html.escape(title)}" font-family="{html.escape(FONT)}">',
            f"<title>{html.escape(title)}</title><style>.c{{stroke:{LINE};stroke-width:.4px}}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>',
        ]

    def box(self, x: int, y: int, w: int, h: int, lines: str, *, colour: str = BLUE) -> None:
        """A rounded box with lines of text in it, the first one bold."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{colour}" fill-opacity="0.08" '
            f'stroke="{colour}"/>'
        )
        texts = lines.split("\n")
        top = y + h / 2 - (len(texts) - 1) * 8.5 + 4.5
        for i, text in enumerate(texts):
            self.text(x + w / 2, top + 17 * i, text, bold=i == 0, anchor="middle", colour=INK if i == 0 else SOFT)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        bold: bool = False,
        anchor: str = "start",
        colour: str = INK,
        size: int = 13,
    ) -> None:
        """One line of text."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{weight}>'
            f"{html.escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line with a tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.5" marker-end="url(#tip)"{dash}/>'
        )

    def cell(self, x: float, y: float, w: float, h: float, colour: str, share: float) -> None:
        """A cell that is the darker the more is kept."""
        fill = f'fill="{colour}" fill-opacity="{share:.2f}"' if share > 0 else 'fill="none"'
        self.parts.append(f'<rect class="c" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" {fill}/>')

    def write(self, name: str) -> None:
        """Write it into `docs/img`."""
        HERE.mkdir(exist_ok=True)
        (HERE / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def pipeline() -> None:
    """From a checkpoint to an artifact for each device."""
    picture = Picture(860, 250, "One supernet, a plan for each target, an artifact for each plan")
    picture.box(20, 30, 130, 50, "checkpoint", colour=SOFT)
    picture.box(20, 100, 130, 50, "strategy\nfrom calibration", colour=SOFT)
    picture.box(20, 170, 130, 50, "adapters\nLoRA, SMoL", colour=SOFT)
    picture.box(205, 85, 130, 80, "supernet\nall subnets\nin one model")
    for y in (55, 125, 195):
        picture.arrow((150, y), (178, y), (178, 125), (203, 125))
    rows = (("laptop", "24x0.75, int8"), ("board", "18x0.9, int4"), ("phone", "20x0.5, int4"))
    for i, (target, shape) in enumerate(rows):
        y = 30 + 70 * i
        picture.box(400, y, 150, 50, f"plan\n{shape}", colour=VIOLET)
        picture.box(615, y, 225, 50, f"artifact for the {target}\nONNX, safetensors, GGUF", colour=GREEN)
        picture.arrow((335, 125), (367, 125), (367, y + 25), (398, y + 25))
        picture.arrow((550, y + 25), (613, y + 25))
    picture.text(367, 18, "search under the budget", anchor="middle", colour=SOFT, size=12)
    picture.text(582, 18, "cut, refit, write, verify, measure", anchor="middle", colour=SOFT, size=12)
    picture.write("pipeline.svg")


def budget_loop() -> None:
    """How a budget is met: predict, build, measure, correct."""
    picture = Picture(860, 300, "The budget loop: predict, choose, build, measure, correct, until the budget is kept")
    picture.box(20, 30, 170, 70, "cost table\na dozen graphs,\nmeasured once", colour=SOFT)
    picture.box(20, 130, 170, 70, "quality\na grid of shapes and\neach precision", colour=SOFT)
    picture.box(260, 80, 160, 70, "choose\nbest quality that is\npredicted to fit")
    picture.box(480, 80, 150, 70, "build, verify\nand measure beside\nthe full model", colour=VIOLET)
    picture.box(690, 80, 150, 70, "publish\nthe budget is kept", colour=GREEN)
    picture.arrow((190, 65), (225, 65), (225, 105), (258, 105))
    picture.arrow((190, 165), (225, 165), (225, 125), (258, 125))
    picture.arrow((420, 115), (478, 115))
    picture.arrow((630, 115), (688, 115))
    picture.arrow((555, 150), (555, 215))
    picture.box(445, 217, 220, 60, "correct the predictions\nmeasured / predicted", colour=ORANGE)
    picture.arrow((445, 247), (340, 247), (340, 152))
    picture.text(564, 190, "over the budget, or far under it", colour=SOFT, size=12)
    picture.write("budget-loop.svg")


def recovery() -> None:
    """A refit: the stream of the cut follows that of the full model."""
    picture = Picture(
        860,
        270,
        "A refit: in each kept layer, two matrices are fitted so that the cut's stream follows the full model's",
    )
    picture.text(20, 65, "full model", bold=True)
    picture.text(20, 205, "cut", bold=True)
    names = ("layer 0", "layer 1", "layer 2", "layer 3")
    kept = (True, True, False, True)
    for i, (name, stays) in enumerate(zip(names, kept, strict=True)):
        x = 130 + 180 * i
        picture.box(x, 35, 120, 50, f"{name}\nas it was")
        picture.arrow((x + 120, 60), (x + 178, 60))
        if stays:
            picture.box(x, 170, 120, 62, f"{name}\nnarrower\no, down: fitted", colour=VIOLET)
            reaches = x + 120 + (180 if i == 1 else 0)
            picture.arrow((reaches + 30, 64), (reaches + 30, 135), (x + 105, 135), (x + 105, 168), dashed=True)
        else:
            picture.text(x + 60, 205, "gone", anchor="middle", colour=SOFT)
        picture.arrow((x if not stays else x + 120, 201), (x + 178, 201)) if stays else picture.arrow(
            (x + 95, 201), (x + 178, 201)
        )
    picture.text(
        130,
        258,
        "dashed: what a layer of the cut is fitted to, the full model's stream after it and after layers that are gone",
        colour=SOFT,
        size=12,
    )
    picture.write("recovery.svg")


def heat_map(plan: SubnetPlan, full: Architecture) -> None:
    """A plan: rows are layers, columns heads and blocks of neurons."""
    head, block, row = 16, 11, 13
    blocks = -(-full.ffn_size // NEURONS_A_BLOCK)
    left, top, gap = 60, 62, 26
    right = left + head * full.num_heads + gap
    width, height = right + block * blocks + 24, top + row * full.num_layers + 44
    title = f"A plan of {len(plan.layers)} of {full.num_layers} layers: kept heads and neurons of each"
    picture = Picture(width, height, title)
    picture.text(left, 26, f"{plan.shape}, {plan.policy}", bold=True)
    picture.text(left, 50, "query heads", colour=SOFT, size=12)
    picture.text(right, 50, f"FFN neurons, {NEURONS_A_BLOCK} a block", colour=SOFT, size=12)
    layers = {layer.source_layer: layer for layer in plan.layers}
    for i in range(full.num_layers):
        y = top + row * i
        if i % 5 == 0 or i == full.num_layers - 1:
            picture.text(left - 10, y + 10, str(i), anchor="end", colour=SOFT, size=11)
        if i not in layers:
            continue
        heads, neurons = set(layers[i].query_heads), layers[i].ffn
        kept = [0] * blocks
        for neuron in neurons:
            kept[neuron // NEURONS_A_BLOCK] += 1
        for j in range(full.num_heads):
            picture.cell(left + head * j, y, head - 2, row - 2, BLUE, 0.85 if j in heads else 0)
        for j, count in enumerate(kept):
            size = min(NEURONS_A_BLOCK, full.ffn_size - j * NEURONS_A_BLOCK)
            picture.cell(right + block * j, y, block - 1, row - 2, VIOLET, 0.9 * (count / size) ** 2)
    picture.text(left - 10, height - 18, "layer", anchor="end", colour=SOFT, size=11)
    picture.text(left, height - 18, "empty rows: layers that are gone", colour=SOFT, size=12)
    picture.write("plan.svg")


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--plan", type=Path, help="the plan.json of an artifact")
    parser.add_argument("--model", default="demo", help="the supernet that it cuts")
    options: Any = parser.parse_args()
    pipeline()
    budget_loop()
    recovery()
    if options.plan:
        plan = SubnetPlan.from_json(read_json_object(options.plan, what="The plan"), where=str(options.plan))
        heat_map(plan, load_supernet(options.model).architecture)


if __name__ == "__main__":
    main()
