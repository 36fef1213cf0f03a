"""`IOMMPipeline`: text, a reference image or both in, pictures out.

The pipeline knows nothing of token layouts (`processing_iomm`), of what the generator wants (`generators`) or of how
conditions come about (`modeling_iomm`): it encodes both branches of guidance, integrates dx/dt = F from t = 1 to t = 0,
and decodes.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    ZImageTransformer2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image

from .generators import condition_width, latent_multiple, predict_velocity, unwrap
from .integrity import CHECKSUMS, check_files
from .lora import IOMMLoraLoaderMixin
from .modeling_iomm import IOMMConditionEncoder, hash_weight_files, hub_options, resolve_frozen
from .pipeline_inputs import (
    CALLBACK_TENSORS,
    Pictures,
    Prompts,
    Scheduler,
    as_picture_lists,
    check_conditions,
    check_embeds,
    check_finite,
    check_sampling,
    check_scheduler,
)
from .processing_iomm import IOMMProcessor


EXAMPLE = """
        Example:

        ```python
        >>> from iomm_hf.tiny import tiny_pipeline
        >>> pipe = tiny_pipeline()
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe("a red circle left of a blue star", num_inference_steps=2).images[0].size
        (64, 64)
        ```
"""

# Files of a published pipeline that loading needs; nothing that could hold a pickle.
PIPELINE_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", CHECKSUMS]

# What a pipeline folder may hold: an index that names anything else is refused before a class of it is imported.
PARTS: dict[str, tuple[type, ...]] = {
    "text_encoder": (IOMMConditionEncoder,),
    "processor": (IOMMProcessor,),
    "transformer": (FluxTransformer2DModel, ZImageTransformer2DModel, UNet2DConditionModel),
    "vae": (AutoencoderKL,),
    "scheduler": get_args(Scheduler),
}


class IOMMPipeline(DiffusionPipeline, IOMMLoraLoaderMixin):
    r"""
    Draws what a text says, changes an image as told, or varies it.

    Args:
        text_encoder ([`IOMMConditionEncoder`]): The frozen MLLM with its adapter; reads text and images alike.
        processor ([`IOMMProcessor`]): Builds the MLLM's inputs for each use.
        transformer (`FluxTransformer2DModel`, `ZImageTransformer2DModel` or `UNet2DConditionModel`): The generator, which
            predicts the velocity.
        vae (`AutoencoderKL`): Turns latents into pictures; frozen.
        scheduler (`FlowMatchEulerDiscreteScheduler`, `FlowMatchHeunDiscreteScheduler`, `FlowMatchLCMScheduler`,
            `UniPCMultistepScheduler` or `DPMSolverMultistepScheduler`): Steps from noise to image; the last two with
            `prediction_type="flow_prediction"` and `use_flow_sigmas=True`.
        vae_name_or_path (`str`, *optional*): Where the autoencoder is found when a checkpoint leaves it out.
        vae_subfolder (`str`, *optional*): Its folder there.
        vae_revision (`str`, *optional*): The commit it was trained with.
        vae_hash (`str`, *optional*): Hash of its weight files, checked at load.
        resolution (`int`, *optional*): Side of the pictures it was trained on, in pixels; the default size. Without it,
            the autoencoder's `sample_size`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        text_encoder: IOMMConditionEncoder,
        processor: IOMMProcessor,
        # `from_pipe` wants the very classes
        transformer: FluxTransformer2DModel | ZImageTransformer2DModel | UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: Scheduler,
        vae_name_or_path: str | None = None,
        vae_subfolder: str | None = None,
        vae_revision: str | None = None,
        vae_hash: str | None = None,
        resolution: int | None = None,
    ):
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder, processor=processor, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.register_to_config(
            vae_name_or_path=vae_name_or_path,
            vae_subfolder=vae_subfolder,
            vae_revision=vae_revision,
            vae_hash=vae_hash,
            resolution=resolution,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(
        self,
        prompt: Prompts | None = None,
        image: Pictures | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        r"""
        Conditions for both branches of guidance.

        Returns:
            `prompt_embeds` (B, rows, D), its mask (B, rows) or `None`, and the same for the negative branch (`None`
            without guidance), where B counts every picture to draw.
        """
        device = device or self._execution_device
        needs_encoder = prompt_embeds is None or (do_classifier_free_guidance and negative_prompt_embeds is None)
        if needs_encoder and (self.text_encoder is None or self.processor is None):
            raise ValueError(
                "This pipeline has no text_encoder or no processor: give `prompt_embeds` and, with guidance,"
                " `negative_prompt_embeds`."
            )

        if prompt_embeds is None:
            references = as_picture_lists(image)
            prompts: list[Any] = [prompt] if isinstance(prompt, str) else prompt or [None] * len(references or [])
            references = references or [[]] * len(prompts)
            conversations = []
            for text, pictures in zip(prompts, references, strict=True):
                if text is None:
                    conversations.append(self.processor.image_only(*pictures))
                elif pictures:
                    conversations.append(self.processor.edit(text, *pictures))
                else:
                    conversations.append(self.processor.text_to_image(text))
            prompt_embeds, prompt_embeds_mask = self._encode(conversations, device)
        batch_size = len(prompt_embeds)

        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            conversations = [
                self.processor.text_to_image(text) if text.strip() else self.processor.unconditional()
                for text in negatives
            ]
            negative_prompt_embeds, negative_prompt_embeds_mask = self._encode(conversations, device)
            if len(conversations) == 1:  # one wording serves the whole batch
                negative_prompt_embeds = negative_prompt_embeds.expand(batch_size, -1, -1)
                if negative_prompt_embeds_mask is not None:
                    negative_prompt_embeds_mask = negative_prompt_embeds_mask.expand(batch_size, -1)

        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds_mask = None
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        prompt_embeds_mask, negative_prompt_embeds_mask = [
            None if mask is None else mask.to(device, torch.bool).repeat_interleave(num_images_per_prompt, dim=0)
            for mask in (prompt_embeds_mask, negative_prompt_embeds_mask)
        ]
        # One return of plain names: diffusers' pipeline tests read them here and pass them back to `__call__`.
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    def _encode(self, conversations: list, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.text_encoder(**self.processor.encode(conversations).to(device))
        return output.condition, output.condition_mask

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of shape (batch_size, channels, height / f, width / f), or the user's own."""
        shape = (
            batch_size,
            self.vae.config.latent_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
            check_finite("latents", latents)
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for a batch of {batch_size} pictures.")
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels must be divisible by this."""
        return self.vae_scale_factor * latent_multiple(self.transformer, self.vae.config.latent_channels)

    @property
    def resolution(self) -> int:
        """Default height and width, in pixels."""
        return self.config.resolution or self.vae.config.sample_size

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float | None:
        return self._image_guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 or self._image_guidance_scale is not None

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's time of the running step, which diffusers' attention caches read; `None` between pictures."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        image: Pictures | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  (read only; diffusers' signature)
        image_guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw, or with `image` what to change. A list makes a batch.
            image (`PIL.Image.Image` or a list, `np.ndarray` (batch, height, width, 3) or `torch.Tensor` (batch, 3, height,
                width) in [0, 1], *optional*): Reference to edit; without a prompt, to vary. A list has one entry a prompt:
                a picture, a list of several pictures that the prompt speaks of, or `None`. With `None` among the prompts as
                well, one batch mixes drawing, editing and varying.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from. Without one, or where it is
                blank, the unconditional instruction that training used.
            height, width (`int`, *optional*): Size in pixels; defaults to `resolution`.
            num_inference_steps (`int`, *optional*, defaults to 30): Steps from noise to image.
            guidance_scale (`float`, *optional*, defaults to 3.0): Strength of guidance; 1 turns it off and halves the
                cost (neighbours use 3 to 5; the paper gives none). With `image_guidance_scale` that of the text alone.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Pictures for each prompt.
            generator (`torch.Generator` or one per picture, *optional*): Makes the result repeatable.
            latents (`torch.Tensor` of shape `(pictures, channels, height / f, width / f)`, *optional*): Starting noise.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, rows, D)`, *optional*): Conditions of
                [`~IOMMPipeline.encode_prompt`], with `prompt_embeds_mask` (batch_size, rows) where rows are padded;
                likewise `negative_prompt_embeds` and its mask.
            sigmas (`list[float]`, *optional*): Noise levels of the steps, before the scheduler's shift.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): `False` gives a tuple.
            attention_kwargs (`dict`, *optional*): Passed to the transformer, such as a LoRA `scale`, which scales
                the transformer's part of it for this call; `set_adapters` scales both parts.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; what it returns replaces those tensors. Setting `pipe._interrupt = True` stops the drawing.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Which tensors it gets: `"latents"`,
                `"prompt_embeds"`, or `"denoised"`, the clean latents that the step predicts, which
                [`~IOMMPipeline.decode`] makes a preview.
            image_guidance_scale (`float`, *optional*): Strength of the reference in an edit, apart from the text's, by
                InstructPix2Pix's three branches (negative, picture alone, both), at 3/2 of the cost. Without it both
                are guided by `guidance_scale`, which equals giving the same value twice.
            guidance_rescale (`float`, *optional*, defaults to 0.0): How far, from 0 to 1, the guided velocity's standard
                deviation goes back to the unguided one's (Lin et al., arXiv 2305.08891, section 3.4).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): Guides only those steps whose
                share of the way, 0 for the first, is in [start, end) (Kynkäänniemi et al., arXiv 2404.07724); the others
                cost half.

        Returns:
            [`ImagePipelineOutput`] with `images`, or a tuple.

        Raises:
            `ValueError`: no autoencoder or generator, sizes not divisible, no input, blank, empty or not finite input, inputs that do not fit together,
                or a scheduler that does not integrate a velocity.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if self.vae is None or self.transformer is None:
            raise ValueError(
                "This pipeline has no vae or no transformer. One whose vae lies elsewhere on the Hub wants it as `vae=`, as its"
                " card says; iomm_hf.IOMMPipeline.from_pretrained fetches it by itself."
            )
        height = self.resolution if height is None else height
        width = self.resolution if width is None else width
        references = as_picture_lists(image)
        channels = condition_width(self.transformer)
        if prompt_embeds is not None:
            check_embeds("prompt_embeds", prompt_embeds, prompt_embeds_mask, channels)
        if negative_prompt_embeds is not None:
            check_embeds("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_embeds_mask, channels)
        check_conditions(
            prompt, references, negative_prompt, prompt_embeds, negative_prompt_embeds, image_guidance_scale
        )
        check_scheduler(self.scheduler, sigmas)
        check_sampling(
            height,
            width,
            self.size_multiple,
            num_inference_steps,
            callback_on_step_end_tensor_inputs,
            guidance_scale,
            image_guidance_scale,
            guidance_rescale,
            guidance_interval,
            num_images_per_prompt,
            sigmas,
        )
        self._guidance_scale = guidance_scale
        self._image_guidance_scale = image_guidance_scale
        self._guidance_rescale = guidance_rescale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        # 1. Conditions
        prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask = self.encode_prompt(
            prompt=prompt,
            image=references,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask,
            device=device,
        )
        batch_size = len(prompt_embeds)
        dtype = self.transformer.dtype

        # 2. Noise and steps
        latents = self.prepare_latents(batch_size, height, width, torch.float32, device, generator, latents)
        if isinstance(self.scheduler, FlowMatchHeunDiscreteScheduler | DPMSolverMultistepScheduler):
            self.scheduler.set_timesteps(num_inference_steps, device=device)  # these space their steps themselves
        else:
            # Without explicit sigmas the scheduler would spend its last step at 0.001 and apply its shift twice.
            if sigmas is None:
                sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
            self.scheduler.set_timesteps(sigmas=np.array(sigmas), device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # Those that add noise on the way draw it from the caller's generators.
        step_kwargs = {} if isinstance(self.scheduler, UniPCMultistepScheduler) else {"generator": generator}

        # 3. All branches of guidance run as one batch, the conditional one last, as diffusers' caches expect.
        condition, condition_mask = prompt_embeds, prompt_embeds_mask
        if image_guidance_scale is not None:
            image_embeds, image_embeds_mask, *_ = self.encode_prompt(
                image=references,
                do_classifier_free_guidance=False,
                num_images_per_prompt=num_images_per_prompt,
                device=device,
            )
            condition, condition_mask = join_conditions(image_embeds, image_embeds_mask, condition, condition_mask)
        if negative_prompt_embeds is not None:
            condition, condition_mask = join_conditions(
                negative_prompt_embeds, negative_prompt_embeds_mask, condition, condition_mask
            )
        branches = len(condition) // batch_size

        # 4. From noise to image
        denoiser = unwrap(self.transformer)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                in_interval = guidance_interval[0] <= i / len(timesteps) < guidance_interval[1]
                guided = branches > 1 and in_interval and self.do_classifier_free_guidance  # a callback may end it
                rows = len(condition) if guided else batch_size
                inputs = torch.cat([latents] * branches) if guided else latents
                time = t / self.scheduler.config.num_train_timesteps
                # diffusers' caches, such as First Block Cache, want each call of the denoiser named; what one of the two
                # holds does not fit the other's batch.
                name = "cond_uncond" if guided else "cond"
                with denoiser.cache_context(name) if isinstance(denoiser, CacheMixin) else nullcontext():
                    velocity = predict_velocity(
                        self.transformer,
                        inputs.to(dtype),
                        time.expand(rows).to(dtype),
                        condition[-rows:].to(dtype),
                        None if condition_mask is None else condition_mask[-rows:],
                        self.attention_kwargs,
                    ).float()
                if guided:
                    velocity = guide(
                        velocity.chunk(branches), self.guidance_scale, self.image_guidance_scale, self.guidance_rescale
                    )
                before = latents
                latents = self.scheduler.step(velocity, t, latents, return_dict=False, **step_kwargs)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": condition[-batch_size:],
                        "denoised": before - time * velocity,
                    }
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, chosen)
                    latents = changed.pop("latents", latents)
                    if "prompt_embeds" in changed:
                        replaced = changed.pop("prompt_embeds")
                        if replaced.shape != (wanted := tensors["prompt_embeds"].shape):
                            raise ValueError(
                                f"The callback returned prompt_embeds of the shape {tuple(replaced.shape)}, expected"
                                f" {tuple(wanted)}. To end guidance, set `pipe._guidance_scale = 1`, and where there is one"
                                " `pipe._image_guidance_scale = None`; the branches follow."
                            )
                        condition = torch.cat([condition[:-batch_size], replaced])
                progress_bar.update()
        self._current_timestep = None

        # 5. Pictures
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    __call__.__doc__ = (__call__.__doc__ or "") + EXAMPLE

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
        r"""
        Pictures of latents, as at the end of a drawing; in a callback, a preview of where it leads.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, height / f, width / f)`): Scaled latents, such as a
                callback's `denoised`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` (batch_size, height, width, 3) or `"pt"`
                (batch_size, 3, height, width), the last two in [0, 1].

        Example:

        ```python
        >>> from iomm_hf.tiny import tiny_pipeline
        >>> pipe = tiny_pipeline()
        >>> pipe.set_progress_bar_config(disable=True)
        >>> def preview(pipe, step, timestep, tensors):
        ...     print(step, pipe.decode(tensors["denoised"])[0].size)
        ...     return {}
        >>> _ = pipe(
        ...     "a red circle",
        ...     num_inference_steps=2,
        ...     callback_on_step_end=preview,
        ...     callback_on_step_end_tensor_inputs=["denoised"],
        ... )
        0 (64, 64)
        1 (64, 64)
        ```
        """
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)

    @torch.no_grad()
    def ask(
        self, image: Pictures, question: str | list[str], max_new_tokens: int = 128, **generate_kwargs
    ) -> str | list[str]:
        r"""
        What the frozen MLLM answers about a picture: exactly what it answered before any training of the generator.

        Args:
            image (`PIL.Image.Image` or a list, `np.ndarray` (batch, height, width, 3) or `torch.Tensor` (batch, 3, height,
                width) in [0, 1]): The picture. A list has one entry a question: a picture, or a list of several.
            question (`str` or `list[str]`): What to answer. One question is put to all pictures.
            max_new_tokens (`int`, *optional*, defaults to 128): Tokens after which an answer is cut off.
            generate_kwargs (*optional*): Passed to the MLLM's `generate`; without any, the answer is the greedy one.

        Returns:
            `str` for one picture and one question that are no lists, otherwise `list[str]`.

        Raises:
            `ValueError`: a missing picture, a blank question, numbers that differ, or more tokens than the MLLM takes.

        Example:

        ```python
        >>> from PIL import Image
        >>> from iomm_hf.tiny import tiny_pipeline
        >>> answer = tiny_pipeline().ask(Image.new("RGB", (64, 64)), "What is it?", max_new_tokens=4)
        >>> isinstance(answer, str)  # its weights are random: so is what it says
        True
        ```
        """
        if self.text_encoder is None or self.processor is None:
            raise ValueError("This pipeline has no text_encoder or no processor, which answer questions.")
        pictures = as_picture_lists(image)
        if pictures is None or not all(pictures):
            raise ValueError("Give an `image`, or a list with at least one picture for each question.")
        questions = [question] * len(pictures) if isinstance(question, str) else question
        if not isinstance(questions, list) or not all(isinstance(text, str) and text.strip() for text in questions):
            raise ValueError(f"`question` must be a str or a list of str, none of them blank, got {question!r}.")
        if len(questions) != len(pictures):
            raise ValueError(f"`question` has {len(questions)} entries, `image` has {len(pictures)}.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if (several := generate_kwargs.get("num_return_sequences", 1)) != 1:
            raise ValueError(f"A question has one answer, got num_return_sequences={several}: ask it several times.")

        turns = [self.processor.understand(text, *some) for text, some in zip(questions, pictures, strict=True)]
        inputs = self.processor.encode(turns).to(self._execution_device)
        length = inputs["input_ids"].shape[1]
        limit = self.text_encoder.config.get_text_config().max_position_embeddings
        if length + max_new_tokens > limit:
            raise ValueError(
                f"{length} tokens of question and picture and max_new_tokens={max_new_tokens} are more than the {limit}"
                " that the MLLM takes. Shorten the question or the answer."
            )
        # Offloading moves the encoder where its `forward` is called; `generate` is another door.
        generate = apply_forward_hook(type(self.text_encoder).generate)
        registry = getattr(self.text_encoder, "_diffusers_hook", None)
        group_offload = None if registry is None else registry.get_hook("group_offloading")
        options = {**inputs, "do_sample": False, "max_new_tokens": max_new_tokens} | generate_kwargs
        if group_offload is not None:
            _, options = group_offload.pre_forward(self.text_encoder, **options)
        try:
            answers = generate(self.text_encoder, **options)
        finally:
            if group_offload is not None:
                group_offload.post_forward(self.text_encoder, None)
        self.maybe_free_model_hooks()
        texts = self.processor.tokenizer.batch_decode(answers[:, length:], skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        return texts[0] if isinstance(image, Image.Image) and isinstance(question, str) else texts

    def describe(self, image: Pictures, **kwargs) -> str | list[str]:
        r"""
        The frozen MLLM's caption of a picture, or of each in a batch; arguments as those of [`~IOMMPipeline.ask`].

        Example:

        ```python
        >>> from PIL import Image
        >>> from iomm_hf.tiny import tiny_pipeline
        >>> captions = tiny_pipeline().describe([Image.new("RGB", (64, 64))] * 2, max_new_tokens=4)
        >>> len(captions)
        2
        ```
        """
        return self.ask(image, "Describe the image.", **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, include_frozen: bool = True, **kwargs):
        r"""
        Writes the pipeline folder. With `include_frozen=False` MLLM and autoencoder stay out, and loading fetches them
        from where `text_encoder.config.mllm_name_or_path` and `vae_name_or_path` say.

        Raises:
            `ValueError`: `include_frozen=False` without both references or with options besides `max_shard_size` and
                `variant`, or LoRAs are loaded.
        """
        if USE_PEFT_BACKEND and any(self.get_list_adapters().values()):
            raise ValueError(
                f"LoRAs are loaded ({self.get_list_adapters()}), which would be torn apart in the folder. Save them with"
                " save_lora_weights and call unload_lora_weights() first; to keep what they do, fuse_lora() before that."
            )
        if include_frozen:
            return super().save_pretrained(save_directory, **kwargs)
        if unknown := sorted(kwargs.keys() - {"max_shard_size", "variant"}):
            raise ValueError(f"With include_frozen=False only max_shard_size and variant are options, got {unknown}.")
        if self.config.vae_name_or_path is None:
            raise ValueError("include_frozen=False needs vae_name_or_path, from which to load the autoencoder.")
        folder = Path(save_directory)
        self.text_encoder.save_pretrained(folder / "text_encoder", include_frozen=False, **kwargs)
        self.transformer.save_pretrained(folder / "transformer", **kwargs)
        self.save_frame(folder, include_frozen=False)

    def save_frame(self, folder: Path, include_frozen: bool):
        """Writes a pipeline folder without encoder and generator, whose weights a sharded run writes by itself."""
        self.processor.save_pretrained(folder / "processor")
        self.scheduler.save_pretrained(folder / "scheduler")
        if include_frozen:
            self.vae.save_pretrained(folder / "vae")
            self.save_config(folder)
            return
        index = self.config["vae"]
        self.register_to_config(vae=(None, None))
        try:
            self.save_config(folder)
        finally:
            self.register_to_config(vae=index)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "IOMMPipeline":
        r"""
        Loads a pipeline from a folder or a Hub id. Frozen parts that were left out come from their references. Without
        `dtype` all parts are float32, as diffusers' are: transformers alone would keep the file's.

        Raises:
            `ValueError`: `device_map` for parts that come from references.
            `OSError`: a part is found nowhere, is of another class, is damaged or altered, is a pickle, or is not the one
                that this checkpoint was trained with.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(cls.download(pretrained_model_name_or_path, **kwargs))
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        index = cls.load_config(folder)
        absent = [part for part in ("text_encoder", "vae") if part not in kwargs]
        if index["vae"][0] is None and absent and kwargs.get("device_map") is not None:
            raise ValueError(
                f"device_map would not reach {' and '.join(absent)}, whose frozen weights this checkpoint only refers to."
                " Load it plainly, save it whole with save_pretrained, and load that."
            )
        check_files(folder, [name for name in PARTS if name not in kwargs and index[name][0] is not None])
        if "vae" not in kwargs and index["vae"][0] is None:
            if index.get("vae_name_or_path") is None:
                raise OSError(
                    f"{pretrained_model_name_or_path} holds no autoencoder and its model_index.json no vae_name_or_path"
                    " to load it from. Give one as `vae=`."
                )
            vae_folder = resolve_frozen(
                index["vae_name_or_path"], index["vae_revision"], index["vae_subfolder"], **hub_options(kwargs)
            )
            if index["vae_hash"] not in (None, hash_weight_files(vae_folder)):
                raise OSError(
                    f"The autoencoder in {vae_folder} is not the one that {pretrained_model_name_or_path} was trained"
                    f" with: its hash is {hash_weight_files(vae_folder)}, expected {index['vae_hash']}."
                )
            kwargs["vae"] = AutoencoderKL.from_pretrained(
                vae_folder,
                dtype=part_dtype(kwargs, "vae"),
                quantization_config=part_quantization(kwargs, "vae", is_diffusers=True),
            )
        options = hub_options(kwargs)
        if (
            options
            and "text_encoder" not in kwargs
            and index["vae"][0] is None
            and index["text_encoder"][0] is not None
        ):
            # diffusers does not tell a part where and how its references are fetched.
            kwargs["text_encoder"] = IOMMConditionEncoder.from_pretrained(
                folder / "text_encoder",
                dtype=part_dtype(kwargs, "text_encoder"),
                variant=kwargs.get("variant"),
                quantization_config=part_quantization(kwargs, "text_encoder", is_diffusers=False),
                **options,
            )
        return super().from_pretrained(folder, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> dict[str, Any]:
        """The index of a pipeline folder. A published one names copies of our classes, code beside the weights; in their
        place come the installed ones, so no code of the repository runs and none needs to be trusted."""
        index = super().load_config(pretrained_model_name_or_path, **kwargs)
        named = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][-1]
        if named not in (IOMMPipeline.__name__, cls.__name__):
            raise OSError(
                f"{pretrained_model_name_or_path} holds a {named}, not an {cls.__name__}. Load it with"
                " diffusers.DiffusionPipeline, which finds the class by itself."
            )
        index["_class_name"] = named
        for part, classes in PARTS.items():
            library, name = index.get(part) or (None, None)
            expected = {allowed.__name__: allowed for allowed in classes}
            if name is None:
                index[part] = [None, None]
            elif name in expected:
                module = expected[name].__module__
                index[part] = ["diffusers" if module.startswith("diffusers.") else module, name]
            else:
                raise OSError(
                    f"{pretrained_model_name_or_path} names {library}.{name} as its {part}, expected"
                    f" {' or '.join(expected)}. It was altered, or made by something else than iomm-hf."
                )
        return index

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs) -> str:
        """Fetches a published pipeline. diffusers refuses components of other libraries from the Hub; ours are installed
        beside this class, so no code is fetched and none is trusted: only weights (safetensors) and plain text."""
        options = hub_options(kwargs) | ({"revision": kwargs["revision"]} if "revision" in kwargs else {})
        return snapshot_download(
            str(pretrained_model_name), allow_patterns=PIPELINE_FILES, ignore_patterns=["state/*"], **options
        )


def part_dtype(kwargs: dict[str, Any], part: str) -> torch.dtype | str | None:
    """What `from_pretrained` was told of one part's precision."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    return dtype.get(part, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype


def part_quantization(kwargs: dict[str, Any], part: str, is_diffusers: bool):
    """What `from_pretrained` was told of one part's quantisation, resolved as diffusers does for the parts that it loads."""
    config = kwargs.get("quantization_config")
    return config and config._resolve_quant_config(is_diffusers=is_diffusers, module_name=part)


def guide(
    branches: Sequence[torch.Tensor],
    guidance_scale: float,
    image_guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
) -> torch.Tensor:
    """Velocities (B, C, h, w) of the branches (negative, with an image scale also the picture alone, and last the whole
    condition) as one, by InstructPix2Pix's equation 3."""
    negative, conditional = branches[0], branches[-1]
    if image_guidance_scale is None:
        velocity = negative + guidance_scale * (conditional - negative)
    else:
        by_image = branches[1]
        velocity = negative + image_guidance_scale * (by_image - negative) + guidance_scale * (conditional - by_image)
    if guidance_rescale > 0:
        spread = [v.std(dim=(1, 2, 3), keepdim=True) for v in (conditional, velocity)]
        velocity = velocity * (1 + guidance_rescale * (spread[0] / spread[1] - 1))
    return velocity


def join_conditions(
    first: torch.Tensor, first_mask: torch.Tensor | None, second: torch.Tensor, second_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two batches of conditions as one, padded to the longer; without any padding the mask stays `None`."""
    rows = max(first.shape[1], second.shape[1])
    if first_mask is None and second_mask is None and first.shape[1] == second.shape[1]:
        return torch.cat([first, second]), None

    def pad(condition: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        mask = condition.new_ones(condition.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        extra = rows - condition.shape[1]
        return torch.nn.functional.pad(condition, (0, 0, 0, extra)), torch.nn.functional.pad(mask, (0, extra))

    (first, first_mask), (second, second_mask) = pad(first, first_mask), pad(second, second_mask)
    return torch.cat([first, second]), torch.cat([first_mask, second_mask])


def draw_latents(
    vae: AutoencoderKL, posterior: DiagonalGaussianDistribution, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """An autoencoder's posterior -> scaled latents (B, C, h, w): its mean, or a draw with `noise` of its shape."""
    latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents -> images (B, 3, H, W) in about [-1, 1]."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents, return_dict=False)[0]
