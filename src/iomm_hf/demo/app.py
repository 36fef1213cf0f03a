"""The demo's page: four tabs over `model`, which are a documented API and MCP tools as well.

Functions with an `api_name` are what others call, so they take and give plain things; what only the page needs (a seed for
the next picture, the slider of before and after) hangs on events of its own, which are private.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from ..data.images import FORMATS, BadImage, load_image, resize_and_crop
from ..data.shapes import COLORS, corpus_scene, render
from . import model


HERE = Path(__file__).parent
MAX_BYTES = 10 * 1024**2  # of an upload
MAX_PIXELS = 40_000_000  # a phone's largest; decoded, 120 MB
QUEUE = 24  # visitors who may wait
KEPT_SECONDS = 1800  # how long a picture may lie in the server's cache
HISTORY = 24  # pictures that the page shows again

PROMPTS = (
    "a red circle",
    "a purple ring left of a yellow heart",
    "two green stars",
    "a triangle above a square",
    "a pink heart and a brown cross",
    "three yellow diamonds",
)
INSTRUCTIONS = ("make it blue", "remove the star", "turn the circle into a heart")
QUESTIONS = ("Describe the image.", "How many stars are there?", "What color is the circle?")
SCENES = (15, 2, 7, 28)  # of corpus 0: pictures to click at
LEARN_SEED = 8  # whose noise has a light ground, as the first scene has

# Measured on the shipped model: results/shapes/score.json and edits.json.
SHIPPED_NOTES = {
    "draw": (
        "The small model that comes with the package knows eight shapes in eight colours, up to four at a time, at 64"
        " pixels. **87 %** of its benchmark pictures show what was asked for; counting fails most."
    ),
    "edit": (
        "**Do not expect much.** The small model varies pictures and does not follow edits yet: of 10 recolourings and"
        " 10 removals **none** was right, of 10 variations 9 kept their objects."
    ),
    "ask": (
        "Here the frozen language model answers by itself; training the generator did not change a word of it. This one"
        " has 1.8 million weights and has seen nothing but shapes, so it finds shapes in everything."
    ),
    "learn": (
        "What comes through is what the language model has words for: the objects and their colours. Place and ground come"
        " from the noise, so another seed lays them out anew. With nothing hidden, 9 of 10 variations keep their objects."
    ),
}

ABOUT = """
**IOMM** trains the drawing half of a multimodal model on pictures alone: a frozen multimodal LLM looks at a few patches of a
picture and describes what it saw to a generator, which learns to draw the whole. Afterwards text-image pairs, mixed with
pictures alone, teach it to follow text, which takes the very same path.

Unofficial implementation of [*Rethinking UMM Visual Generation: Masked Modeling for Efficient Image-Only
Pre-training*](https://arxiv.org/abs/2603.16139) (Sun, Xie, Lin, CVPR 2026), not affiliated with its authors. No full-size
weights have been trained with it. Code and small model: Apache-2.0.

**Your pictures** stay on this server just long enough to be shown to you, at most an hour. Nothing is logged, kept or trained
on, and nothing on this page phones home.
"""

# A whole number below 2**31, drawn in the visitor's browser: no round trip.
NEXT_SEED = "(seed, fresh) => fresh ? Math.floor(Math.random() * 2147483648) : seed"

SHAPES = {
    "circle": '<circle cx="12" cy="12" r="10"/>',
    "square": '<rect x="3" y="3" width="18" height="18"/>',
    "triangle": '<path d="M12 2 23 21H1z"/>',
    "star": '<path d="m12 1 3.2 7.2 7.8.8-5.8 5.3 1.6 7.7-6.8-4-6.8 4 1.6-7.7L1 9l7.8-.8z"/>',
    "heart": '<path d="M12 22C5 16 1 12 1 7.5A5.8 5.8 0 0 1 12 5a5.8 5.8 0 0 1 11 2.5C23 12 19 16 12 22z"/>',
}


@contextmanager
def told() -> Iterator[None]:
    """What a visitor did wrong, as a message on the page and an error of the API."""
    try:
        yield
    except BadImage as error:
        # An unknown format's message ends in the file's first bytes, which are for logs.
        why = f"expected one of {', '.join(FORMATS)}" if error.reason == "unknown_format" else error.message
        raise gr.Error(f"That picture cannot be used: {why}.", title="Sorry", print_exception=False) from None
    except ValueError as error:
        raise gr.Error(str(error), title="Sorry", print_exception=False) from None


def read_upload(upload: dict[str, Any] | None) -> Image.Image:
    """A visitor's file, upright and in RGB. Events that take one have `preprocess=False`, so no decoder but ours sees the
    bytes; and Gradio checks the paths of only those uploads that call themselves its own, so all are checked here."""
    if not upload:
        raise ValueError("Give a picture first: upload one, or click at an example.")
    if not isinstance(upload, dict) or not isinstance(upload.get("path"), str) or not upload["path"]:
        raise ValueError("Send the picture as a file, not as a data URL.")
    path = Path(upload["path"]).resolve()
    if not (path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file()):
        raise ValueError("That file was not uploaded here, or was deleted since. Upload the picture again.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"That file is larger than {MAX_BYTES // 1024**2} MB.")
    return load_image(path.read_bytes(), max_pixels=MAX_PIXELS)


def delete_sent_over_mcp(age: float):
    """Deletes pictures that came over MCP as data URLs longer ago than `age` seconds: these alone Gradio would keep for ever.
    It writes them as `file.png` and the like, and hands on a copy that it deletes as other uploads."""
    for file in Path(get_upload_folder()).glob("*/file*"):
        with suppress(FileNotFoundError):  # Gradio, or another page of this machine, was faster
            if file.stem == "file" and time.time() - file.lstat().st_ctime > age:
                file.unlink()


@asynccontextmanager
async def sweeping(_: Any) -> AsyncIterator[None]:
    """While the page is served: deletes by age, now and then, as Gradio does."""

    async def sweep():
        while True:
            await asyncio.sleep(KEPT_SECONDS / 3)
            await asyncio.to_thread(delete_sent_over_mcp, KEPT_SECONDS)

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def whole(name: str, value: Any) -> int:
    """A whole number from a slider or from JSON."""
    if not real(name, value).is_integer():
        raise ValueError(f"The {name} must be a whole number, got {value!r}.")
    return int(value)


def real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"The {name} must be a number, got {value!r}.")
    return float(value)


def draw_steps(order: model.Order, progress: gr.Progress) -> Iterator[Image.Image]:
    """Previews and the picture of an order; closing it, as Gradio does when a visitor stops, stops the drawing."""
    model.check(order)
    progress(0, desc="Reading")
    with closing(model.draw(order)) as steps:
        for step in steps:
            progress((step.step, step.steps), desc="Drawing", unit="steps")
            if step.picture is not None:
                yield step.picture


def draw(
    prompt: str,
    seed: int = 0,
    size: int = 64,
    steps: int = 30,
    guidance_scale: float = 3.0,
    progress=gr.Progress(),  # noqa: B008  (Gradio looks for it among the defaults)
) -> Iterator[Image.Image]:
    """Draw a picture from text.

    Args:
        prompt: What to draw, such as "a red circle left of a blue star".
        seed: Whole number; the same one draws the same picture again.
        size: Side of the square picture in pixels; best left as the model was trained.
        steps: Steps from noise to image, 1 to 50.
        guidance_scale: How strongly to follow the prompt, 1 to 8; 1 turns guidance off.

    Returns:
        The picture, after previews of it.
    """
    with told():
        order = model.Order(
            prompt or "",
            seed=whole("seed", seed),
            size=whole("size", size),
            steps=whole("number of steps", steps),
            guidance_scale=real("guidance", guidance_scale),
        )
        yield from draw_steps(order, progress)


def edit(
    picture: dict | None,
    instruction: str = "",
    seed: int = 0,
    steps: int = 30,
    guidance_scale: float = 3.0,
    progress=gr.Progress(),  # noqa: B008
) -> Iterator[Image.Image]:
    """Change a picture as told, or vary it.

    Args:
        picture: The picture to change; its middle square is used.
        instruction: What to change, such as "make it blue". Left empty, the picture is varied.
        seed: Whole number; the same one gives the same result again.
        steps: Steps from noise to image, 1 to 50.
        guidance_scale: How strongly to follow picture and instruction, 1 to 8; 1 turns guidance off.

    Returns:
        The changed picture, after previews of it.
    """
    with told():
        order = model.Order(
            (instruction or "").strip() or None,
            read_upload(picture),
            seed=whole("seed", seed),
            steps=whole("number of steps", steps),
            guidance_scale=real("guidance", guidance_scale),
        )
        yield from draw_steps(order, progress)


def ask(picture: dict | None, question: str = "Describe the image.") -> Iterator[str]:
    """Ask the frozen multimodal language model about a picture.

    Args:
        picture: The picture to look at.
        question: What to answer, such as "How many stars are there?".

    Returns:
        The answer, after its beginnings.
    """
    with told():
        model.check_text(question or "", "Ask something, such as “Describe the image.”")
        with closing(model.answer(read_upload(picture), question)) as answer:
            yield from answer


def learn(
    picture: dict | None,
    mask_ratio: float = 0.5,
    seed: int = 0,
    progress=gr.Progress(),  # noqa: B008
) -> Iterator[Image.Image]:
    """Show the method in one picture: a picture, what the language model sees of it when a share of its patches is
    hidden, and what the generator makes of that.

    Args:
        picture: Any picture; its middle square is used.
        mask_ratio: Share of the patches that is hidden, 0 to 0.95.
        seed: Whole number; decides which patches are hidden, and what is made up.

    Returns:
        Three tiles in a row, after previews of the third.
    """
    with told():
        source = read_upload(picture)
        order = model.Order(None, source, whole("seed", seed), mask_ratio=real("share to hide", mask_ratio))
        model.check(order)
        hidden = model.hidden_patches(order.mask_ratio, order.seed)
        yield model.method_picture(source, hidden)
        for drawn in draw_steps(order, progress):
            yield model.method_picture(source, hidden, drawn)


def show_mask(picture: dict | None, mask_ratio: float, seed: int) -> tuple[Image.Image | None, str]:
    """The first two tiles, at once: which patches [`learn`] will hide."""
    if not picture:
        return None, ""
    with told():
        source = read_upload(picture)
        hidden = model.hidden_patches(real("share to hide", mask_ratio), whole("seed", seed))
    return model.method_picture(source, hidden), f"{hidden.sum()} of {hidden.size} patches hidden"


def check_upload(picture: dict | None):
    """Says at once what is wrong with a file."""
    with told():
        read_upload(picture)


def compare(picture: dict | None, edited: dict | None) -> tuple[dict, dict]:
    """Before and after, both as the model has them."""
    after = read_upload(edited)
    before = resize_and_crop(read_upload(picture), after.size)
    return gr.update(value=(before, after), visible=True), gr.update(visible=False)


def keep(picture: str, prompt: str, seed: int, kept: list | None) -> list[tuple[str, str]]:
    """The page's own memory: the newest picture first."""
    return [(picture, f"{prompt} · seed {int(seed)}"), *(kept or [])][:HISTORY]


def example_pictures() -> list[Image.Image]:
    """Scenes of the shapes world to click at, sharper than the model will see them."""
    return [Image.fromarray(render(corpus_scene(0, index)[0], 256)) for index in SCENES]


def header(checkpoint: str | None) -> str:
    colors = ("red", "blue", "green", "yellow", "purple")
    icons = "".join(
        f'<svg viewBox="0 0 24 24" fill="rgb{COLORS[color]}" aria-hidden="true">{shape}</svg>'
        for color, shape in zip(colors, SHAPES.values(), strict=True)
    )
    name = "the small shapes-world model of the package" if checkpoint is None else f"<code>{checkpoint}</code>"
    return (
        f'<div class="masthead"><div class="icons">{icons}</div><h1>IOMM draws</h1>'
        "<p>It learned to draw from <b>pictures without captions</b>; captioned ones then taught it words.<br>"
        f"Running {name}.</p></div>"
    )


def build(checkpoint: str | None = None, device: str | None = None) -> gr.Blocks:
    r"""
    Loads the model and builds the page.

    Args:
        checkpoint (`str`, *optional*): A pipeline folder or Hub id. Defaults to the tiny model of the package.
        device (`str`, *optional*): Such as `"cpu"`. Defaults to a GPU, if there is one.

    Returns:
        `gradio.Blocks`, to be launched with [`launch_options`].

    Raises:
        `OSError`: there is no such checkpoint.
    """
    pipeline = model.load(checkpoint, device)
    notes = SHIPPED_NOTES if checkpoint is None else {}
    # One model, so one group: whoever draws, edits or asks waits for whoever came before.
    shared: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    examples = example_pictures()

    def note(tab: str):
        if tab in notes:
            gr.Markdown(notes[tab], elem_classes="note")

    def settings() -> tuple[gr.Number, gr.Checkbox, gr.Slider, gr.Slider]:
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=120)
            fresh = gr.Checkbox(True, label="A new one each time", min_width=120, container=True)
        steps = gr.Slider(1, model.MAX_STEPS, 30, step=1, label="Steps", info="From noise to picture.")
        guidance = gr.Slider(1, model.MAX_GUIDANCE, 3.0, step=0.1, label="Guidance", info="1 turns it off.")
        return seed, fresh, steps, guidance

    def upload(label: str = "Picture") -> gr.Image:
        image = gr.Image(
            label=label, type="filepath", image_mode=None, format="png", height=300, elem_classes="pixels"
        )
        checked = image.upload(check_upload, image, preprocess=False, **private)
        checked.failure(lambda: None, None, image, **private)
        gr.Examples([[example] for example in examples], image, label="Or one of these", api_visibility="private")
        return image

    def picture(label: str, *classes: str, **options: Any) -> gr.Image:
        return gr.Image(
            label=label,
            type="filepath",
            format="png",
            interactive=False,
            elem_classes=["pixels", *classes],
            buttons=["download", "fullscreen"],
            **options,
        )

    def buttons(label: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
        with gr.Row():
            run, stop = gr.Button(label, variant="primary", scale=3), gr.Button("Stop", min_width=80)
        return run, stop, gr.HTML(elem_classes="status")

    with gr.Blocks(
        title="IOMM draws", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 3, KEPT_SECONDS)
    ) as page:
        gr.HTML(header(checkpoint))

        with gr.Tab("Draw", id="draw"):
            with gr.Row():
                with gr.Column(scale=5):
                    prompt = gr.Textbox(
                        PROMPTS[1],
                        label="What to draw",
                        lines=1,  # so that Enter draws
                        max_lines=4,
                        max_length=model.MAX_TEXT,
                        autofocus=True,
                    )
                    run, stop, status = buttons("Draw")
                    gr.Examples([[text] for text in PROMPTS], prompt, label="Try", api_visibility="private")
                    with gr.Accordion("Settings", open=False):
                        seed, fresh, steps, guidance = settings()
                        size = gr.Slider(
                            pipeline.size_multiple,
                            model.MAX_SIZE * pipeline.resolution,
                            pipeline.resolution,
                            step=pipeline.size_multiple,
                            label="Size, px",
                            info=f"The model was trained at {pipeline.resolution}.",
                        )
                    note("draw")
                with gr.Column(scale=5):
                    result = picture("Picture", height=400)
            gr.Markdown("Drawn by this model: a few chosen ones, then yours." if notes else "Drawn here.")
            history = gr.Gallery(
                welcome(checkpoint),
                label="Drawn by this model",
                show_label=False,
                type="filepath",
                format="png",
                columns=8,
                height="auto",
                object_fit="contain",
                interactive=False,
                elem_classes=["pixels", "drawn"],
                buttons=["download", "fullscreen"],
            )
            begun = gr.on(
                [run.click, prompt.submit], None, [seed, fresh], seed, js=NEXT_SEED, api_visibility="private"
            )
            drawn = begun.then(
                draw,
                [prompt, seed, size, steps, guidance],
                result,
                api_name="draw",
                show_progress_on=status,
                **shared,
            )
            drawn.success(keep, [result, prompt, seed, history], history, **private)
            stop.click(None, cancels=drawn, api_visibility="private")

        with gr.Tab("Edit", id="edit"), gr.Row():
            with gr.Column(scale=5):
                edit_source = source = upload()
                instruction = gr.Textbox(
                    INSTRUCTIONS[0],
                    label="What to change",
                    info="Left empty, the picture is varied.",
                    max_length=model.MAX_TEXT,
                )
                run, stop, status = buttons("Change it")
                gr.Examples([[text] for text in INSTRUCTIONS], instruction, label="Try", api_visibility="private")
                with gr.Accordion("Settings", open=False):
                    seed, fresh, steps, guidance = settings()
            with gr.Column(scale=5):
                result = picture("Result", height=400)
                slider = gr.ImageSlider(
                    label="Before and after",
                    format="png",
                    height=400,
                    visible=False,
                    interactive=False,
                    elem_classes=["pixels", "compared"],
                    buttons=["download", "fullscreen"],
                )
                note("edit")
            begun = gr.on(
                [run.click, instruction.submit], None, [seed, fresh], seed, js=NEXT_SEED, api_visibility="private"
            ).then(lambda: (gr.update(visible=True), gr.update(visible=False)), None, [result, slider], **private)
            edited = begun.then(
                edit,
                [source, instruction, seed, steps, guidance],
                result,
                api_name="edit",
                preprocess=False,
                show_progress_on=status,
                **shared,
            )
            edited.success(compare, [source, result], [slider, result], preprocess=False, **private)
            stop.click(None, cancels=edited, api_visibility="private")

        with gr.Tab("Ask", id="ask"), gr.Row():
            with gr.Column(scale=5):
                ask_source = source = upload()
            with gr.Column(scale=5):
                question = gr.Textbox(QUESTIONS[0], label="Question", max_length=model.MAX_TEXT)
                run, stop, status = buttons("Ask")
                gr.Examples([[text] for text in QUESTIONS], question, label="Try", api_visibility="private")
                said = gr.Textbox(label="Answer", interactive=False, lines=3, elem_classes="answer", buttons=["copy"])
                note("ask")
            asked = gr.on(
                [run.click, question.submit],
                ask,
                [source, question],
                said,
                api_name="ask",
                preprocess=False,
                show_progress_on=status,
                **shared,
            )
            stop.click(None, cancels=asked, api_visibility="private")

        with gr.Tab("How it learns", id="learn"):
            gr.HTML(
                '<div class="method"><span>A picture, in patches</span><span>What the MLLM still sees</span>'
                "<span>What the generator makes of it</span></div>"
            )
            sheet = picture("The method in one picture", "sheet", show_label=False, container=False)
            with gr.Row():
                with gr.Column(scale=5):
                    share = gr.Slider(0, model.MAX_MASK_RATIO, 0.5, step=0.05, label="Share to hide")
                    counted = gr.Markdown(elem_classes="counted")
                    run, stop, status = buttons("Let it draw")
                    gr.Markdown(
                        "In stage 1 this is all there is: pictures, patches hidden at random, and a loss between what the"
                        " generator draws and the whole picture. The language model stays frozen; a small adapter and the"
                        " generator learn. It looks at the whole picture before tokens are hidden, so a token that is left"
                        " may know a little of its neighbours."
                    )
                    note("learn")
                with gr.Column(scale=5):
                    source = upload("Your picture")
                    seed = gr.Number(LEARN_SEED, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            mask_inputs, mask_outputs = [source, share, seed], [sheet, counted]
            learned = gr.on(
                [run.click, share.release],
                learn,
                mask_inputs,
                sheet,
                api_name="learn",
                preprocess=False,
                show_progress_on=status,
                trigger_mode="always_last",
                **shared,
            )
            gr.on(
                [share.change, source.change, seed.change],
                show_mask,
                mask_inputs,
                mask_outputs,
                preprocess=False,
                trigger_mode="always_last",
                **private,
            )
            stop.click(None, cancels=learned, api_visibility="private")

        gr.Markdown(ABOUT, elem_classes="about")
        # Not as the components' values, which would be defaults of the API.
        page.load(lambda: examples[:3], None, [source, edit_source, ask_source], **private)
    page.queue(max_size=QUEUE, default_concurrency_limit=4)
    return page


def welcome(checkpoint: str | None) -> list[tuple[str, str]] | None:
    """Pictures that the shipped model drew, so that the page does not begin empty: `<seed> <prompt>.png`."""
    if checkpoint is not None:
        return None
    files = sorted((HERE / "pictures").glob("*.png"))
    return [(str(file), "{1} · seed {0}".format(*file.stem.split(" ", 1))) for file in files]


def launch_options() -> dict[str, Any]:
    """How the page is launched, here and on a Space: its looks, its limits, and nothing that phones home."""
    neutral = gr.themes.colors.slate
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=neutral,
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {
        "theme": theme,
        "css_paths": [HERE / "page.css"],
        "max_file_size": MAX_BYTES,
        "app_kwargs": {"lifespan": sweeping},
        "mcp_server": find_spec("mcp") is not None,
        "run_history": False,
        "footer_links": ["api", "gradio"],
        "ssr_mode": False,
        "quiet": True,
    }


def serve(checkpoint: str | None = None, device: str | None = None, **options: Any):
    r"""
    Runs the demo until it is stopped.

    Args:
        checkpoint, device: See [`build`].
        options: For `gradio.Blocks.launch`, beside [`launch_options`].
    """
    build(checkpoint, device).launch(**launch_options() | options)
