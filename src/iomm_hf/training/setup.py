"""From a run's settings to the pipeline that it trains: fresh generator and adapter around frozen parts."""

import logging
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import set_seed

from ..modeling_iomm import IOMMConditionEncoder, IOMMConfig, hash_weight_files, load_mllm, resolve_frozen
from ..pipeline_iomm import IOMMPipeline
from ..presets import build_transformer, get_preset
from ..processing_iomm import IOMMProcessor
from .config import TrainingConfig


logger = logging.getLogger(__name__)


def resolved_revision(name_or_path: str, folder: Path, subfolder: str | None) -> str | None:
    """The commit behind a downloaded folder (the Hub's cache names snapshots by it); `None` for a local one."""
    if Path(name_or_path).is_dir():
        return None
    return (folder.parent if subfolder else folder).name


def local_or_id(name_or_path: str) -> str:
    """References to folders are absolute, so that a checkpoint finds them from anywhere on this machine."""
    path = Path(name_or_path)
    return str(path.resolve()) if path.is_dir() else name_or_path


def build_pipeline(config: TrainingConfig) -> IOMMPipeline:
    r"""
    The pipeline to train: loaded from `config.init_from`, or built around the frozen MLLM and autoencoder, whose
    revisions and hashes it records.

    Raises:
        `OSError`: a frozen part is found nowhere.
        `ValueError`: an unknown preset, or one that needs an MLLM or autoencoder that was not given.
    """
    if config.init_from is not None:
        overridden = ("mllm", "vae", "condition_tokens", "mask_mode", "connector_layers")
        given = [name for name in overridden if getattr(config, name) is not None]
        if given:
            raise ValueError(f"init_from={config.init_from!r} brings its own {', '.join(given)}; leave them out.")
        pipeline = IOMMPipeline.from_pretrained(config.init_from, dtype=torch.float32)
        pin_frozen(pipeline, Path(config.output_dir) / "frozen")
        return pipeline

    preset = get_preset(config.preset)
    mllm_name, vae_name = config.mllm or preset.mllm, config.vae or preset.vae
    if mllm_name is None or vae_name is None:
        missing = "mllm" if mllm_name is None else "vae"
        raise ValueError(
            f"Preset {config.preset!r} has no published {missing}; give the one to use with --{missing} FOLDER"
            " (`make quickstart` makes both for `tiny`)."
        )
    vae_subfolder = config.vae_subfolder if config.vae else preset.vae_subfolder
    mllm_folder = resolve_frozen(mllm_name, config.mllm_revision)
    vae_folder = resolve_frozen(vae_name, config.vae_revision, vae_subfolder)

    processor = IOMMProcessor.from_pretrained(mllm_folder)
    mllm = load_mllm(mllm_folder, dtype=torch.float32)
    overrides = {
        name: getattr(config, name)
        for name in ("condition_tokens", "mask_mode", "connector_layers")
        if getattr(config, name) is not None
    }
    encoder_config = IOMMConfig(
        mllm_config=mllm.config,
        mllm_name_or_path=local_or_id(mllm_name),
        mllm_revision=resolved_revision(mllm_name, mllm_folder, None),
        mllm_hash=hash_weight_files(mllm_folder),
        **preset.condition_config | overrides,
    )
    set_seed(config.seed)
    encoder = IOMMConditionEncoder(encoder_config, mllm=mllm)
    transformer = build_transformer(preset)
    joint_dim = transformer.config.get("joint_attention_dim") or transformer.config.get("cap_feat_dim")
    if joint_dim != encoder_config.hidden_size:
        raise ValueError(
            f"The generator of preset {config.preset!r} takes conditions of width {joint_dim}, but {mllm_name!r} gives"
            f" {encoder_config.hidden_size}."
        )
    return IOMMPipeline(
        text_encoder=encoder,
        processor=processor,
        transformer=transformer,
        vae=AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=preset.shift),
        vae_name_or_path=local_or_id(vae_name),
        vae_subfolder=vae_subfolder,
        vae_revision=resolved_revision(vae_name, vae_folder, vae_subfolder),
        vae_hash=hash_weight_files(vae_folder),
        resolution=preset.resolution,
    )


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
    if PartialState().is_main_process:
        pipeline.text_encoder.mllm.save_pretrained(mllm)
        pipeline.processor.save_pretrained(mllm)
        pipeline.vae.save_pretrained(vae)
    PartialState().wait_for_everyone()
    encoder_config = pipeline.text_encoder.config
    encoder_config.mllm_name_or_path, encoder_config.mllm_revision = str(mllm), None
    encoder_config.mllm_hash = hash_weight_files(mllm)
    pipeline.register_to_config(
        vae_name_or_path=str(vae), vae_subfolder=None, vae_revision=None, vae_hash=hash_weight_files(vae)
    )
