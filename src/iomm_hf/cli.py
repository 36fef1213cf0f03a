"""The command line `iomm-hf`: one function a subcommand. Heavy imports wait inside, so that help comes at once."""

import io
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .files import write_whole


if TYPE_CHECKING:
    from PIL.Image import Image

    from .hub.publish import Published
    from .pipeline_iomm import IOMMPipeline

app = typer.Typer(help="IOMM for Hugging Face.", no_args_is_help=True, add_completion=False)


def print_version(wanted: bool):
    if wanted:
        typer.echo(metadata.version("iomm-hf"))
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and end.")
    ] = False,
):
    """IOMM: train the drawing half of a unified multimodal model on unlabelled images."""


@app.command()
def estimate(
    preset: Annotated[str, typer.Option(help="tiny, base, large or xl.")] = "base",
    resolution: Annotated[int | None, typer.Option(help="Side of the pictures, px. Default: the preset's.")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="Share of image tokens hidden. Default: preset's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a GPU and forward pass.")] = 16,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    sharding: Annotated[str, typer.Option(help="ddp, or fsdp: trained state shared out.")] = "ddp",
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "bf16",
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    ema: Annotated[bool, typer.Option(help="Hold averaged weights.")] = True,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes an optimizer step.")] = 1,
    cached_latents: Annotated[bool, typer.Option(help="Latents were computed before.")] = False,
    cached_vision_tokens: Annotated[bool, typer.Option(help="Image tokens were computed before.")] = False,
    lora_rank: Annotated[
        int | None, typer.Option(help="A LoRA of this rank on the generator, not all weights.")
    ] = None,
    images: Annotated[
        int, typer.Option(help="Samples of the run: 10 epochs of 11M, as the paper seems to.")
    ] = 110_000_000,
    peak_tflops: Annotated[float, typer.Option(help="Peak of one GPU, TFLOP/s (989: H100, bf16 dense).")] = 989.0,
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak that is reached (0.22: seen on an H200).")
    ] = 0.22,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
):
    """What training a preset costs: weights, FLOPs, memory, images/s and GPU hours."""
    logging.disable(logging.WARNING)
    from .cost import estimate_training

    try:
        cost = estimate_training(
            preset,
            resolution,
            mask_ratio,
            batch_size=batch_size,
            gpus=gpus,
            sharding=sharding,  # type: ignore[arg-type]  # checked there
            mixed_precision=mixed_precision,  # type: ignore[arg-type]
            optimizer=optimizer,  # type: ignore[arg-type]
            ema=ema,
            gradient_checkpointing=gradient_checkpointing,
            gradient_accumulation=gradient_accumulation,
            cached_latents=cached_latents,
            cached_vision_tokens=cached_vision_tokens,
            lora_rank=lora_rank,
            images=images,
            peak_tflops=peak_tflops,
            utilisation=utilisation,
        )
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    finally:
        logging.disable(logging.NOTSET)
    if as_json:
        typer.echo(json.dumps(asdict(cost), indent=2))
        return

    def table(title: str, rows: dict[str, int], unit: float, name: str):
        typer.echo(f"{title} ({name})")
        for part, value in rows.items():
            typer.echo(f"  {part:<18}{value / unit:>12,.3f}")
        typer.echo(f"  {'total':<18}{sum(rows.values()) / unit:>12,.3f}")

    table("Weights", cost.weights, 1e9, "billions")
    table("FLOPs per sample, forward and backward", cost.flops, 1e12, "TFLOP")
    table(f"Memory per GPU at batch {cost.batch_size}", cost.memory, 1e9, "GB")
    each = {kind: size / 1e9 for kind, size in cost.activations_per_sample.items()}
    typer.echo(f"Activations per sample: {each['plain']:.3f} GB, checkpointed {each['checkpointed']:.3f} GB")
    for size, batches in cost.largest_batch.items():
        typer.echo(f"Largest batch on {size} GB: {batches['plain']}, checkpointed {batches['checkpointed']}")
    typer.echo(
        f"At {utilisation:.0%} of {peak_tflops:g} TFLOP/s, {gpus} GPU(s): {cost.images_per_second:,.1f} images/s;"
        f" {images:,} images take {cost.gpu_hours:,.0f} GPU hours"
    )
    typer.echo("Counted, not measured; what one H200 took beside its estimate is in benchmarks/README.md.")


@app.command()
def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of any diffusers pipeline. Default: the tiny model.")
    ] = None,
    benchmark: Annotated[
        str, typer.Option(help="geneval, dpg, wise (legacy), wise-verified, imgedit or shapes.")
    ] = "shapes",
    output: Annotated[Path | None, typer.Option(help="The run's folder. Default: outputs/evaluate/BENCHMARK.")] = None,
    step: Annotated[str, typer.Option(help="generate, score or both.")] = "both",
    pictures: Annotated[
        Path | None, typer.Option(help="Score this folder, in the benchmark's official layout; draw nothing.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the checkpoint on the Hub.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to image. Default: the pipeline's own.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Height, px. Default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Width, px. Default: the pipeline's own.")] = None,
    argument: Annotated[
        list[str], typer.Option(help="NAME=VALUE of another argument of the pipeline's call; may be repeated.")
    ] = [],  # noqa: B006  (typer copies it)
    seed: Annotated[
        int | None, typer.Option(help="Of the run; each picture has its own, made of it. Default: 0.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures drawn at a time. Default: 8.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu. Default: the accelerator, if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the pipeline: float32, bfloat16 or float16. Default: float32.")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="Whether weights are averaged. Default: as its run says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many items, to try it out; the result is marked.")] = None,
    rewritten: Annotated[
        Path | None, typer.Option(help="JSON lines of item and prompt that replace the prompts; the result says so.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the authors' files, in place of fetching.")] = None,
    detector: Annotated[str | None, typer.Option(help="GenEval's Mask2Former. Default: see the README.")] = None,
    detector_revision: Annotated[str | None, typer.Option(help="Its commit on the Hub.")] = None,
    clip: Annotated[str | None, typer.Option(help="GenEval's CLIP. Default: see the README.")] = None,
    clip_revision: Annotated[str | None, typer.Option(help="Its commit on the Hub.")] = None,
    judge: Annotated[str | None, typer.Option(help="The judge's model; dpg, wise and imgedit need one.")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible address. Without: a transformers model that runs here.")
    ] = None,
    judge_revision: Annotated[
        str | None, typer.Option(help="Commit of a judge that runs here; of a served one, for the record.")
    ] = None,
    judge_option: Annotated[
        list[str], typer.Option(help="NAME=VALUE: workers, max_retries, requests_per_minute, max_tokens, ...")
    ] = [],  # noqa: B006
    wording: Annotated[
        Path | None, typer.Option(help="What the judge is asked, in place of the authors' words.")
    ] = None,
    unreadable: Annotated[str, typer.Option(help="Answers that cannot be read: error, or lowest score.")] = "error",
    max_requests: Annotated[int | None, typer.Option(help="Refuse to send more requests than these.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Of a million tokens read, to say what it costs.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Of a million tokens written.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a served judge is asked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
):
    """Score a pipeline on a benchmark. Ends with 1 and no number where pictures or answers are missing, with 2 for bad input."""
    with refusals():
        from .evaluation.harness import EvaluationConfig
        from .evaluation.harness import evaluate as run
        from .evaluation.report import write_report
        from .evaluation.results import Incomplete

        models = {"detector": detector, "clip": clip}
        sampling = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
        prices = (price_in, price_out)
        if (price_in is None) != (price_out is None):
            raise ValueError("--price-in and --price-out go together.")
        config = EvaluationConfig(
            benchmark=benchmark,
            output=output or Path("outputs/evaluate", benchmark),
            checkpoint=checkpoint,
            revision=revision,
            pictures=pictures,
            step=step,
            arguments={**sampling, **named_values("--argument", argument)},
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            ema=ema,
            limit=limit,
            rewritten=rewritten,
            data=data,
            detector_revision=detector_revision,
            clip_revision=clip_revision,
            judge=judge,
            judge_url=judge_url,
            judge_revision=judge_revision,
            judge_options=named_values("--judge-option", judge_option),
            wording=wording,
            unreadable=unreadable,
            max_requests=max_requests,
            prices=None if price_in is None else prices,  # type: ignore[arg-type]
            **{name: value for name, value in models.items() if value is not None},  # type: ignore[arg-type]
        )

        def confirm(cost: str) -> bool:
            typer.echo(cost, err=True)
            if not yes and not sys.stdin.isatty():
                raise ValueError("Nobody is there to say yes to that; give --yes.")
            return yes or typer.confirm("Go on?", err=True)

        try:
            done = run(config, confirm)
        except Incomplete as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from None
        if done is None:
            return
        result, file = done
        report = write_report([file], file.parent)
    typer.echo(json.dumps(result, indent=2) if as_json else report)
    if not as_json:
        typer.echo(f"Wrote {file} and a report beside it")


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="result.json files of `iomm-hf evaluate`.")],
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("outputs/report"),
    name: Annotated[list[str], typer.Option(help="What to call each result, in order; may be repeated.")] = [],  # noqa: B006
):
    """Compare results with each other and with the paper's rows: a table, plots, and sheets of failures."""
    with refusals():
        from .evaluation.report import write_report

        typer.echo(write_report(results, output, name or None))
    typer.echo(f"Wrote {output / 'report.md'}" + (" and its pictures" if find_spec("matplotlib") is not None else ""))


def named_values(option: str, texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it can be, and text otherwise."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{option} takes NAME=VALUE, got {text!r}.")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


CheckpointOption = Annotated[
    str | None, typer.Option(help="Pipeline folder or Hub id. Default: the tiny model that comes with the package.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Such as cuda or cpu. Default: the accelerator, if there is one.")
]
OutputOption = Annotated[
    Path, typer.Option(help="Picture to write, in the format of its ending; several get -0, -1, ... before it.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the first picture; each further one counts on.")]
StepsOption = Annotated[int, typer.Option(help="Steps from noise to image.")]
GuidanceOption = Annotated[float, typer.Option(help="Strength of guidance; 1 turns it off and halves the cost.")]
HeightOption = Annotated[int | None, typer.Option(help="Height, px. Default: that of the model's training.")]
WidthOption = Annotated[int | None, typer.Option(help="Width, px. Default: that of the model's training.")]
NumberOption = Annotated[int, typer.Option(help="Pictures for each prompt.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several prompts make one batch.")],
    checkpoint: CheckpointOption = None,
    output: OutputOption = Path("picture.png"),
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    steps: StepsOption = 30,
    guidance_scale: GuidanceOption = 3.0,
    height: HeightOption = None,
    width: WidthOption = None,
    num_images: NumberOption = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
):
    """Draw pictures from text. Ends with 2 for input that cannot be used, with 1 for files that cannot be written."""
    settings = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    draw(prompts, None, checkpoint, output, overwrite, seed, num_images, device, as_json, settings)


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="Picture to change.")],
    instruction: Annotated[str | None, typer.Argument(help="What to change. Default: the picture is varied.")] = None,
    checkpoint: CheckpointOption = None,
    output: OutputOption = Path("edited.png"),
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    steps: StepsOption = 30,
    guidance_scale: GuidanceOption = 3.0,
    image_guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of the picture, apart from the instruction's. Default: the same.")
    ] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_images: NumberOption = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
):
    """Change a picture as told, or vary it. Ends with 2 for input that cannot be used, with 1 for files that cannot be written."""
    settings = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    settings["image_guidance_scale"] = image_guidance_scale
    draw([instruction], image, checkpoint, output, overwrite, seed, num_images, device, as_json, settings)


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="Picture to look at.")],
    question: Annotated[str | None, typer.Argument(help="What to answer. Default: describe the picture.")] = None,
    checkpoint: CheckpointOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which the answer is cut off.")] = 128,
    device: DeviceOption = None,
    as_json: JsonOption = False,
):
    """Ask the frozen MLLM about a picture. Ends with 2 for input that cannot be used."""
    with refusals():
        picture = open_picture(image)
        pipe = load_pipeline(checkpoint, device)
        if question is None:
            answer = pipe.describe(picture, max_new_tokens=max_new_tokens)
        else:
            answer = pipe.ask(picture, question, max_new_tokens=max_new_tokens)
    if as_json:
        typer.echo(json.dumps({"image": str(image), "question": question, "answer": answer}, indent=2))
    else:
        typer.echo(answer)


@contextmanager
def refusals():
    """One line and exit code 2 for what the caller gave; libraries' warnings stay out of the way."""
    from .hub import UNREACHED

    logging.disable(logging.WARNING)
    try:
        yield
    except (ValueError, OSError, ImportError) as error:  # ImportError: an extra that is not installed, by name
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except UNREACHED as error:
        typer.echo(f"Error: the Hub was not reached: {error}. Check the connection and HF_ENDPOINT.", err=True)
        raise typer.Exit(2) from None
    finally:
        logging.disable(logging.NOTSET)


def load_pipeline(checkpoint: str | None, device: str | None) -> "IOMMPipeline":
    from diffusers.utils.logging import disable_progress_bar as quieten_diffusers
    from transformers.utils.logging import disable_progress_bar as quieten_transformers

    from .devices import move
    from .pipeline_iomm import IOMMPipeline
    from .shipped import shipped_model

    quieten_diffusers()  # what loads in a second needs no bars
    quieten_transformers()
    try:
        pipe = IOMMPipeline.from_pretrained(checkpoint or shipped_model())
    except OSError as error:  # the Hub's client does not always say which id it misses
        raise ValueError(f"--checkpoint {checkpoint}: {error}") from error
    pipe = move(pipe, device)
    pipe.set_progress_bar_config(disable=None)  # none where nobody watches
    return pipe


def open_picture(path: Path) -> "Image":
    """A picture from a stranger's file, upright and in RGB."""
    from .data.images import BadImage, load_image

    try:
        return load_image(path.read_bytes())
    except BadImage as error:
        raise ValueError(f"{path}: {error}") from error


def draw(
    prompts: Sequence[str | None],
    image: Path | None,
    checkpoint: str | None,
    output: Path,
    overwrite: bool,
    seed: int,
    num_images: int,
    device: str | None,
    as_json: bool,
    settings: dict[str, Any],
):
    """The common part of `generate` and `edit`: draws, writes and reports."""
    import torch
    from PIL import Image

    from .data.images import resize_and_crop

    count = len(prompts) * num_images
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    with refusals():
        Image.init()
        picture_format = Image.registered_extensions().get(output.suffix.lower())
        if picture_format not in Image.SAVE:
            raise ValueError(
                f"--output {output}: no picture is written as {output.suffix!r}; use .png, .jpg or .webp."
            )
        check_free(paths, overwrite)
        if not output.absolute().parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.absolute().parent}.")
        picture = None if image is None else open_picture(image)
        pipe = load_pipeline(checkpoint, device)
        if picture is not None:  # as in training, so that nothing is squashed
            picture = resize_and_crop(
                picture, (settings["width"] or pipe.resolution, settings["height"] or pipe.resolution)
            )
        options = {("num_inference_steps" if name == "steps" else name): value for name, value in settings.items()}
        pictures = pipe(
            list(prompts),
            image=None if picture is None else [picture],
            num_images_per_prompt=num_images,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],  # the same on every device
            return_dict=False,
            **options,
        )[0]
        check_free(paths, overwrite)
    for path, drawn in zip(paths, pictures, strict=True):
        encoded = io.BytesIO()
        try:
            drawn.save(encoded, picture_format)
            write_whole(path, encoded.getvalue())
        except OSError as error:
            typer.echo(f"Error: {path} could not be written: {error}", err=True)
            raise typer.Exit(1) from None
    if not as_json:
        for path in paths:
            typer.echo(f"Wrote {path}")
        return
    report = {
        "checkpoint": checkpoint,
        "image": None if image is None else str(image),
        **settings | {"height": pictures[0].height, "width": pictures[0].width},
        "pictures": [
            {"path": str(path), "prompt": prompts[i // num_images], "seed": seed + i} for i, path in enumerate(paths)
        ],
    }
    typer.echo(json.dumps(report, indent=2))


def check_free(paths: list[Path], overwrite: bool):
    taken = [str(path) for path in paths if path.exists()]
    if taken and not overwrite:
        raise ValueError(f"{', '.join(taken)} exists; choose another --output or give --overwrite.")


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, with its log.jsonl.")],
    output: Annotated[Path | None, typer.Option(help="Picture to write. Default: curves.png in that folder.")] = None,
):
    """Draw a run's curves: losses by time and source, gradient norm, learning rate, speed."""
    if find_spec("matplotlib") is None:
        typer.echo("Error: plots need matplotlib, which is not installed: pip install 'iomm-hf[train]'.", err=True)
        raise typer.Exit(2)
    from .evaluation.figures import plot_run

    if not (run / "log.jsonl").is_file():
        typer.echo(f"Error: {run} holds no log.jsonl; give the output_dir of a run.", err=True)
        raise typer.Exit(2)
    output = output or run / "curves.png"
    with refusals():
        plot_run(run, output)
    typer.echo(f"Wrote {output}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Pipeline folder: final, best or checkpoint-* of a run.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")],
    licence: Annotated[
        list[str],
        typer.Option(help="PART=LICENCE, once for each of mllm, adapter, transformer and vae; the Hub's identifiers."),
    ] = [],  # noqa: B006  (typer copies it)
    frozen: Annotated[
        bool,
        typer.Option("--include-frozen/--reference-frozen", help="Upload MLLM and autoencoder, or refer to them."),
    ] = True,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository. Default: the account's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to. Default: main.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Write and check what would be uploaded, and upload nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where that is written. Default: outputs/published/...")] = None,
    prompt: Annotated[list[str], typer.Option(help="What the card's pictures show; may be repeated.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Sampling steps of these pictures.")] = 30,
    run: Annotated[Path | None, typer.Option(help="Folder of the training run, for the card.")] = None,
    score: Annotated[
        list[Path], typer.Option(help="result.json or score.json of this checkpoint, for the card; may be repeated.")
    ] = [],  # noqa: B006
    benchmark: Annotated[
        str | None, typer.Option(help="Data set on the Hub whose leaderboard the score belongs to.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="What to say of the training data.")] = None,
    cost: Annotated[str | None, typer.Option(help="What to say of the cost. Default: the run's own count.")] = None,
    limits: Annotated[str | None, typer.Option(help="What to say of limits, beside the usual.")] = None,
    as_json: JsonOption = False,
):
    """Upload a checkpoint with its model card, and load it back to check."""
    from .hub.publish import PROMPTS
    from .hub.publish import publish as publish_checkpoint

    with refusals():
        wrong = [text for text in licence if "=" not in text]
        if wrong:
            raise ValueError(f"--licence takes PART=LICENCE, such as mllm=apache-2.0, got {wrong[0]!r}.")
        done = publish_checkpoint(
            folder,
            repo_id,
            dict(text.split("=", 1) for text in licence),
            include_frozen=frozen,
            private=private,
            revision=revision,
            dry_run=dry_run,
            output_dir=output,
            prompts=prompt or PROMPTS,
            num_inference_steps=steps,
            run=run,
            score=score,
            benchmark=benchmark,
            data=data,
            cost=cost,
            limits=limits,
        )
    report_published(done, as_json, "it loads and draws as before")


@app.command("publish-space")
def publish_space(
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The Space on the Hub.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Hub id that the Space draws with. Default: the tiny model, which goes along.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new Space. Default: the account's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Write and check what would be uploaded, and upload nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where that is written. Default: outputs/spaces/...")] = None,
    as_json: JsonOption = False,
):
    """Upload the demo as a Space of your own, with the code that it needs."""
    require_gradio()
    from .hub.space import publish_space as publish

    with refusals():
        done = publish(repo_id, checkpoint=checkpoint, private=private, dry_run=dry_run, output_dir=output)
    report_published(done, as_json, "it builds its page and draws")


@app.command()
def demo(
    checkpoint: Annotated[
        str | None,
        typer.Option(
            envvar="IOMM_CHECKPOINT",
            help="Pipeline folder or Hub id. Default: the tiny model that comes with the package.",
        ),
    ] = None,
    device: DeviceOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port to listen at. Default: the first free one from 7860.")] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: JsonOption = False,
):
    """Draw, edit, ask and see how it learns, on a page of your own. Ends with Ctrl-C."""
    require_gradio()
    from .demo.app import build, launch_options

    with refusals():
        page = build(checkpoint, device)
        options = {"server_name": host, "server_port": port, "inbrowser": browser, "prevent_thread_lock": True}
        with redirect_stdout(sys.stderr):  # Gradio tells of its MCP server, however quiet
            _, url, _ = page.launch(**launch_options() | options)
    mcp = f"{url}gradio_api/mcp/" if page.mcp_server else None
    if as_json:
        typer.echo(json.dumps({"url": url, "mcp": mcp, "checkpoint": checkpoint}, indent=2))
    else:
        typer.echo(f"The demo is at {url}" + (f", its MCP server at {mcp}" if mcp else "") + ". Ctrl-C ends it.")
    sys.stdout.flush()  # before the wait
    with redirect_stdout(sys.stderr):
        page.block_thread()


def require_gradio():
    if find_spec("gradio") is None:
        typer.echo("Error: the demo needs Gradio, which is not installed: pip install 'iomm-hf[demo]'.", err=True)
        raise typer.Exit(2)


def report_published(done: "Published", as_json: bool, checked: str):
    """What was written and where it went."""
    files = sorted(path for path in done.folder.rglob("*") if path.is_file())
    if as_json:
        names = [str(path.relative_to(done.folder)) for path in files]
        report = {"repo_id": done.repo_id, "commit": done.commit, "folder": str(done.folder), "files": names}
        typer.echo(json.dumps(report, indent=2))
        return
    for file in files:
        typer.echo(f"{file.stat().st_size:>14,}  {file.relative_to(done.folder)}")
    if done.commit is None:
        typer.echo(f"Dry run: nothing was uploaded. {done.folder} is what would be; {checked}.")
    else:
        typer.echo(f"Published {done.repo_id} at commit {done.commit}; {checked}.")
