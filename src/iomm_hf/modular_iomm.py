"""The pipeline as blocks of diffusers' `ModularPipeline`, to be taken apart, replaced and joined with others.

Three blocks over the same parts: conditions, denoising, decoding. Each runs an `IOMMPipeline` that holds only the parts it
needs, so pictures equal the pipeline's and no convention is written down twice.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModularPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from PIL import Image

from .modeling_iomm import IOMMConditionEncoder
from .pipeline_inputs import as_picture_lists, check_conditions
from .pipeline_iomm import PARTS, IOMMPipeline, decode_latents
from .processing_iomm import IOMMProcessor


CONDITIONS = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
GUIDANCE = InputParam("guidance_scale", default=3.0, type_hint=float, description="Strength of guidance; 1 is none.")


def parts(components: ModularPipeline, *names: str) -> IOMMPipeline:
    """A pipeline of these components and `None` for the others."""
    every: dict[str, Any] = dict.fromkeys(PARTS)
    return IOMMPipeline(**every | {name: getattr(components, name) for name in names})


class IOMMConditionStep(ModularPipelineBlocks):
    """A text, a reference image or both -> the conditions of both branches of guidance."""

    model_name = "iomm"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("text_encoder", IOMMConditionEncoder), ComponentSpec("processor", IOMMProcessor)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt", type_hint=str, description="What to draw, or with `image` what to change."),
            InputParam("image", type_hint=Image.Image, description="Reference to edit; without a prompt, to vary."),
            InputParam("negative_prompt", type_hint=str, description="What guidance leads away from."),
            GUIDANCE,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name, type_hint=torch.Tensor) for name in CONDITIONS]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipeline = parts(components, "text_encoder", "processor")
        check_conditions(block.prompt, as_picture_lists(block.image), block.negative_prompt)
        conditions = pipeline.encode_prompt(
            prompt=block.prompt,
            image=block.image,
            negative_prompt=block.negative_prompt,
            do_classifier_free_guidance=block.guidance_scale > 1,
        )
        for name, value in zip(CONDITIONS, conditions, strict=True):
            setattr(block, name, value)
        self.set_block_state(state, block)
        return components, state


class IOMMDenoiseStep(ModularPipelineBlocks):
    """Conditions -> latents, from noise."""

    model_name = "iomm"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("transformer"),  # any generator that `generators.py` knows
            ComponentSpec("vae", AutoencoderKL),  # says the latents' shape
            ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("resolution", None, "Default height and width in pixels.")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *(InputParam(name, type_hint=torch.Tensor, required=name == CONDITIONS[0]) for name in CONDITIONS),
            InputParam("height", type_hint=int, description="In pixels; defaults to the config's `resolution`."),
            InputParam("width", type_hint=int, description="In pixels; defaults to the config's `resolution`."),
            InputParam("num_inference_steps", default=30, type_hint=int, description="Steps from noise to image."),
            InputParam("generator", type_hint=torch.Generator, description="Makes the result repeatable."),
            GUIDANCE,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor)]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipeline = parts(components, "transformer", "vae", "scheduler")
        pipeline.set_progress_bar_config(disable=True)
        (block.latents,) = pipeline(
            **{name: getattr(block, name) for name in CONDITIONS},
            height=components.config.resolution if block.height is None else block.height,
            width=components.config.resolution if block.width is None else block.width,
            num_inference_steps=block.num_inference_steps,
            guidance_scale=block.guidance_scale,
            generator=block.generator,
            output_type="latent",
            return_dict=False,
        )
        self.set_block_state(state, block)
        return components, state


class IOMMDecodeStep(ModularPipelineBlocks):
    """Latents -> pictures."""

    model_name = "iomm"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKL)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", type_hint=torch.Tensor, required=True),
            InputParam("output_type", default="pil", type_hint=str, description="`pil`, `np` or `pt`."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", type_hint=list[Image.Image])]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        decoded = decode_latents(components.vae, block.latents)
        block.images = VaeImageProcessor().postprocess(decoded, output_type=block.output_type)
        self.set_block_state(state, block)
        return components, state


class IOMMBlocks(SequentialPipelineBlocks):
    """The three blocks in order; each may be replaced, or others put between them."""

    model_name = "iomm"
    block_classes = [IOMMConditionStep, IOMMDenoiseStep, IOMMDecodeStep]
    block_names = ["condition", "denoise", "decode"]

    @property
    def outputs(self) -> list[Any]:
        return [OutputParam("images", type_hint=list[Image.Image])]


def modular_pipeline(pipeline: IOMMPipeline, blocks: ModularPipelineBlocks | None = None) -> ModularPipeline:
    r"""
    A `ModularPipeline` over the parts of a loaded pipeline, which both then share.

    Args:
        pipeline ([`IOMMPipeline`]): From a folder or the Hub, whose files were checked when it was loaded.
        blocks (`ModularPipelineBlocks`, *optional*, defaults to [`IOMMBlocks`]): What runs.

    Example:

    ```python
    >>> from iomm_hf.modular_iomm import modular_pipeline
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> modular = modular_pipeline(tiny_pipeline())
    >>> modular(prompt="a red circle", num_inference_steps=2, output="images")[0].size
    (64, 64)
    ```
    """
    blocks = blocks or IOMMBlocks()
    modular = blocks.init_pipeline()
    names = {spec.name for spec in blocks.expected_components}
    modular.update_components(
        **{name: part for name, part in pipeline.components.items() if name in names}, resolution=pipeline.resolution
    )
    return modular
