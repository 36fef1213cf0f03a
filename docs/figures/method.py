"""Draws the method's figure from the model that comes with the package: method-light.svg and method-dark.svg.

    python docs/figures/method.py

Every picture in it is real: the scene, the mask that hides part of its tokens, and what the shipped model makes of noise when it
sees the other tokens alone. The example was chosen because it came out well; most draws differ more from their picture.
"""

import argparse
import base64
import io
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes import corpus_scene, render
from iomm_hf.modeling_iomm import draw_image_mask


TASKS = ("two_object", "position", "color_attr", "counting")
SCENE, SEED, STEPS = (7, 2), 5, 30
WIDTH, HEIGHT = 1120, 590
MINUS = "\N{MINUS SIGN}"
SHOWN_STEPS = (0, 8, 14, 19, 24, 30)  # of the drawing

COLORS = {
    "light": {
        "ink": "#1f2933",
        "muted": "#5f6c7b",
        "line": "#8794a3",
        "card": "#ffffff",
        "edge": "#d5dbe3",
        "frozen": "#2f6fb3",
        "frozen_fill": "#eaf2fb",
        "trained": "#c2570c",
        "trained_fill": "#fdf0e3",
    },
    "dark": {
        "ink": "#e6eaf0",
        "muted": "#a3adba",
        "line": "#7d8896",
        "card": "#1c222b",
        "edge": "#3a4452",
        "frozen": "#7db4ee",
        "frozen_fill": "#16263a",
        "trained": "#f0a35e",
        "trained_fill": "#34230f",
    },
}


class Example(NamedTuple):
    """One picture on its way through the model."""

    picture: Image.Image
    hidden: list[bool]  # one for each image token, row by row
    frames: list[tuple[float, Image.Image]]  # time and what the latents decode to, from noise to picture


def run_model() -> Example:
    pipe = IOMMPipeline.from_pretrained(shipped_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(render(corpus_scene(*SCENE, tasks=TASKS)[0]))
    inputs = pipe.processor.encode([pipe.processor.image_only(picture)])
    image_token = pipe.processor.image_token_id
    mask = draw_image_mask(inputs["input_ids"], image_token, 0.5, [torch.Generator().manual_seed(SEED)])
    with torch.no_grad():
        output = pipe.text_encoder(**inputs, image_mask=mask)

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    frames = [(1.0, pipe.decode(noise)[0])]

    def keep(pipe, step, timestep, tensors):
        if step + 1 in SHOWN_STEPS:
            frames.append((1 - (step + 1) / STEPS, pipe.decode(tensors["latents"])[0]))
        return {}

    pipe(
        prompt_embeds=output.condition,
        prompt_embeds_mask=output.condition_mask,
        latents=noise,
        num_inference_steps=STEPS,
        callback_on_step_end=keep,
    )
    return Example(picture, mask[inputs["input_ids"] == image_token].tolist(), frames)


class Svg:
    """The few shapes that the figure is made of."""

    def __init__(self, colors: dict[str, str]):
        self.colors = colors
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 16,
        color: str = "ink",
        weight: int = 400,
        anchor: str = "middle",
    ):
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
            f' fill="{self.colors[color]}">{words}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "card",
        edge: str = "edge",
        radius: float = 10,
        dashes: str = "none",
    ):
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{self.colors.get(fill, fill)}"'
            f' stroke="{self.colors[edge]}" stroke-width="1.5" stroke-dasharray="{dashes}"/>'
        )

    def arrow(self, path: str, color: str = "line", dashes: str = "none", head: bool = True):
        marker = f' marker-end="url(#{color})"' if head else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colors[color]}" stroke-width="2" stroke-dasharray="{dashes}"{marker}/>'
        )

    def dot(self, x: float, y: float, radius: float, color: str, fill: str):
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{self.colors[fill]}" stroke="{self.colors[color]}" stroke-width="2"/>'
        )

    def picture(self, x: float, y: float, size: float, image: Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(
            f'<image x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" style="image-rendering:pixelated"'
            f' href="data:image/png;base64,{data}"/>'
        )

    def chip(self, x: float, y: float, word: str, color: str):
        """A small label whose right end is at `x`."""
        width = 9 * len(word) + 14
        self.box(x - width, y, width, 24, fill="card", edge=color, radius=12)
        self.text(x - width / 2, y + 17, word, 14, color, 600)

    def __str__(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0 0 10 5 0 10z" fill="{self.colors[name]}"/></marker>'
            for name in ("line", "frozen", "trained")
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, -apple-system, Segoe UI,'
            f' Roboto, Helvetica, Arial, sans-serif">\n<defs>{heads}</defs>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def draw(example: Example, colors: dict[str, str]) -> str:
    svg = Svg(colors)
    side = 4  # image tokens a side
    patch = example.picture.width // side
    patches = [
        example.picture.crop((column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        for row in range(side)
        for column in range(side)
    ]
    seen = [cell for cell, hidden in zip(patches, example.hidden, strict=True) if not hidden]

    # 1. The picture, cut into tokens, part of them hidden
    top, size = 78, 128
    svg.text(88, 42, "a picture", 18, weight=600)
    svg.text(88, 64, "no caption", 16, "muted")
    svg.picture(24, top, size, example.picture)
    svg.arrow(f"M158 {top + size / 2} H184")
    svg.text(254, 42, f"{len(patches)} image tokens", 18, weight=600)
    svg.text(254, 64, f"{sum(example.hidden)} of them hidden", 16, "muted")
    step = size / side
    for number, (cell, hidden) in enumerate(zip(patches, example.hidden, strict=True)):
        x, y = 190 + number % side * step, top + number // side * step
        if hidden:
            svg.box(x + 2, y + 2, step - 4, step - 4, fill="none", edge="line", radius=3, dashes="3 4")
        else:
            svg.picture(x + 1, y + 1, step - 2, cell)
    svg.arrow("M254 212 V262 H352", "frozen")
    svg.text(264, 252, f"{len(seen)} remain", 16, "muted", anchor="start")

    # 2. The MLLM reads the instruction, the visible tokens and, last, the queries
    left, right = 356, 804
    svg.box(left, 24, right - left, 270, "frozen_fill", "frozen")
    svg.text(left + 18, 52, "multimodal LLM", 20, weight=600, anchor="start")
    svg.chip(right - 14, 36, "frozen", "frozen")
    row, out = 262, 104  # heights of the sequence and of its output
    tokens: list[tuple[float, str]] = []
    svg.box(left + 16, row - 15, 112, 30, edge="line", radius=6)
    svg.text(left + 72, row - 2, "“Generate an", 12, "muted")
    svg.text(left + 72, row + 12, "image that is …”", 12, "muted")
    tokens.append((left + 72, "line"))
    x = left + 138
    pitch = min(20, (right - 28 - x) / (len(seen) + 4))
    for cell in seen:
        svg.picture(x, row - 9, pitch - 2, cell)
        tokens.append((x + pitch / 2 - 1, "line"))
        x += pitch
    x += 12
    queries = x + 2 * pitch - 2  # their middle
    for _ in range(4):
        svg.dot(x + 8, row, 7, "trained", "trained_fill")
        tokens.append((x + 8, "trained"))
        x += pitch
    svg.box(left + 16, 138, right - left - 32, 84, edge="frozen", radius=8)
    svg.text((left + right) / 2, 176, "transformer layers, causal:", 16, "frozen", 600)
    svg.text((left + right) / 2, 196, "queries come last and see everything before them", 15, "muted")
    for x, color in tokens:
        svg.arrow(f"M{x:g} {row - 17} V226", color, head=False)
        svg.arrow(f"M{x:g} 138 V{out + 14}", color, head=False)
        if color == "trained":
            svg.dot(x, out, 7, color, "trained_fill")
        else:
            svg.box(x - 7, out - 7, 14, 14, edge="line", radius=4)
    svg.text(left + 18, 84, "condition h", 16, "ink", 600, anchor="start")

    # 3. The adapter looks at the embeddings and hands over the queries
    svg.box(420, 334, 384, 66, "trained_fill", "trained")
    svg.text(438, 362, "residual query adapter", 20, weight=600, anchor="start")
    svg.text(438, 386, "learned queries look at the visible tokens", 16, "muted", anchor="start")
    svg.chip(790, 343, "trained", "trained")
    svg.arrow("M560 296 V330", "line")
    svg.arrow(f"M{queries:g} 332 V{row + 12}", "trained")

    # 4. The same seat for text
    svg.box(24, 304, 310, 66, edge="line", dashes="5 4")
    svg.text(40, 331, "“a red circle above a star”", 18, weight=600, anchor="start")
    svg.text(40, 356, "later, text takes the same seat", 16, "muted", anchor="start")
    svg.arrow("M334 337 H344 V274 H352", "line", "5 4")

    # 5. The generator learns to draw the whole picture from that
    svg.box(846, 24, 250, 270, "trained_fill", "trained")
    svg.text(864, 52, "generator", 20, weight=600, anchor="start")
    svg.chip(1082, 36, "trained", "trained")
    svg.arrow(f"M{right} {out} H842", "frozen")
    svg.text(971, 92, "learns to draw the whole", 16, "ink")
    svg.text(971, 114, "picture from the part", 16, "ink")
    svg.box(864, 130, 214, 150, radius=8)
    svg.text(971, 155, "noised picture, time", 15, "muted")
    svg.text(971, 178, f"xₜ = (1 {MINUS} t) x + t z", 18)
    svg.arrow("M971 188 V204", "line")
    svg.text(971, 222, "velocity", 15, "muted")
    svg.text(971, 244, f"F(xₜ, t, h) ≈ z {MINUS} x", 18, "trained", 600)
    svg.text(971, 267, "squared error is the loss", 15, "muted")

    # 6. Drawing, for real
    y, frame = 452, 96
    svg.text(24, 434, "Drawing: from noise, seeing those tokens alone", 20, weight=600, anchor="start")
    count = len(example.frames)
    gap = (WIDTH - 48 - frame * (count + 1) - 60) / (count - 1)
    for number, (time, image) in enumerate(example.frames):
        x = 24 + number * (frame + gap)
        svg.picture(x, y, frame, image)
        svg.text(x + frame / 2, y + frame + 20, f"t = {time:.2f}".rstrip("0").rstrip("."), 16, "muted")
        if number + 1 < count:
            svg.arrow(f"M{x + frame + 8:g} {y + frame / 2:g} h{gap - 18:g}", "trained")
    x = WIDTH - 24 - frame
    svg.arrow(f"M{x - 30:g} {y} v{frame}", "line", "3 4", head=False)
    svg.picture(x, y, frame, example.picture)
    svg.text(x + frame / 2, y + frame + 20, "the picture", 16, "muted")
    return str(svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="Where to write the two files.")
    output_dir = parser.parse_args().output_dir
    example = run_model()
    for theme, colors in COLORS.items():
        (output_dir / f"method-{theme}.svg").write_text(draw(example, colors), encoding="utf-8")


if __name__ == "__main__":
    main()
