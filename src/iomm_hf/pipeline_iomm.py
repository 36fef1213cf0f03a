"""`IOMMPipeline`: text, a reference image or both in, pictures out.

The pipeline knows nothing of token layouts (`processing_iomm`), of what the generator wants (`generators`) or of how
conditions come about (`modeling_iomm`): it encodes both branches of guidance, integrates dx/dt = F from t = 1 to t = 0,
and decodes.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image

from .generators import latent_multiple, predict_velocity, unwrap
from .integrity import CHECKSUMS, check_files
from .modeling_iomm import IOMMConditionEncoder, hash_weight_files, resolve_frozen
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
    "scheduler": (FlowMatchEulerDiscreteScheduler,),
}


class IOMMPipeline(DiffusionPipeline):
    r"""
    Draws what a text says, changes an image as told, or varies it.

    Args:
        text_encoder ([`IOMMConditionEncoder`]): The frozen MLLM with its adapter; reads text and images alike.
        processor ([`IOMMProcessor`]): Builds the MLLM's inputs for each use.
        transformer (`FluxTransformer2DModel`, `ZImageTransformer2DModel` or `UNet2DConditionModel`): The generator, which
            predicts the velocity.
        vae (`AutoencoderKL`): Turns latents into pictures; frozen.
        scheduler (`FlowMatchEulerDiscreteScheduler`): Steps from noise to image.
        vae_name_or_path (`str`, *optional*): Where the autoencoder is found when a checkpoint leaves it out.
        vae_subfolder (`str`, *optional*): Its folder there.
        vae_revision (`str`, *optional*): The commit it was trained with.
        vae_hash (`str`, *optional*): Hash of its weight files, checked at load.
        resolution (`int`, *optional*): Side of the pictures it was trained on, in pixels; the default size. Without it,
            the autoencoder's `sample_size`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        text_encoder: IOMMConditionEncoder,
        processor: IOMMProcessor,
        # `from_pipe` wants the very classes
        transformer: FluxTransformer2DModel | ZImageTransformer2DModel | UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
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
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
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
            prompts = [prompt] if isinstance(prompt, str) else prompt
            images = [image] if isinstance(image, Image.Image) else image
            if images is None:
                conversations = [self.processor.text_to_image(text) for text in prompts or []]
            elif prompts is None:
                conversations = [self.processor.image_only(picture) for picture in images]
            else:
                conversations = [
                    self.processor.edit(text, picture) for text, picture in zip(prompts, images, strict=True)
                ]
            prompt_embeds, prompt_embeds_mask = self._encode(conversations, device)
        batch_size = len(prompt_embeds)

        if do_classifier_free_guidance and negative_prompt_embeds is None:
            if negative_prompt is None:
                conversations = [self.processor.unconditional()]
            else:
                negatives = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
                conversations = [self.processor.text_to_image(text) for text in negatives]
            negative_prompt_embeds, negative_prompt_embeds_mask = self._encode(conversations, device)
            if len(conversations) == 1:  # one wording serves the whole batch
                negative_prompt_embeds = negative_prompt_embeds.expand(batch_size, -1, -1)
                if negative_prompt_embeds_mask is not None:
                    negative_prompt_embeds_mask = negative_prompt_embeds_mask.expand(batch_size, -1)

        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds_mask = None
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask = [
            None if tensor is None else tensor.to(device).repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in (prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask)
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
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for a batch of {batch_size} pictures.")
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def check_inputs(
        self,
        prompt,
        image,
        negative_prompt,
        prompt_embeds,
        prompt_embeds_mask,
        negative_prompt_embeds,
        negative_prompt_embeds_mask,
        height: int,
        width: int,
        num_inference_steps: int,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        """Refuses what cannot be drawn, with the value and what would do."""
        multiple = self.size_multiple
        if height % multiple or width % multiple or height <= 0 or width <= 0:
            raise ValueError(f"height and width must be positive multiples of {multiple}, got {height} and {width}.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        if prompt_embeds is None and prompt is None and image is None:
            raise ValueError("Give a `prompt`, an `image`, both, or `prompt_embeds`.")
        if prompt_embeds is not None and (prompt is not None or image is not None):
            raise ValueError("`prompt_embeds` replace `prompt` and `image`: give one or the other.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("`negative_prompt_embeds` replace `negative_prompt`: give one or the other.")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            is_list = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
            if value is not None and not isinstance(value, str) and not is_list:
                raise ValueError(f"`{name}` must be a str or a non-empty list of str, got {value!r}.")
        images = [image] if isinstance(image, Image.Image) else image
        if images is not None and (
            not isinstance(images, list) or not images or not all(isinstance(item, Image.Image) for item in images)
        ):
            raise ValueError(f"`image` must be a PIL image or a non-empty list of them, got {type(image).__name__}.")
        batch = len(prompt_embeds) if prompt_embeds is not None else None
        for name, value in (("prompt", prompt), ("image", images), ("negative_prompt", negative_prompt)):
            if value is None:
                continue
            size = 1 if isinstance(value, str) else len(value)
            if name == "negative_prompt" and size == 1:
                continue
            if batch is not None and size != batch:
                raise ValueError(f"`{name}` has {size} entries, the others have {batch}.")
            batch = size
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != batch:
            raise ValueError(f"`negative_prompt_embeds` has {len(negative_prompt_embeds)} entries, expected {batch}.")

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
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

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
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | np.ndarray | torch.Tensor | None = None,
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw, or with `image` what to change.
            image (`PIL.Image.Image` or a list, `np.ndarray` (batch, height, width, 3) or `torch.Tensor` (batch, 3, height,
                width) in [0, 1], *optional*): Reference to edit; without a prompt, to vary.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from. Defaults to the
                unconditional instruction that training used.
            height, width (`int`, *optional*): Size in pixels; defaults to `resolution`.
            num_inference_steps (`int`, *optional*, defaults to 30): Steps from noise to image.
            guidance_scale (`float`, *optional*, defaults to 3.0): Strength of guidance; 1 turns it off and halves the
                cost (neighbours use 3 to 5; the paper gives none).
            num_images_per_prompt (`int`, *optional*, defaults to 1): Pictures for each prompt.
            generator (`torch.Generator` or one per picture, *optional*): Makes the result repeatable.
            latents (`torch.Tensor` of shape `(pictures, channels, height / f, width / f)`, *optional*): Starting noise.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, rows, D)`, *optional*): Conditions of
                [`~IOMMPipeline.encode_prompt`], with `prompt_embeds_mask` (batch_size, rows) where rows are padded;
                likewise `negative_prompt_embeds` and its mask.
            sigmas (`list[float]`, *optional*): Noise levels of the steps, before the scheduler's shift.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): `False` gives a tuple.
            attention_kwargs (`dict`, *optional*): Passed to the transformer, such as a LoRA `scale`.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; what it returns replaces those tensors. Setting `pipe._interrupt = True` stops the drawing.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Which tensors it gets.

        Returns:
            [`ImagePipelineOutput`] with `images`, or a tuple.

        Raises:
            `ValueError`: sizes not divisible, no input, or inputs that do not fit together.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        references = as_pil(image)
        height = height or self.resolution
        width = width or self.resolution
        self.check_inputs(
            prompt,
            references,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            height,
            width,
            num_inference_steps,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
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
        # Without explicit sigmas the scheduler would spend its last step at 0.001 and apply its shift twice.
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)

        # 3. Both branches of guidance run as one batch, the conditional one last, as diffusers' caches expect.
        condition, condition_mask = prompt_embeds, prompt_embeds_mask
        guided = negative_prompt_embeds is not None
        if negative_prompt_embeds is not None:
            condition, condition_mask = join_conditions(
                negative_prompt_embeds, negative_prompt_embeds_mask, prompt_embeds, prompt_embeds_mask
            )

        # 4. From noise to image
        denoiser = unwrap(self.transformer)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                inputs = torch.cat([latents] * 2) if guided else latents
                timestep = (t / self.scheduler.config.num_train_timesteps).expand(len(inputs)).to(dtype)
                # diffusers' caches, such as First Block Cache, want each call of the denoiser named.
                with denoiser.cache_context("cond_uncond") if isinstance(denoiser, CacheMixin) else nullcontext():
                    velocity = predict_velocity(
                        self.transformer,
                        inputs.to(dtype),
                        timestep,
                        condition.to(dtype),
                        condition_mask,
                        self.attention_kwargs,
                    ).float()
                if guided:
                    negative, velocity = velocity.chunk(2)
                    # read anew at each step, since a callback may change it
                    velocity = negative + self.guidance_scale * (velocity - negative)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": condition[-batch_size:]}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, chosen)
                    latents = changed.pop("latents", latents)
                    if "prompt_embeds" in changed:
                        condition = torch.cat([condition[:-batch_size], changed.pop("prompt_embeds")])
                progress_bar.update()
        self._current_timestep = None

        # 5. Pictures
        if output_type == "latent":
            images = latents
        else:
            images = decode_latents(self.vae, latents)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    __call__.__doc__ = (__call__.__doc__ or "") + EXAMPLE

    def save_pretrained(self, save_directory: str | os.PathLike, include_frozen: bool = True, **kwargs):
        r"""
        Writes the pipeline folder. With `include_frozen=False` MLLM and autoencoder stay out, and loading fetches them
        from where `text_encoder.config.mllm_name_or_path` and `vae_name_or_path` say.

        Raises:
            `ValueError`: `include_frozen=False` without both references.
        """
        if include_frozen:
            return super().save_pretrained(save_directory, **kwargs)
        if self.config.vae_name_or_path is None:
            raise ValueError("include_frozen=False needs vae_name_or_path, from which to load the autoencoder.")
        folder = Path(save_directory)
        self.text_encoder.save_pretrained(folder / "text_encoder", include_frozen=False)
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
            `OSError`: a part is found nowhere, is of another class, is damaged or altered, is a pickle, or is not the one
                that this checkpoint was trained with.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(cls.download(pretrained_model_name_or_path, **kwargs))
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        index = cls.load_config(folder)
        check_files(folder, [name for name in PARTS if name not in kwargs and index[name][0] is not None])
        if "vae" not in kwargs and index["vae"][0] is None:
            if index.get("vae_name_or_path") is None:
                raise OSError(
                    f"{pretrained_model_name_or_path} holds no autoencoder and its model_index.json no vae_name_or_path"
                    " to load it from. Give one as `vae=`."
                )
            vae_folder = resolve_frozen(index["vae_name_or_path"], index["vae_revision"], index["vae_subfolder"])
            if index["vae_hash"] not in (None, hash_weight_files(vae_folder)):
                raise OSError(
                    f"The autoencoder in {vae_folder} is not the one that {pretrained_model_name_or_path} was trained"
                    f" with: its hash is {hash_weight_files(vae_folder)}, expected {index['vae_hash']}."
                )
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, dict):  # one for each part
                dtype = dtype.get("vae", dtype.get("default"))
            kwargs["vae"] = AutoencoderKL.from_pretrained(vae_folder, dtype=dtype)
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
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        options = {name: kwargs[name] for name in names if name in kwargs}
        return snapshot_download(
            str(pretrained_model_name), allow_patterns=PIPELINE_FILES, ignore_patterns=["state/*"], **options
        )


def as_pil(
    image: Image.Image | list[Image.Image] | np.ndarray | torch.Tensor | None,
) -> Image.Image | list[Image.Image] | None:
    """Arrays (B, H, W, 3) and tensors (B, 3, H, W) in [0, 1] as a list of pictures; anything else as it is."""
    if isinstance(image, torch.Tensor):
        return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))
    if isinstance(image, np.ndarray):
        return VaeImageProcessor.numpy_to_pil(image)
    return image


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
