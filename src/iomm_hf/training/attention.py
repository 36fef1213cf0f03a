"""Which attention kernels a run trains with: PyTorch's choice but for those that fail or are slow, or a backend of diffusers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..pipeline_iomm import IOMMPipeline


@contextmanager
def attention_kernel(device: torch.device, mixed_precision: str, backend: str | None = None) -> Iterator[None]:
    """PyTorch's choice but for two. bf16 on CPUs: fused attention takes longer backward than the whole plain one. CUDA: the
    backward pass of cuDNN's attention made illegal memory accesses for Flux at 512 px (seen on an H200, torch 2.11).
    `backend` is diffusers', for Flux and Z-Image in its place."""
    ours: AbstractContextManager = nullcontext()
    if device.type == "cuda":
        ours = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    elif device.type == "cpu" and mixed_precision == "bf16":
        ours = sdpa_kernel(SDPBackend.MATH)
    with ours, nullcontext() if backend is None else attention_backend(backend):
        yield


def check_attention_backend(backend: str, pipeline: IOMMPipeline, accelerator: Accelerator):
    """Tries it with the types and the mask that the generator will give it, beside plain attention.

    Raises:
        `ValueError`: the generator does not use it, it would fetch code from the Hub, it cannot run here or has no backward
            pass, or it answers otherwise, as those do that take a mask for padding at the end.
    """
    if isinstance(pipeline.transformer, UNet2DConditionModel):
        raise ValueError(
            f"attention_backend {backend!r} is for a Flux or Z-Image; a U-Net's attention does not use it."
        )
    if backend.endswith("_hub"):
        raise ValueError(
            f"attention_backend {backend!r} would run code from the Hub, of no pinned revision; choose another."
        )
    device, generator = accelerator.device, torch.Generator().manual_seed(0)
    # Normalised queries and keys stay in float32 under autocast, values do not. A head 64 wide suits every kernel.
    tokens = [torch.randn(1, 32, 2, 64, generator=generator).to(device).requires_grad_() for _ in range(3)]
    mask = None
    if pipeline.text_encoder.config.condition_tokens == "all":
        mask = torch.ones(1, 1, 1, 32, dtype=torch.bool, device=device)
        mask[..., 8:16] = False  # padding of the condition, before the image
    answers = []
    try:
        for name in (backend, AttentionBackendName._NATIVE_MATH):
            with attention_kernel(device, accelerator.mixed_precision, name), accelerator.autocast():
                query, key, value = tokens
                value = value.bfloat16() if accelerator.mixed_precision == "bf16" else value
                answer = dispatch_attention_fn(query, key, value, attn_mask=mask)
            answers.append([answer, *torch.autograd.grad(answer.float().square().sum(), tokens)])
    except Exception as error:  # of whichever package the backend is
        raise ValueError(f"attention_backend {backend!r} cannot train on this {device.type}: {error}") from error
    tolerance = 0.05 if accelerator.mixed_precision == "bf16" else 1e-3
    if not all(
        torch.allclose(one.float(), two.float(), tolerance, tolerance) for one, two in zip(*answers, strict=True)
    ):
        raise ValueError(f"attention_backend {backend!r} does not answer as plain attention does; choose another.")
