"""From a run's settings to the pipeline that it trains: fresh generator and adapter around frozen parts."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import PreTrainedModel, set_seed

from ..data.streams import MixedStream
from ..generators import condition_width
from ..modeling_iomm import IOMMConditionEncoder, IOMMConfig, hash_weight_files, load_mllm, resolve_frozen
from ..pipeline_iomm import IOMMPipeline
from ..presets import Preset, build_transformer, get_preset
from ..processing_iomm import IOMMProcessor
from ..shipped import shipped_model
from .alignment import VisionAlignment, vision_tokens_per_side
from .config import LoraTrainingConfig, TrainingConfig


# Fields of `IOMMConfig` that a run may set; a pipeline to start from brings its own.
CONDITION_SETTINGS = ("condition_tokens", "mask_mode", "num_queries", "adapter_type", "connector_layers")

# Where frozen parts come from: fields of `IOMMConfig` and of `IOMMPipeline`.
MLLM_REFERENCE = ("mllm_name_or_path", "mllm_revision", "mllm_hash")
VAE_REFERENCE = ("vae_name_or_path", "vae_subfolder", "vae_revision", "vae_hash")


def resolved_revision(name_or_path: str, folder: Path, subfolder: str | None) -> str | None:
    """The commit behind a downloaded folder (the Hub's cache names snapshots by it); `None` for a local one."""
    if Path(name_or_path).is_dir():
        return None
    return (folder.parent if subfolder else folder).name


def local_or_id(name_or_path: str) -> str:
    """References to folders are absolute, so that a checkpoint finds them from anywhere on this machine."""
    path = Path(name_or_path)
    return str(path.resolve()) if path.is_dir() else name_or_path


@dataclass
class FrozenParts:
    """What never trains, and how a checkpoint refers to it; without names it can only be copied (`pin_frozen`)."""

    processor: IOMMProcessor
    mllm: PreTrainedModel
    vae: AutoencoderKL
    mllm_reference: dict[str, str | None]  # fields of `IOMMConfig`
    vae_reference: dict[str, str | None]  # of `IOMMPipeline`


def load_frozen_parts(
    preset: Preset,
    mllm: str | None = None,
    vae: str | None = None,
    vae_subfolder: str | None = None,
    mllm_revision: str | None = None,
    vae_revision: str | None = None,
) -> FrozenParts:
    r"""
    MLLM and autoencoder in float32: those named, otherwise the preset's, which for `tiny` come with this package.

    Raises:
        `OSError`: one of them is found nowhere.
        `ValueError`: a revision of one that comes with this package.
    """
    if vae is None:
        vae, vae_subfolder = preset.vae, preset.vae_subfolder
    mllm = mllm or preset.mllm
    for part, name, revision in (("mllm", mllm, mllm_revision), ("vae", vae, vae_revision)):
        if name is None and revision is not None:
            raise ValueError(f"{part}_revision={revision!r} is of a part on the Hub: name it as {part}.")
    mllm_reference: dict[str, str | None] = {}
    vae_reference: dict[str, str | None] = {}
    if mllm is None:
        pipeline = IOMMPipeline.from_pretrained(shipped_model(), vae=None, transformer=None, dtype=torch.float32)
        processor, mllm_model = pipeline.processor, pipeline.text_encoder.mllm
    else:
        folder = resolve_frozen(mllm, mllm_revision)
        processor, mllm_model = IOMMProcessor.from_pretrained(folder), load_mllm(folder, dtype=torch.float32)
        mllm_reference = {
            "mllm_name_or_path": local_or_id(mllm),
            "mllm_revision": resolved_revision(mllm, folder, None),
            "mllm_hash": hash_weight_files(folder),
        }
    if vae is None:
        vae_model = AutoencoderKL.from_pretrained(shipped_model() / "vae", dtype=torch.float32)
    else:
        folder = resolve_frozen(vae, vae_revision, vae_subfolder)
        vae_model = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
        vae_reference = {
            "vae_name_or_path": local_or_id(vae),
            "vae_subfolder": vae_subfolder,
            "vae_revision": resolved_revision(vae, folder, vae_subfolder),
            "vae_hash": hash_weight_files(folder),
        }
    return FrozenParts(processor, mllm_model, vae_model, mllm_reference, vae_reference)


def build_pipeline(config: TrainingConfig) -> IOMMPipeline:
    r"""
    The pipeline to train: loaded from `config.init_from`, or built around the frozen MLLM and autoencoder, whose
    revisions and hashes it records.

    Raises:
        `OSError`: a frozen part is found nowhere.
        `ValueError`: an unknown preset, or parts that do not fit together.
    """
    if config.init_from is not None:
        overridden = ("mllm", "mllm_revision", "vae", "vae_subfolder", "vae_revision", *CONDITION_SETTINGS)
        given = [name for name in overridden if getattr(config, name) is not None]
        if given:
            raise ValueError(f"init_from={config.init_from!r} brings its own {', '.join(given)}; leave them out.")
        pipeline = IOMMPipeline.from_pretrained(config.init_from, dtype=torch.float32)
        if isinstance(config, LoraTrainingConfig):
            return pipeline  # its checkpoints refer to nothing: they hold the LoRA alone
        pin_frozen(pipeline, Path(config.output_dir) / "frozen")
        return pipeline

    assert config.preset is not None  # filled in by the settings
    preset = get_preset(config.preset)
    parts = load_frozen_parts(
        preset, config.mllm, config.vae, config.vae_subfolder, config.mllm_revision, config.vae_revision
    )
    overrides = {name: getattr(config, name) for name in CONDITION_SETTINGS if getattr(config, name) is not None}
    encoder_config = IOMMConfig(
        mllm_config=parts.mllm.config, **parts.mllm_reference, **preset.condition_config | overrides
    )
    set_seed(config.seed)
    encoder = IOMMConditionEncoder(encoder_config, mllm=parts.mllm)
    transformer = build_transformer(preset)
    width = condition_width(transformer)
    if width != encoder_config.hidden_size:
        raise ValueError(
            f"The generator of preset {config.preset!r} takes conditions of width {width}, but"
            f" {config.mllm or preset.mllm!r} gives {encoder_config.hidden_size}."
        )
    pipeline = IOMMPipeline(
        text_encoder=encoder,
        processor=parts.processor,
        transformer=transformer,
        vae=parts.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=preset.shift),
        resolution=preset.resolution,
        **parts.vae_reference,
    )
    if not (parts.mllm_reference and parts.vae_reference):
        pin_frozen(pipeline, Path(config.output_dir) / "frozen")
    return pipeline


def hash_module(module: nn.Module, *, leave_out: tuple[str, ...] = ()) -> str:
    """SHA-256 of a module's weights as float32, without those whose names begin with one of `leave_out`: the same however they
    were stored or nested."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(leave_out):
            continue
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def cache_identity(mllm: nn.Module, vae: nn.Module, resolution: int) -> dict[str, Any]:
    """What a cache of [`~iomm_hf.data.cache`] belongs to: an MLLM whose language model alone was trained on still fits."""
    eyes = hash_module(mllm.get_submodule("model"), leave_out=("language_model.",))
    return {"vision tower": eyes, "vae": hash_module(vae), "resolution": resolution}


def check_caches(stream: MixedStream, pipeline: IOMMPipeline, resolution: int):
    r"""
    Refuses cached sources that other frozen parts or another resolution made.

    Raises:
        `ValueError`: such a source; the message names what differs.
    """
    caches = {source.source.path: source.cache_info for source in stream.streams if source.cache_info is not None}
    if not caches:
        return
    expected = cache_identity(pipeline.text_encoder.mllm, pipeline.vae, resolution)
    for path, info in caches.items():
        differing = [name for name, value in expected.items() if info[name] != value]
        if differing:
            raise ValueError(
                f"The cache {path!r} was made with another {' and '.join(differing)} than this run's; precompute it again."
            )


def build_alignment(
    config: TrainingConfig, pipeline: IOMMPipeline, stream: MixedStream, resolution: int
) -> VisionAlignment | None:
    r"""
    The run's alignment, if it has one.

    Raises:
        `ValueError`: a source without cached vision tokens, or tokens that do not fit each other.
    """
    if not config.alignment_weight:
        return None
    for source in stream.streams:
        if source.cache_info is None or not source.cache_info["vision_tokens"]:
            raise ValueError(
                f"alignment_weight={config.alignment_weight} needs cached vision tokens, which {source.source.path!r} lacks:"
                " run recipes/precompute_latents.py on it first."
            )
    return VisionAlignment(
        pipeline.transformer,
        vision_dim=pipeline.text_encoder.config.hidden_size,
        tokens_per_side=resolution // pipeline.size_multiple,
        vision_tokens_per_side=vision_tokens_per_side(pipeline.processor.image_seq_length),
    )


def frozen_references(pipeline: IOMMPipeline) -> dict[str, str | None]:
    """Names, resolved revisions and hashes of the frozen parts, as the run's checkpoints hold them."""
    mllm = {name: getattr(pipeline.text_encoder.config, name) for name in MLLM_REFERENCE}
    return mllm | {name: pipeline.config[name] for name in VAE_REFERENCE}


def frozen_on_hub(pipeline: IOMMPipeline) -> bool:
    """Whether both frozen parts are referenced on the Hub, so that anybody can fetch them."""
    references = (pipeline.text_encoder.config.mllm_name_or_path, pipeline.config.vae_name_or_path)
    return all(reference is not None and not Path(reference).is_absolute() for reference in references)


def pin_frozen(pipeline: IOMMPipeline, folder: Path):
    """Copies frozen parts that the Hub does not hold beside the run, for its checkpoints to refer to: the folder that
    they came from may be gone when somebody resumes."""
    if frozen_on_hub(pipeline):
        return
    mllm, vae = folder.resolve() / "mllm", folder.resolve() / "vae"
    pipeline.text_encoder.mllm.save_pretrained(mllm)
    pipeline.processor.save_pretrained(mllm)
    pipeline.vae.save_pretrained(vae)
    encoder_config = pipeline.text_encoder.config
    encoder_config.mllm_name_or_path, encoder_config.mllm_revision = str(mllm), None
    encoder_config.mllm_hash = hash_weight_files(mllm)
    pipeline.register_to_config(
        vae_name_or_path=str(vae), vae_subfolder=None, vae_revision=None, vae_hash=hash_weight_files(vae)
    )
