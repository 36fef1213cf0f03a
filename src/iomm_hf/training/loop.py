"""The one loop that runs both stages and LoRAs, on one process or many, through Accelerate.

`train` reads from top to bottom: build, resume, then step, log, show and save until `max_steps`. A killed run that is
started again by the same command ends with the same weights, averages, optimizer and data order as one never killed.
"""

import json
import logging
import math
import shlex
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from diffusers.optimization import get_scheduler
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm.auto import tqdm

from ..data.buckets import BucketedStream, bucket_sizes
from ..data.collate import IOMMCollator
from ..data.sources import pinned
from ..data.streams import build_stream
from ..pipeline_iomm import IOMMPipeline
from ..presets import get_preset
from ..software import software
from .attention import attention_kernel, check_attention_backend
from .checkpoints import (
    checkpoint_name,
    ema_weights,
    keep_models_out,
    load_checkpoint,
    rotate,
    save_checkpoint,
    save_pipeline,
    whole_folder,
)
from .config import LoraTrainingConfig, TrainingConfig
from .guards import (
    NonFiniteGuard,
    SpikeGuard,
    StopSignals,
    check_global_batch,
    check_strategy,
    leave_signals_to_main,
    take_over_fsdp,
    warn_of_short_notice,
)
from .lora import add_lora, hash_weights, lora_card, reload_base
from .metrics import flops_per_sample, losses_by_group, mean_losses_by_group
from .module import IOMMTrainingModule, local_part
from .optimizers import AveragedWeights, build_optimizers, clip_gradients
from .run_folder import data_commits, hold_folder, keep_log_until, logged_losses, note_resumption, note_start, open_run
from .setup import build_alignment, build_pipeline, check_caches, frozen_on_hub, frozen_references
from .sharding import build_once, gathered, place
from .validation import draw_validation, evaluate


logger = logging.getLogger(__name__)


def train(config: TrainingConfig) -> Path:
    r"""
    Runs one stage.

    Args:
        config ([`PretrainConfig`], [`FinetuneConfig`] or [`LoraTrainingConfig`]): The run's settings.

    Returns:
        `Path` of the finished pipeline, `output_dir/final`, which holds the averaged weights and its frozen parts; of a LoRA,
        that alone and its card.

    Raises:
        `ValueError`: settings that do not fit, or that differ from those of the run to resume.
        `RuntimeError`: the run is not distributed as the launcher asked; another run is at work in the folder, or not all ranks
            see it.
        `FloatingPointError`: too many updates in a row were not finite, or the loss leapt.
        `OSError`: a checkpoint could not be written.
        `SystemExit`: SIGTERM or SIGINT asked it to stop; it has written a checkpoint and exits with 0.
    """
    output_dir = Path(config.output_dir)
    take_over_fsdp(config.fully_shard)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation,
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "tracker")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # Ranks wait while the first one downloads the frozen parts or writes a checkpoint; NCCL's own limit is ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation:
        raise ValueError(
            f"gradient_accumulation={config.gradient_accumulation}, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the"
            f" environment says {accelerator.gradient_accumulation_steps}: unset it."
        )
    check_strategy(accelerator, config.fully_shard)
    check_global_batch(config, accelerator.num_processes)
    set_seed(config.seed)
    with hold_folder(output_dir, accelerator):
        return run(config, output_dir, accelerator)


def run(config: TrainingConfig, output_dir: Path, accelerator: Accelerator) -> Path:
    """[`train`] in a folder of its own."""
    checkpoint = open_run(config, output_dir, accelerator)
    record = output_dir / "run.json"
    opened = config.image_sources if config.mix_ratio > 0 else []
    opened = opened + config.paired_sources if config.mix_ratio < 1 else opened
    commits = data_commits(opened, None if checkpoint is None else record, accelerator)
    running = software()

    # 1. Parts
    if checkpoint is None:
        pipeline = build_once(lambda: build_pipeline(config), accelerator)
        if accelerator.is_main_process:
            base_hash = hash_weights(pipeline) if isinstance(config, LoraTrainingConfig) else None
            note_start(record, config, frozen_references(pipeline), commits, running, base_hash)
    elif isinstance(config, LoraTrainingConfig):
        pipeline = build_once(lambda: reload_base(config, record), accelerator)
    else:
        pipeline = build_once(lambda: IOMMPipeline.from_pretrained(checkpoint, dtype=torch.float32), accelerator)
    resolution = config.resolution or pipeline.resolution
    if resolution % pipeline.size_multiple:
        raise ValueError(f"resolution must be a multiple of {pipeline.size_multiple}, got {resolution}.")
    pipeline.register_to_config(resolution=resolution)

    # 2. Data: every rank reads its own share, so Accelerate need not split or dispatch.
    stream = build_stream(
        [pinned(source, commits) for source in config.image_sources],
        [pinned(source, commits) for source in config.paired_sources],
        config.mix_ratio,
        seed=config.seed,
        block_size=config.shuffle_block,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_caption_bytes=caption_room(pipeline),
    )
    if accelerator.is_main_process:  # the others have no weights yet
        check_caches(stream, pipeline, resolution)
    check_prompts(config.validation_prompts, pipeline)
    collator = IOMMCollator(pipeline.processor, resolution, config.condition_dropout, config.seed)
    samples: IterableDataset = stream
    if config.aspect_ratios:
        sizes = bucket_sizes(config.aspect_ratios, resolution, pipeline.size_multiple)
        samples = BucketedStream(stream, sizes, config.batch_size, seed=config.seed)
    loader = StatefulDataLoader(
        samples,
        batch_size=config.batch_size,
        collate_fn=collator,
        num_workers=config.num_workers,
        drop_last=True,
        worker_init_fn=leave_signals_to_main,
    )

    # 3. What trains
    if config.attention_backend is not None:
        check_attention_backend(config.attention_backend, pipeline, accelerator)
    mask_ratio = config.mask_ratio
    if mask_ratio is None:
        assert config.preset is not None  # filled in by the settings
        mask_ratio = get_preset(config.preset).mask_ratio
    sample_flops = flops_per_sample(config, pipeline, stream, mask_ratio) if config.peak_tflops else 0.0
    if config.mixed_precision == "bf16":
        # Frozen, so nothing is lost in small updates. Weights alone: a bf16 rotary buffer would move every position.
        for parameter in pipeline.text_encoder.mllm.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    module = IOMMTrainingModule(
        pipeline.text_encoder,
        pipeline.transformer,
        pipeline.vae,
        mask_ratio,
        config.timestep_sampling,
        config.timestep_shift,
        config.compile,
        build_alignment(config, pipeline, stream, resolution),
        config.alignment_weight,
    ).train()
    if isinstance(config, LoraTrainingConfig):
        add_lora(module, config)
    if config.gradient_checkpointing:
        module.encoder.activation_checkpointing_enable()
        module.transformer.enable_gradient_checkpointing()
    place(module, accelerator, config.fully_shard)
    # FSDP2 is in place by now: with `evaluation_mode`, autocast is all that Accelerate adds to it, otherwise DDP as well.
    wrapped = accelerator.prepare_model(module, evaluation_mode=config.fully_shard)
    keep_models_out(accelerator)
    optimizers = build_optimizers(config, module)
    schedulers = [
        get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        for optimizer in optimizers
    ]
    weights = [weight for weight in wrapped.parameters() if weight.requires_grad]  # listed once: frozen parts are many
    ema = AveragedWeights(module.trainable_parameters(), decay=config.ema_decay) if config.ema_decay else None

    # 4. Resume
    step = 0
    skipped: Counter[str] = Counter()
    recent: list[dict[str, float]] = []  # losses since the last line of the log
    if checkpoint is not None:
        anew = config.start_anew(checkpoint)
        rank_state, trainer_state = load_checkpoint(checkpoint, accelerator, module, optimizers, ema, otherwise=anew)
        if "recent" not in rank_state:
            raise ValueError(
                f"{checkpoint} was written by an earlier iomm-hf, which did not keep all that an exact resume needs. Go on"
                f" with the version and commit in run.json, or {anew}."
            )
        loader.load_state_dict(rank_state["loader"])
        for scheduler, state in zip(schedulers, trainer_state["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        step, skipped, recent = trainer_state["step"], Counter(rank_state["skipped"]), rank_state["recent"]
        logger.info("Resuming from %s", checkpoint)
        if accelerator.is_main_process:
            note_resumption(record, step, config, trainer_state.get("software"), running)
    if accelerator.is_main_process:
        for name in ("log.jsonl", "nonfinite.jsonl", "evals.jsonl"):
            keep_log_until(output_dir / name, step)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("iomm", config=flat(config.to_dict()))

    # 5. Train
    images_per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    progress = tqdm(
        initial=step, total=config.max_steps, unit="step", disable=not accelerator.is_main_process, smoothing=0.05
    )
    batches = iter(loader)
    sources = [f"{i}: {source.path}" for i, source in enumerate(opened)]
    logged = step
    not_finite = NonFiniteGuard(output_dir / "nonfinite.jsonl", config.max_nonfinite, step)
    spikes = SpikeGuard(config.max_loss_ratio, logged_losses(output_dir / "log.jsonl"))
    clock = time.monotonic()
    signal = None
    with StopSignals() as signals:
        while step < config.max_steps and signal is None:
            losses, grad_norm, keys = update(
                accelerator, wrapped, weights, optimizers, batches, config, len(sources), skipped
            )
            for scheduler in schedulers:
                scheduler.step()
            if ema is not None:
                ema.step([local_part(weight) for weight in weights])
            step += 1
            progress.update()
            not_finite.check(accelerator, step, grad_norm, losses, keys)
            if math.isfinite(grad_norm):
                recent.append(losses)

            if step % config.log_every == 0 or step == config.max_steps:
                now = time.monotonic()
                means = mean_over_ranks(accelerator, recent) if recent else {}
                row = {
                    "step": step,
                    "images": step * images_per_step,
                    **{name: value for name, value in means.items() if "/" not in name},
                    **mean_losses_by_group(means, sources),
                    "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                    "learning_rate": schedulers[-1].get_last_lr()[-1],  # the generator's
                    "images_per_second": (step - logged) * images_per_step / (now - clock),
                    "skipped": dict(total(skipped)),
                }
                if config.peak_tflops:
                    peak = config.peak_tflops * 1e12 * accelerator.num_processes
                    row["utilisation"] = row["images_per_second"] * sample_flops / peak
                if accelerator.device.type == "cuda":
                    row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                recent, logged, clock = [], step, now
                if "loss" in row:
                    progress.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{row['images_per_second']:.1f}")
                    spikes.check(step, row["loss"])
                accelerator.log(numbers(row), step=step)
                if accelerator.is_main_process:
                    with (output_dir / "log.jsonl").open("a") as log:
                        log.write(json.dumps(row) + "\n")

            paused = time.monotonic()
            if config.validate_every and config.validation_prompts and step % config.validate_every == 0:
                with ema_weights(ema, module), gathered(module), torch.compiler.set_stance("force_eager"):
                    draw_validation(config, pipeline, accelerator, output_dir, step, resolution)
                module.train()

            if config.eval_every and step % config.eval_every == 0:
                with ema_weights(ema, module), gathered(module), torch.compiler.set_stance("force_eager"):
                    evaluate(config, pipeline, module, accelerator, output_dir, step)
                module.train()

            signal = signals.received(accelerator)
            if step % config.save_every == 0 or step == config.max_steps or signal:
                trainer_state = {
                    "step": step,
                    "num_processes": accelerator.num_processes,
                    "schedulers": [scheduler.state_dict() for scheduler in schedulers],
                    "config": config.to_dict(),
                    "software": running,
                }
                rank_state = {"loader": loader.state_dict(), "skipped": skipped, "recent": recent}
                path = output_dir / checkpoint_name(step)
                began = time.monotonic()
                save_checkpoint(path, accelerator, pipeline, module, optimizers, ema, rank_state, trainer_state)
                if accelerator.is_main_process:
                    warn_of_short_notice(time.monotonic() - began)
                    rotate(output_dir, config.keep_checkpoints)
            clock += time.monotonic() - paused  # speed is that of training alone
    progress.close()
    if signal is not None and step < config.max_steps:
        (wrapped,) = accelerator.free_memory(wrapped)  # first, as below
        accelerator.end_training()
        if accelerator.is_main_process:
            print(f"Stopped by {signal} after step {step}, whose checkpoint is written. {how_to_go_on(accelerator)}")
        raise SystemExit(0)

    # 6. The result: whole in itself, but for frozen parts that the Hub holds; or a LoRA
    final = output_dir / "final"
    adapts = isinstance(config, LoraTrainingConfig)
    if config.mixed_precision == "bf16" and not adapts and not frozen_on_hub(pipeline) and accelerator.is_main_process:
        pipeline.text_encoder._load_frozen(dtype=torch.float32)  # as it came, not rounded to bf16
    with whole_folder(final, accelerator) as folder, ema_weights(ema, module):
        save_pipeline(folder, accelerator, pipeline, module, include_frozen=not frozen_on_hub(pipeline))
        if isinstance(config, LoraTrainingConfig) and accelerator.is_main_process:
            card = lora_card(config, module, step, samples=step * images_per_step)
            (folder / "README.md").write_text(card, encoding="utf-8")
    all_skipped = total(skipped)
    if all_skipped:
        logger.warning("Bad samples skipped: %s", dict(all_skipped))
    # DDP first: freed after the process group, it would wait for gloo's threads while holding the lock that they wait for.
    (wrapped,) = accelerator.free_memory(wrapped)
    accelerator.end_training()
    return final


def how_to_go_on(accelerator: Accelerator) -> str:
    """What a person types to resume; a process does not know the launcher's flags."""
    if accelerator.num_processes == 1:
        return f"To go on: {shlex.join(sys.orig_argv)}"
    number, command = accelerator.num_processes, shlex.join(sys.argv)
    return f"To go on, start it again with the same launcher and {number} processes: {command}"


def update(
    accelerator, wrapped, weights, optimizers, batches, config: TrainingConfig, num_sources: int, skipped: Counter
) -> tuple[dict[str, float], float, list[str]]:
    """One optimizer step over `gradient_accumulation` batches, left out if the gradient is not finite. Returns this rank's
    mean losses, the norm of all ranks' gradient and the keys of this rank's samples."""
    losses: list[dict[str, float]] = []
    keys: list[str] = []
    finite = True
    for _ in range(config.gradient_accumulation):
        started = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - started
        batch = {
            name: value.to(accelerator.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        skipped.update(batch["skipped"])
        keys += batch["keys"]
        kernel = attention_kernel(accelerator.device, accelerator.mixed_precision, config.attention_backend)
        with accelerator.accumulate(wrapped), kernel:
            terms, samples = wrapped(batch)
            values = {name: term.item() for name, term in terms.items()}
            finite = finite and all(map(math.isfinite, values.values()))
            losses.append(
                values
                | losses_by_group(samples["losses"], samples["timesteps"], batch["source"], num_sources)
                | {"seconds_waiting": waited}
            )
            accelerator.backward(sum(terms.values()))
    grad_norm = clip_gradients(weights, config.max_grad_norm)
    if not accelerator.gather(torch.tensor([float(finite)], device=accelerator.device)).all():
        grad_norm = math.nan  # a loss can overflow whose gradient does not
    for optimizer in optimizers:
        if math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad()
    return mean_of(losses), grad_norm, keys


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each name."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def mean_over_ranks(accelerator: Accelerator, rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each name, over these rows of every rank."""
    means = {name: torch.tensor(mean).to(accelerator.device) for name, mean in mean_of(rows).items()}
    return {name: mean.item() for name, mean in accelerator.reduce(means, "mean").items()}


def caption_room(pipeline: IOMMPipeline) -> int:
    """Tokens that a caption may take beside its wording and the queries."""
    encoder_config = pipeline.text_encoder.config
    rows = encoder_config.get_text_config().max_position_embeddings - encoder_config.num_queries
    return rows - text_tokens(pipeline, "")


def text_tokens(pipeline: IOMMPipeline, caption: str) -> int:
    """Of a caption in its wording."""
    return pipeline.processor.encode([pipeline.processor.text_to_image(caption)])["input_ids"].shape[1]


def check_prompts(prompts: list[str], pipeline: IOMMPipeline):
    """Refuses validation prompts that could not be drawn, before a step is made that they would cost."""
    room = caption_room(pipeline)
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"A validation prompt is blank: {prompts}.")
        tokens = text_tokens(pipeline, prompt) - text_tokens(pipeline, "")
        if tokens > room:
            raise ValueError(f"A validation prompt has {tokens} tokens, and {room} fit: {prompt[:80]!r}...")


def total(counts: Counter) -> Counter:
    """Sum over ranks; every rank must call it."""
    return sum(gather_object([counts]), Counter())


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row of the log as trackers take it."""
    flattened: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flattened |= {f"{name}/{key}": number for key, number in value.items()}
        elif value is not None and name != "step":  # a tracker's own
            flattened[name] = value
    return flattened


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers and strings."""
    return {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in settings.items()}
