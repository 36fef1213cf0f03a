"""What stops a run, or does not: another strategy than the one asked for, updates that are not finite, losses that leap,
signals.

Ranks decide alike. The gradient's norm and the logged loss are those of all ranks anyway, so the first two cost nothing;
a signal may reach one rank alone, so they ask each other after every step.
"""

import json
import logging
import math
import os
import signal
import statistics
import threading
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env

from .config import TrainingConfig


logger = logging.getLogger(__name__)

USUAL = 20  # rows of the log whose median loss is the usual one


def take_over_fsdp(fully_shard: bool):
    r"""
    Turns a launcher's FSDP into the loop's own (`training.sharding`), before Accelerate hears of it: its plugin becomes DDP on
    CPU ranks without a word, and writes checkpoints that the loop cannot read.

    Args:
        fully_shard (`bool`): Whether the run's settings ask for sharding as well.

    Raises:
        `RuntimeError`: they do not: every rank would hold the whole.

    Example:

    ```python
    >>> from iomm_hf.training.guards import take_over_fsdp
    >>> take_over_fsdp(fully_shard=True)  # in place of `recipes/accelerate/fsdp2.yaml`'s plugin, where that is the launcher
    ```
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if not fully_shard:
        raise RuntimeError(
            "Launched with FSDP, but fully_shard is off, so every rank would hold all weights: set --fully_shard true, or use"
            " recipes/accelerate/ddp.yaml."
        )
    del os.environ["ACCELERATE_USE_FSDP"]


def check_strategy(accelerator: Accelerator, fully_shard: bool = False):
    r"""
    Whether the run is distributed as launcher and settings asked: on CPU ranks Accelerate turns DeepSpeed into DDP without a
    word. FSDP is [`take_over_fsdp`]'s.

    Raises:
        `RuntimeError`: another strategy, or another number of processes, is in force; or one that Accelerate would run in
            a way that the loop's checkpoints do not fit: that would show hours later.
    """
    alone = "WORLD_SIZE" not in os.environ
    if alone and (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        raise RuntimeError(
            f"Slurm started {tasks} processes, but no launcher joins them: each would train alone. Start one task a machine"
            " (srun --ntasks-per-node=1), and in it accelerate launch with recipes/accelerate/multi-node.yaml."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"The launcher started {launched} processes, but this one counts {accelerator.num_processes}: each would train"
            " alone. On CPUs set ACCELERATE_USE_CPU=true; on GPUs there must be one a process."
        )
    strategy = accelerator.distributed_type
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and strategy != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"ACCELERATE_USE_DEEPSPEED asks for DEEPSPEED, but Accelerate runs {strategy.value}: that strategy needs GPUs. Use"
            " recipes/accelerate/ddp.yaml or cpu.yaml; --fully_shard true shards the weights."
        )
    if strategy in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RuntimeError(
            f"Launched with {strategy.value}, whose checkpoints the loop cannot write. Use recipes/accelerate/ddp.yaml; to"
            " shard the weights, set --fully_shard true with it."
        )
    if fully_shard and accelerator.num_processes == 1:
        raise RuntimeError(
            "fully_shard divides the weights among several processes, but there is one. Launch more (recipes/accelerate/),"
            " or turn it off."
        )


def check_global_batch(config: TrainingConfig, num_processes: int):
    """Raises `ValueError` if a step of so many ranks would not have `global_batch_size` samples."""
    batch = config.batch_size * config.gradient_accumulation * num_processes
    if config.global_batch_size not in (None, batch):
        raise ValueError(
            f"global_batch_size is {config.global_batch_size}, but {num_processes} processes x batch_size {config.batch_size} x"
            f" gradient_accumulation {config.gradient_accumulation} are {batch}. Launch another number of processes, or change"
            " one of the three."
        )


class StopSignals:
    r"""
    Turns SIGTERM and SIGINT into a wish that the loop can grant between two steps. A second SIGINT stops at once.

    Example:

    ```python
    >>> import os, signal
    >>> from accelerate import Accelerator
    >>> from iomm_hf.training.guards import StopSignals
    >>> with StopSignals() as signals:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     signals.received(Accelerator(cpu=True))
    'SIGTERM'
    ```
    """

    def __init__(self):
        self._own: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None):
        if self._own is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = number
        os.write(2, b"\nStopping after this step; its checkpoint will be written.\n")  # print may be half-way itself

    def received(self, accelerator: Accelerator) -> str | None:
        """Name of the signal that any rank has received; every rank must call it."""
        number = self._own or 0
        if accelerator.num_processes > 1:
            numbers = torch.tensor([number], device=accelerator.device)
            number = int(accelerator.gather(numbers).max().item())
        return signal.Signals(number).name if number else None


class NonFiniteGuard:
    r"""
    Counts updates that were skipped because their loss or gradient is not finite, and keeps what they were made of.

    Args:
        path (`Path`): JSON lines of them: step, gradient's norm, and each rank's losses and sample keys.
        limit (`int`): So many in a row are too many.
        step (`int`, *optional*, defaults to 0): Steps made so far: those that were skipped right before count on.
    """

    def __init__(self, path: Path, limit: int, step: int = 0):
        self.path, self.limit = path, limit
        self.in_a_row = 0
        skipped = {json.loads(line)["step"] for line in path.read_text().splitlines()} if path.exists() else set()
        while step - self.in_a_row in skipped:
            self.in_a_row += 1

    def check(self, accelerator: Accelerator, step: int, grad_norm: float, losses: dict[str, float], keys: list[str]):
        r"""
        Notes one update; every rank must call it.

        Raises:
            `FloatingPointError`: the last `limit` updates were all skipped.
        """
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        by_rank = gather_object([{"losses": {name: repr(loss) for name, loss in losses.items()}, "keys": keys}])
        if accelerator.is_main_process:
            logger.warning(
                "Step %d: loss or gradient is not finite (norm %s); nothing is updated. Samples: %s",
                step,
                grad_norm,
                self.path,
            )
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "grad_norm": repr(grad_norm), "ranks": by_rank}) + "\n")
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} updates in a row were not finite, the last at step {step}; none was made, and their"
                f" samples are in {self.path}. The newest checkpoint is whole. A lower learning_rate helps most often."
            )


class SpikeGuard:
    r"""
    Stops a run whose logged loss leaps above its usual one; where `save_every` is not below `log_every`, before a checkpoint of the
    wreck is written.

    Args:
        ratio (`float`): The leap that is too large, as a multiple of the median of the last rows; 0 lets all pass.
        losses (`list[float]`, *optional*): Of the rows so far.

    Example:

    ```python
    >>> from iomm_hf.training.guards import SpikeGuard
    >>> SpikeGuard(5.0, [0.3] * 20).check(step=210, loss=1.4)
    ```
    """

    def __init__(self, ratio: float, losses: list[float] | None = None):
        self.ratio = ratio
        self.losses = deque(losses or [], maxlen=USUAL)

    def check(self, step: int, loss: float):
        r"""
        Takes the loss of one more row of the log.

        Raises:
            `FloatingPointError`: it is more than `ratio` times the usual one.
        """
        if self.ratio and len(self.losses) == USUAL and loss > self.ratio * statistics.median(self.losses):
            raise FloatingPointError(
                f"The loss leapt to {loss:.4g} before step {step}, from {statistics.median(self.losses):.4g} (median of"
                f" {USUAL} rows of the log). Start again in a new output_dir, a LoRA from nothing and all else from a checkpoint of"
                " before that row (--init_from), with a lower learning_rate, or raise max_loss_ratio if this was expected."
            )
        self.losses.append(loss)


def warn_of_short_notice(seconds: float):
    r"""
    Warns where torchrun's agent, which `accelerate launch` starts for several processes, would kill the ranks before a
    checkpoint as slow as the last one is written.

    Args:
        seconds (`float`): That the last one took.

    Example:

    ```python
    >>> from iomm_hf.training.guards import warn_of_short_notice
    >>> warn_of_short_notice(0.5)
    ```
    """
    notice = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    if "TORCHELASTIC_RUN_ID" in os.environ and 2 * seconds > notice:
        logger.warning(
            "The checkpoint took %.0f s, and the launcher kills its processes %.0f s after SIGTERM or Ctrl-C: start it with"
            " TORCH_ELASTIC_SHUTDOWN_TIMEOUT=%d in its environment, or a stop may lose what came after the last checkpoint.",
            seconds,
            notice,
            max(120, int(10 * seconds)),
        )


def leave_signals_to_main(worker: int):
    """For a loader's processes: Ctrl-C, `timeout` and schedulers signal a whole group, and the step that is under way still
    needs them. A second SIGTERM ends them: one that hangs gets it from the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
