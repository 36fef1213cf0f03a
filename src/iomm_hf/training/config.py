"""The settings of a run, as one typed table that YAML files and flags fill (`TrlParser`).

Defaults are the paper's for IOMM-B unless the help says "our choice". Whatever could change the numbers a run computes is
compared when it resumes; the few fields in `FREE_ON_RESUME` may differ, and `max_steps` where the rate does not depend on it.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from ..data.buckets import parse_aspect_ratio
from ..data.sources import SourceConfig
from ..flow_matching import TimestepSampling
from ..shipped import shipped_model


# May change between the parts of one run: they decide when it stops and what it shows, not what it computes.
FREE_ON_RESUME = {
    "resume",
    "save_every",
    "keep_checkpoints",
    "validate_every",
    "validation_prompts",
    "validation_steps",
    "validation_guidance",
    "eval_every",
    "eval_pictures",
    "log_every",
    "tracker",
    "peak_tflops",
    "max_nonfinite",
    "max_loss_ratio",
}
Schedule: TypeAlias = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
ENDLESS_SCHEDULERS = ("constant", "constant_with_warmup")  # all others spread the rate over `max_steps`


def setting(default: Any, help: str) -> Any:
    """A documented field."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """Settings shared by both stages; each field's help is its documentation."""

    output_dir: str = setting("outputs/run", "Folder of the run: checkpoints, log, pictures, `final`.")

    # Model
    preset: str | None = setting(
        None, "Size to build: tiny, base, large or xl; with init_from, the size of that. Default: base."
    )
    init_from: str | None = setting(
        None,
        "Pipeline folder or Hub id to start from, such as stage 1's `final`; replaces `mllm`, `vae` and what `preset` builds.",
    )
    mllm: str | None = setting(None, "Frozen MLLM: folder or Hub id in InternVL's layout. Default: the preset's.")
    mllm_revision: str | None = setting(None, "Revision of `mllm`; resolved and recorded when the run starts.")
    vae: str | None = setting(None, "Frozen autoencoder: folder or Hub id. Default: the preset's.")
    vae_subfolder: str | None = setting(None, "Its folder inside `vae`.")
    vae_revision: str | None = setting(None, "Revision of `vae`.")
    condition_tokens: str | None = setting(
        None, "Rows that the generator sees: queries or all. Default: the preset's."
    )
    mask_mode: str | None = setting(None, "What becomes of masked image tokens: drop or zero. Default: the preset's.")
    num_queries: int | None = setting(
        None, "Learned queries; 0: none, the MLLM's own rows (needs condition_tokens all). Default: the preset's."
    )
    adapter_type: str | None = setting(
        None, "residual (the paper's adapter) or plain (learned queries alone). Default: the preset's."
    )
    connector_layers: int | None = setting(None, "Bidirectional layers behind the MLLM. Default: the preset's.")

    # Data. In YAML a source is a path or a mapping of SourceConfig's fields; as flags, paths.
    images: list[str] = setting([], "Sources of pictures without text.")
    pairs: list[str] = setting([], "Sources of pictures with text; each needs a caption_column.")
    mix_ratio: float = setting(1.0, "Share of image-only samples (the paper's lambda); the others are pairs.")
    resolution: int | None = setting(
        None, "Side of the pictures, px: shorter edge resized, centre cropped. Default: the preset's."
    )
    aspect_ratios: list[str] | None = setting(
        None,
        "Ratios of width to height that batches may have, such as 3:4 1:1 4:3, each with the area of resolution squared;"
        " a picture goes to the nearest. Not with cached sources. Default: all pictures are squares (paper).",
    )
    shuffle_block: int = setting(1024, "Samples read and shuffled at a time (our choice).")
    num_workers: int = setting(2, "Loader processes a rank.")
    condition_dropout: float = setting(0.1, "Share of samples trained without condition, for guidance (our choice).")

    # Objective
    mask_ratio: float | None = setting(None, "Share r of image tokens hidden, in [0, 1). Default: the preset's.")
    timestep_sampling: TimestepSampling = setting("uniform", "Law of t: uniform (paper) or logit_normal.")
    timestep_shift: float = setting(1.0, "Moves training times towards noise; 1 leaves them (paper).")
    alignment_weight: float = setting(
        0.0,
        "Weight of the alignment of a Flux's or U-Net's hidden states with the cached vision tokens (REPA; 0.5 is usual,"
        " 0 the paper).",
    )

    # Optimisation
    batch_size: int = setting(16, "Samples a rank and forward pass. The paper's global batch: 1024 (B), 512 (L).")
    gradient_accumulation: int = setting(1, "Forward passes an optimizer step.")
    global_batch_size: int | None = setting(
        None,
        "Samples an optimizer step, of all ranks: a run that would have others is refused. Default: whatever they are.",
    )
    max_steps: int = setting(
        1000, "Optimizer steps of the run. A resumed one may have more or fewer where lr_scheduler is a constant one."
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw (the paper's B and L), or muon (its XL): Muon for matrices, AdamW for the rest."
    )
    learning_rate: float = setting(1e-4, "Peak rate; the `tiny` generator likes about 2e-3.")
    adapter_learning_rate: float | None = setting(
        None,
        "Peak rate of adapter and connector. Default: learning_rate. At rates far above the paper's 1e-4 the adapter's"
        " output outgrows what the MLLM's layers add to it, and the MLLM is bypassed.",
    )
    adam_beta1: float = setting(0.9, "AdamW beta 1.")
    adam_beta2: float = setting(0.95, "AdamW beta 2.")
    weight_decay: float = setting(0.0, "AdamW weight decay.")
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.")
    max_nonfinite: int = setting(
        10,
        "Updates in a row that may be left out because their gradient is not finite; then the run stops (our choice).",
    )
    max_loss_ratio: float = setting(
        5.0, "The run stops where the logged loss is this many times its usual one; 0: never (our choice)."
    )
    lr_scheduler: Schedule = setting("constant_with_warmup", "A schedule of diffusers (our choice).")
    warmup_steps: int = setting(100, "Steps of linear warm-up (our choice).")
    ema_decay: float = setting(0.999, "EMA of the trained weights; 0 turns it off (the paper's L and XL).")
    mixed_precision: Literal["no", "bf16"] = setting("no", "Autocast: no or bf16. Trained weights stay float32.")
    compile: Literal["none", "blocks", "whole"] = setting(
        "none",
        "Compile the generator for training with torch.compile: whole, or block by block, each kind once (our choice). It needs a"
        " C++ compiler on CPUs.",
    )
    attention_backend: str | None = setting(
        None,
        "diffusers' attention backend for training a Flux or Z-Image, such as _native_flash or _native_cudnn (our choice); it is"
        " tried first. Default: PyTorch's own choice, on CUDA without cuDNN's.",
    )
    fully_shard: bool = setting(
        False,
        "Divide trained weights, gradients, optimizer states and averages among the ranks (FSDP2), where one device cannot hold"
        " them.",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    seed: int = setting(0, "Everything random derives from it.")

    # Keeping, showing
    resume: bool = setting(True, "Continue from the newest checkpoint in output_dir, exactly.")
    save_every: int = setting(1000, "Steps between checkpoints.")
    keep_checkpoints: int = setting(2, "Newest checkpoints that are kept.")
    validate_every: int = setting(500, "Steps between validation pictures; 0 turns them off.")
    validation_prompts: list[str] = setting([], "Prompts of the validation pictures.")
    validation_steps: int = setting(20, "Sampling steps of a validation picture.")
    validation_guidance: float = setting(3.0, "Guidance scale of a validation picture.")
    eval_every: int = setting(
        0, "Steps between scores on a fixed part of the shapes benchmark, which keep the best in `best`; 0: none."
    )
    eval_pictures: int = setting(16, "Pictures of each of its six tasks.")
    log_every: int = setting(10, "Steps between lines of log.jsonl and the trackers.")
    tracker: str = setting("none", "Accelerate tracker: tensorboard, wandb, trackio, ... or none.")
    peak_tflops: float | None = setting(
        None,
        "Peak of one device in the run's precision, TFLOP/s, as its maker states it (H100 SXM in bf16: 989). Then the log has"
        " `utilisation`, the share of it that the counted FLOPs reach.",
    )

    def __post_init__(self):
        check_choices(self)
        for name in ("images", "pairs", "validation_prompts", "aspect_ratios"):
            if isinstance(value := getattr(self, name), str | dict):  # otherwise read letter by letter, or key by key
                raise ValueError(f"{name} must be a list, got {value!r}: put it in brackets.")
        _ = self.image_sources, self.paired_sources  # refuses bad ones at once
        for name in ("warmup_steps", "num_workers", "seed", "weight_decay", "validate_every", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        positive = (
            "batch_size",
            "gradient_accumulation",
            "max_steps",
            "timestep_shift",
            "learning_rate",
            "max_grad_norm",
            "max_nonfinite",
        )
        for name in (
            *positive,
            "save_every",
            "keep_checkpoints",
            "log_every",
            "validation_steps",
            "shuffle_block",
            "eval_pictures",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.adapter_learning_rate is not None and self.adapter_learning_rate <= 0:
            raise ValueError(f"adapter_learning_rate must be positive, got {self.adapter_learning_rate}.")
        for name in ("resolution", "global_batch_size"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}; leave it out for the default.")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(
                f"peak_tflops must be positive, got {self.peak_tflops}; leave it out to log no utilisation."
            )
        if self.preset is None:
            if self.init_from is not None and self.mask_ratio is None:
                raise ValueError(
                    f"init_from={self.init_from!r} does not say which share of image tokens to hide: give a mask_ratio, or"
                    " the preset of its size (tiny, base, large or xl), whose share is taken."
                )
            self.preset = "base" if self.init_from is None else None
        if self.mask_ratio is not None and not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {self.mask_ratio}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
        if self.max_loss_ratio < 0:
            raise ValueError(f"max_loss_ratio must be 0 or more, got {self.max_loss_ratio}.")
        if self.alignment_weight < 0:
            raise ValueError(f"alignment_weight must be 0 or more, got {self.alignment_weight}.")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}.")
        if not 0 <= self.mix_ratio <= 1:
            raise ValueError(f"mix_ratio must be in [0, 1], got {self.mix_ratio}.")
        for ratio in self.aspect_ratios or []:
            parse_aspect_ratio(ratio)
        if self.vae is None and self.vae_subfolder is not None:
            raise ValueError(f"vae_subfolder={self.vae_subfolder!r} is a folder inside `vae`, which is missing.")
        if self.fully_shard and self.compile != "none":
            raise ValueError("compile has not been tried on sharded weights: turn off either it or fully_shard.")

    @property
    def image_sources(self) -> list[SourceConfig]:
        return [as_source(source) for source in self.images]

    @property
    def paired_sources(self) -> list[SourceConfig]:
        return [as_source(source) for source in self.pairs]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def start_anew(self, checkpoint: Path) -> str:
        """What to do where a run in `checkpoint` does not go on."""
        return f"start a new output_dir with --init_from {checkpoint}"


@dataclass
class PretrainConfig(TrainingConfig):
    """Stage 1: pictures alone."""

    def __post_init__(self):
        super().__post_init__()
        if self.pairs or self.mix_ratio != 1:
            raise ValueError(
                "Image-only pre-training reads `images` alone, but `pairs` or a mix_ratio below 1 were given. Use"
                " recipes/finetune_mixed.py for them."
            )
        if not self.images:
            raise ValueError("Give at least one source of pictures: --images FOLDER, or `images:` in the YAML file.")


@dataclass
class FinetuneConfig(TrainingConfig):
    """Stage 2: pairs and pictures, mixed."""

    batch_size: int = setting(
        16, "Samples a rank and forward pass. The paper's global batch: 256 (512 px), 96 (1024 px)."
    )
    mix_ratio: float = setting(0.5, "Share of image-only samples (the paper's lambda); the others are pairs.")

    def __post_init__(self):
        super().__post_init__()
        if self.mix_ratio < 1 and not self.pairs:
            raise ValueError(
                f"mix_ratio={self.mix_ratio} needs pairs: --pairs in the YAML file, with a caption_column."
            )
        if self.mix_ratio > 0 and not self.images:
            raise ValueError(f"mix_ratio={self.mix_ratio} needs pictures without text: --images FOLDER.")


@dataclass
class LoraTrainingConfig(TrainingConfig):
    """A LoRA: a finished pipeline learns from a few pictures, with text or without; its own weights stay as they are."""

    output_dir: str = setting("outputs/lora", "Folder of the run: checkpoints, log, pictures, `final`.")
    init_from: str | None = setting(
        None, "Pipeline folder or Hub id to adapt. Default: the tiny model that comes with the package."
    )
    lora_rank: int = setting(16, "Rank r of the LoRA (our choice).")
    lora_alpha: int | None = setting(None, "The LoRA is scaled by alpha / r. Default: r.")
    lora_targets: list[str] = setting(
        ["to_q", "to_k", "to_v", "to_out.0"],
        "Layers of the generator that it changes, by the ends of their names. Default: those of every attention.",
    )
    lora_on_adapter: bool = setting(False, "Also adapts the condition encoder's adapter and connector.")
    mix_ratio: float = setting(
        0.5, "Share of image-only samples where there are `pairs` as well; otherwise all or none."
    )
    mask_ratio: float | None = setting(
        0.85, "Share r of image tokens hidden, in [0, 1). What is shown of a picture need not be learned (our choice)."
    )
    condition_dropout: float = setting(
        0.3,
        "Share of samples trained without condition: what they teach carries over to texts that nobody wrote (our choice).",
    )
    batch_size: int = setting(8, "Samples a rank and forward pass (our choice).")
    max_steps: int = setting(500, "Optimizer steps of the run (our choice).")
    warmup_steps: int = setting(20, "Steps of linear warm-up (our choice).")
    ema_decay: float = setting(0.0, "EMA of the LoRA; 0 turns it off (our choice: such runs are short).")
    save_every: int = setting(250, "Steps between checkpoints.")

    def __post_init__(self):
        if not self.images and not self.pairs:
            raise ValueError("Give pictures, --images FOLDER, or pictures with text, `pairs:` in the YAML file.")
        if not (self.images and self.pairs):
            self.mix_ratio = 1.0 if self.images else 0.0
        if self.init_from is None:
            self.init_from = str(shipped_model())
        super().__post_init__()
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be positive, got {self.lora_rank}.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not self.lora_targets:
            raise ValueError("lora_targets names no layer; give the ends of some layers' names, such as to_q to_v.")
        if self.optimizer != "adamw":
            raise ValueError(f"A LoRA trains with adamw, got optimizer={self.optimizer!r}.")
        if self.fully_shard:
            raise ValueError("fully_shard divides what trains, and a LoRA is small: leave it out (DDP serves).")
        if self.peak_tflops is not None:
            raise ValueError(
                "peak_tflops counts what training all weights costs, which a LoRA does not: leave it out."
            )

    def start_anew(self, checkpoint: Path) -> str:
        return "choose another output_dir and start from nothing (a LoRA's checkpoint is no pipeline to start from)"


def check_choices(settings: Any):
    r"""
    Checks a dataclass's fields of type `Literal`: argparse checks the flags', not what a YAML file says.

    Raises:
        `ValueError`: a value that is none of its field's.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and (value := getattr(settings, name)) not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}.")


def as_source(source: Any) -> SourceConfig:
    """A source as YAML, flags, code or a saved run give it."""
    if isinstance(source, SourceConfig):
        return source
    if isinstance(source, str):
        return SourceConfig(source)
    unknown = set(source) - {f.name for f in fields(SourceConfig)}
    if unknown or "path" not in source:
        raise ValueError(
            f"A source needs `path` and takes {', '.join(f.name for f in fields(SourceConfig))}; got {dict(source)}."
        )
    return SourceConfig(**source)


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    r"""
    What a resumed run may not change but did, as readable lines.

    Args:
        saved (`dict`): Settings as the checkpoint holds them.
        now (`dict`): Those of the run that would go on.

    Example:

    ```python
    >>> from iomm_hf.training.config import PretrainConfig, changed_settings
    >>> short, long = (PretrainConfig(images=["pictures"], lr_scheduler="cosine", max_steps=n) for n in (10, 20))
    >>> changed_settings(short.to_dict(), long.to_dict())
    ['max_steps: 10 -> 20, over which lr_scheduler cosine spreads the rate']
    ```
    """
    free = FREE_ON_RESUME | {"output_dir"}
    why = {}
    if now["lr_scheduler"] in ENDLESS_SCHEDULERS:
        free |= {"max_steps"}
    else:
        why["max_steps"] = f", over which lr_scheduler {now['lr_scheduler']} spreads the rate"
    if now["init_from"] is not None and now["mask_ratio"] is not None:
        free |= {"preset"}  # decides nothing there
    return [
        f"{name}: {saved.get(name)!r} -> {value!r}{why.get(name, '')}"
        for name, value in now.items()
        if name not in free and saved.get(name) != value
    ]
