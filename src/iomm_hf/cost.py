"""What training costs, before a GPU is rented: weights, FLOPs, memory, images/s and GPU hours.

FLOPs are counted by PyTorch's own counter and activations by what autograd saves, both on the real classes on the meta
device, so nothing is allocated. What is known by rule (bytes of gradients, optimizer states, averages) is added by rule.

Activations are counted with every tensor in the compute type and attention that keeps no scores; under autocast norms keep
float32 inputs, so real activations are larger. Kernel workspaces, fragmentation and the memory of the CUDA context are left
out. What was measured on a GPU is in benchmarks/README.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .generators import condition_width, predict_velocity
from .modeling_iomm import IOMMConditionEncoder, IOMMConfig
from .presets import Preset, build_transformer, get_preset


# Frozen parts that the presets load from the Hub, for counting alone. Unverified against the published config.json files:
# InternVL3-2B is the paper's sizes (0.30B + 1.54B) with transformers' InternVLVisionConfig; the autoencoder is
# `ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16`, as Open-Sora's `configs/diffusion/inference/plugins/t2i2v.py`
# gives FLUX's.
INTERNVL3_2B: dict[str, Any] = {
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151674,
        "tie_word_embeddings": True,
    },
    "vision_config": {"attention_bias": True},
}
FLUX_AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "latent_channels": 16,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PAPER_IMAGES = 110_000_000  # 10 epochs of about 11M: an inference, the paper does not state B's epochs
RESERVE = 0.1  # share of a GPU left for its context, workspaces and fragmentation (our choice)


@dataclass(frozen=True)
class TrainingCost:
    r"""
    What one run costs.

    Args:
        weights (`dict[str, int]`): Number of weights by part.
        flops (`dict[str, int]`): FLOPs of one sample by part, forward and backward; a multiply-add counts as two.
        memory (`dict[str, int]`): Bytes on each GPU by kind, activations for `batch_size` samples.
        activations_per_sample (`dict[str, int]`): Bytes with and without activation checkpointing.
        batch_size (`int`): Samples a GPU and forward pass.
        largest_batch (`dict[str, dict[str, int]]`): By GPU memory in GB, the largest batch without and with
            checkpointing; 0 where nothing fits.
        images_per_second (`float`): Of all GPUs together, at the stated utilisation.
        gpu_hours (`float`): Summed over all GPUs, at the stated utilisation.
    """

    weights: dict[str, int]
    flops: dict[str, int]
    memory: dict[str, int]
    activations_per_sample: dict[str, int]
    batch_size: int
    largest_batch: dict[str, dict[str, int]]
    images_per_second: float
    gpu_hours: float


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as fused kernels do it: autograd keeps queries, keys, values and output, no scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs.pop(n) for n in ("query", "key", "value"))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, kwargs.get("dropout_p", 0.0), False, attn_mask=None, scale=kwargs.get("scale")
        )[0]


def count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(function: Callable[[], torch.Tensor], backward: bool = False) -> int:
    r"""
    FLOPs of a call, a multiply-add counted as two, with its backward pass if asked for.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.cost import count_flops
    >>> layer = torch.nn.Linear(8, 4, device="meta")
    >>> count_flops(lambda: layer(torch.empty(3, 8, device="meta"))) == 2 * 3 * 8 * 4
    True
    ```
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = function()
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def saved_bytes(function: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass of a call on the meta device, weights not counted."""
    weights = {parameter.untyped_storage()._cdata for parameter in parameters}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function()
    total = sum(storage.nbytes() for storage in storages.values())
    del output
    return total


def meta_parts(preset: Preset) -> tuple[IOMMConditionEncoder, Any, Any]:
    """Encoder, autoencoder and generator (diffusers' classes) of a preset, without a byte of weights."""
    from diffusers import AutoencoderKL
    from transformers import InternVLConfig

    from .tiny import tiny_mllm_config, tiny_processor

    if preset.mllm_config:  # its vocabulary is that of the embedded world's tokenizer
        mllm_config = tiny_mllm_config(tiny_processor(preset), preset)
    else:
        mllm_config = InternVLConfig(**INTERNVL3_2B)
    with torch.device("meta"):
        encoder = IOMMConditionEncoder(IOMMConfig(mllm_config=mllm_config, **preset.condition_config))
        vae = AutoencoderKL(**(preset.vae_config or FLUX_AUTOENCODER)).requires_grad_(False)
    return encoder, vae, build_transformer(preset, device="meta")


class MetaModel:
    """Encoder, autoencoder and generator on the meta device, and one sample's pass through each."""

    def __init__(
        self,
        parts: tuple[IOMMConditionEncoder, Any, Any],
        resolution: int,
        prefix_tokens: int,
        dtype: torch.dtype,
    ):
        self.encoder, self.vae, self.transformer = parts
        for part in parts:
            part.to(dtype).train()
        self.adapter: nn.Module = self.encoder.adapter  # type: ignore[assignment]  # none without queries: not called
        self.dtype, self.resolution, self.prefix_tokens = dtype, resolution, prefix_tokens
        height, width = self.encoder.config.mllm_config.vision_config.image_size
        self.view = (1, 3, height, width)
        self.width = condition_width(self.transformer)
        side = resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent = (1, self.vae.config.latent_channels, side, side)

    def add_lora(self, rank: int):
        """Freezes everything but a LoRA, where `recipes/train_lora.py` puts it by default."""
        from .training.config import LoraTrainingConfig
        from .training.lora import add_lora

        add_lora(self, LoraTrainingConfig(images=["-"], lora_rank=rank))  # type: ignore[arg-type]  # it asks for both parts

    @property
    def encoder_trains(self) -> bool:
        return any(weight.requires_grad for weight in self.encoder.parameters())

    def empty(self, *shape: int, grad: bool = False) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=self.dtype, requires_grad=grad)

    def encode_latents(self) -> torch.Tensor:
        return self.vae.encode(self.empty(1, 3, self.resolution, self.resolution)).latent_dist.mean

    def see(self) -> torch.Tensor:
        return self.encoder.image_features(self.empty(*self.view))

    def prefix(self):
        return self._read(self.empty(1, self.prefix_tokens, self.encoder.config.hidden_size))

    def plain(self) -> torch.Tensor:
        """Prefix and query rows in one pass with a graph over all of them: what the cached prefix replaces."""
        rows = self.prefix_tokens + self.encoder.config.num_queries
        embeddings = self.empty(1, rows, self.encoder.config.hidden_size, grad=True)
        return self._read(embeddings)[0].last_hidden_state[:, self.prefix_tokens :]

    def _read(self, embeddings: torch.Tensor):
        from transformers import DynamicCache

        cache = DynamicCache()
        language_model = self.encoder.mllm.model.language_model
        return language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True), cache

    def adapt(self) -> torch.Tensor:
        mask = torch.ones(1, self.prefix_tokens, dtype=torch.bool, device="meta")
        return self.adapter(self.empty(1, self.prefix_tokens, self.encoder.config.hidden_size), mask)

    def query(self, cache) -> torch.Tensor:
        count = self.encoder.config.num_queries
        positions = torch.arange(count, device="meta")[None] + self.prefix_tokens
        queries = self.empty(1, count, self.encoder.config.hidden_size, grad=self.encoder_trains)
        return self.encoder._run_queries(queries, None, positions, cache)[-1]  # type: ignore[arg-type]  # nothing is padded

    def generate(self) -> torch.Tensor:
        config = self.encoder.config
        rows = config.num_queries + (self.prefix_tokens if config.condition_tokens == "all" else 0)
        condition = self.empty(1, rows, self.width, grad=self.encoder_trains)
        return predict_velocity(self.transformer, self.empty(*self.latent), self.empty(1), condition)

    def flops(self, cached_latents: bool = False, cached_vision_tokens: bool = False) -> dict[str, int]:
        """Of a training step with one sample, by part; the connector's are left out, which no preset has."""
        with torch.no_grad():
            cache = self.prefix()[1]
        asked, backward = self.encoder.config.num_queries > 0, self.encoder_trains
        return {
            "autoencoder": 0 if cached_latents else count_flops(self.encode_latents),
            "vision tower": 0 if cached_vision_tokens else count_flops(self.see),
            "MLLM prefix": count_flops(lambda: self.prefix()[0].last_hidden_state),
            "adapter": count_flops(self.adapt, backward) if asked else 0,
            "query rows": count_flops(lambda: self.query(cache), backward) if asked else 0,
            "generator": count_flops(self.generate, backward=True),
        }

    def enable_checkpointing(self):
        self.encoder.activation_checkpointing_enable()
        self.transformer.enable_gradient_checkpointing()

    def saved(self, cache) -> dict[str, int]:
        """Bytes of one sample that wait for the backward pass, by part."""
        parts = {"adapter": self.adapt, "query rows": lambda: self.query(cache), "generator": self.generate}
        parameters = [*self.encoder.parameters(), *self.transformer.parameters()]
        return {name: saved_bytes(part, parameters) for name, part in parts.items()}

    def blocks(self) -> dict[str, int]:
        """How many units checkpointing recomputes, one at a time."""
        names = set(self.transformer._no_split_modules or ())
        generator = sum(type(module).__name__ in names for module in self.transformer.modules())
        layers = len(self.encoder.mllm.model.language_model.layers)
        return {"adapter": 1, "query rows": layers, "generator": max(1, generator)}


def estimate_training(
    preset: str | Preset,
    resolution: int | None = None,
    mask_ratio: float | None = None,
    wording_tokens: int = 40,
    batch_size: int = 16,
    gpus: int = 1,
    sharding: Literal["ddp", "fsdp"] = "ddp",
    mixed_precision: Literal["no", "bf16"] = "bf16",
    optimizer: Literal["adamw", "muon"] = "adamw",
    ema: bool = True,
    gradient_checkpointing: bool = False,
    gradient_accumulation: int = 1,
    cached_latents: bool = False,
    cached_vision_tokens: bool = False,
    lora_rank: int | None = None,
    images: int = PAPER_IMAGES,
    peak_tflops: float = 989.0,
    utilisation: float = 0.22,
) -> TrainingCost:
    r"""
    What training a preset costs on image-only samples (paper, Sec. 3), counted without memory.

    Args:
        preset (`str` or [`Preset`]): Which sizes.
        resolution (`int`, *optional*): Side of the pictures in pixels; defaults to the preset's.
        mask_ratio (`float`, *optional*): Share r of image tokens hidden; defaults to the preset's.
        wording_tokens (`int`, *optional*, defaults to 40): Tokens of instruction and chat template (approximate).
        batch_size (`int`, *optional*, defaults to 16): Samples a GPU and forward pass.
        gpus (`int`, *optional*, defaults to 1): Number of GPUs.
        sharding (`str`, *optional*, defaults to `"ddp"`): `ddp` holds everything on each GPU, `fsdp` shares trained
            weights, gradients, optimizer states and EMA out evenly; frozen parts are never shared out.
        mixed_precision (`str`, *optional*, defaults to `"bf16"`): As in training: trained weights stay float32.
        optimizer (`str`, *optional*, defaults to `"adamw"`): `adamw` or `muon` (one momentum for matrices).
        ema (`bool`, *optional*, defaults to `True`): Whether averaged weights are held.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Recompute activations.
        gradient_accumulation (`int`, *optional*, defaults to 1): Forward passes an optimizer step; from two on, gradients are
            held during the forward pass.
        cached_latents (`bool`, *optional*, defaults to `False`): Latents were computed before.
        cached_vision_tokens (`bool`, *optional*, defaults to `False`): Image tokens were computed before.
        lora_rank (`int`, *optional*): What a LoRA of this rank costs, as `recipes/train_lora.py` puts it beside the
            generator's attention, in place of training all weights. It is the same on every GPU: not for `fsdp`.
        images (`int`, *optional*, defaults to 110,000,000): Samples of the run.
        peak_tflops (`float`, *optional*, defaults to 989): Peak of one GPU, TFLOP/s (H100 SXM, bf16 dense).
        utilisation (`float`, *optional*, defaults to 0.22): Share of the peak that the counted FLOPs reach; 0.22 is what
            `base` reached on one H200 without compilation (benchmarks/README.md).

    Returns:
        [`TrainingCost`].

    Raises:
        `ValueError`: a number outside its range, or an unknown preset.

    Example:

    ```python
    >>> from iomm_hf.cost import estimate_training
    >>> cost = estimate_training("tiny", batch_size=4, mixed_precision="no", cached_latents=True)
    >>> cost.flops["autoencoder"], cost.memory["activations"] == 4 * cost.activations_per_sample["plain"]
    (0, True)
    ```
    """
    preset = get_preset(preset) if isinstance(preset, str) else preset
    resolution = preset.resolution if resolution is None else resolution
    mask_ratio = preset.mask_ratio if mask_ratio is None else mask_ratio
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be in (0, 1], got {utilisation}.")
    numbers = {"resolution": resolution, "batch_size": batch_size, "gpus": gpus, "wording_tokens": wording_tokens}
    numbers["gradient_accumulation"] = gradient_accumulation
    numbers["lora_rank"] = 1 if lora_rank is None else lora_rank
    for name, value in (numbers | {"images": images, "peak_tflops": peak_tflops}).items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    choices = {"sharding": ("ddp", "fsdp"), "mixed_precision": ("no", "bf16"), "optimizer": ("adamw", "muon")}
    for name, chosen in (("sharding", sharding), ("mixed_precision", mixed_precision), ("optimizer", optimizer)):
        if chosen not in choices[name]:
            raise ValueError(f"{name} must be one of {', '.join(choices[name])}, got {chosen!r}.")
    if lora_rank is not None and (sharding, optimizer) != ("ddp", "adamw"):
        raise ValueError(f"A LoRA trains with ddp and adamw, got {sharding} and {optimizer}.")

    image_tokens = preset.mllm_config.get("image_seq_length", 256)
    prefix_tokens = wording_tokens + round((1 - mask_ratio) * image_tokens)
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    model = MetaModel(meta_parts(preset), resolution, prefix_tokens, dtype)
    whole = {"adapter": count_weights(model.adapter), "generator": count_weights(model.transformer)}
    if lora_rank is not None:
        model.add_lora(lora_rank)
    with torch.no_grad():
        cache = model.prefix()[1]
    saved = model.saved(cache)
    activations = {"plain": sum(saved.values())}
    if gradient_checkpointing:
        model.enable_checkpointing()
    flops = model.flops(cached_latents, cached_vision_tokens)
    if not gradient_checkpointing:
        model.enable_checkpointing()
    # The inputs of all blocks, and what one of them makes when it runs again: of equal blocks, by their number.
    again = max(saved[part] // number for part, number in model.blocks().items())
    activations["checkpointed"] = sum(model.saved(cache).values()) + again

    trained_parts = (model.adapter, model.transformer)
    weights = {"MLLM": count_weights(model.encoder.mllm), "autoencoder": count_weights(model.vae), **whole}
    trained = sum(w.numel() for part in trained_parts for w in part.parameters() if w.requires_grad)
    beside = 0  # frozen in float32
    if lora_rank is not None:
        weights["LoRA"], beside = trained, sum(whole.values())
    layers = [m for part in trained_parts for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    matrices = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    low_precision = mixed_precision == "bf16"
    shards = gpus if sharding == "fsdp" else 1
    memory = {
        "frozen weights": weights["MLLM"] * (2 if low_precision else 4) + (weights["autoencoder"] + beside) * 4,
        "trained weights": 4 * trained // shards,
        "gradients": 4 * trained // shards,
        "optimizer": (8 * trained - (4 * matrices if optimizer == "muon" else 0)) // shards,
        "EMA": 4 * trained // shards if ema else 0,
    }
    # The graph keeps them for the backward pass, whole even where weights are shared out. With checkpointing they live in the
    # forward pass alone: there they meet only gradients that are accumulated, or that DDP's buckets hold all the time.
    copies = 2 * sum(count_weights(layer) for layer in layers) if low_precision else 0
    gradients_held = gradient_accumulation > 1 or (gpus > 1 and sharding == "ddp")
    checkpointed_copies = copies if gradients_held else 0
    static = {"plain": sum(memory.values()) + copies, "checkpointed": sum(memory.values()) + checkpointed_copies}
    memory["autocast copies"] = checkpointed_copies if gradient_checkpointing else copies
    memory["activations"] = batch_size * activations["checkpointed" if gradient_checkpointing else "plain"]
    largest_batch = {
        str(size): {
            kind: max(0, int((size * 1e9 * (1 - RESERVE) - static[kind]) // each))
            for kind, each in activations.items()
        }
        for size in (24, 40, 80)
    }
    # Recomputed FLOPs are work as well, so checkpointing slows a run down at equal utilisation.
    images_per_second = gpus * peak_tflops * 1e12 * utilisation / sum(flops.values())
    return TrainingCost(
        weights=weights,
        flops=flops,
        memory=memory,
        activations_per_sample=activations,
        batch_size=batch_size,
        largest_batch=largest_batch,
        images_per_second=images_per_second,
        gpu_hours=images / images_per_second * gpus / 3600,
    )
