"""What the recipes that make the small frozen parts share: settings and end of the warm-ups by dense labels, a budget, a log."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.shapes import TASKS
from ..files import write_json
from ..processing_iomm import IOMMProcessor
from .checkpoints import whole_folder


def check_budget(minutes: float | None, **steps: int | None):
    """Raises a `ValueError` unless either `minutes` or each number of `steps` is given, and what is given is positive."""
    given = [value for value in steps.values() if value is not None]
    if (minutes is None) != (len(given) == len(steps)) or (minutes is not None and given):
        raise ValueError(f"Give either minutes or {' and '.join(steps)}, got minutes={minutes} and {steps}.")
    if any(value <= 0 for value in (minutes, *given) if value is not None):
        raise ValueError(f"A budget must be positive, got minutes={minutes} and {steps}.")


@dataclass(kw_only=True)
class WarmUpConfig:
    """Settings of a warm-up by dense labels, of scenes of the shapes world."""

    tasks: list[str] = field(
        default_factory=lambda: list(TASKS), metadata={"help": "Kinds of scenes; see recipes/make_shapes.py."}
    )
    num_scenes: int = field(default=8000, metadata={"help": "Scenes to learn from, drawn once."})
    held_out: int = field(default=512, metadata={"help": "Further scenes, kept for the measurement."})
    batch_size: int = field(default=32, metadata={"help": "Scenes a step."})
    max_steps: int | None = field(default=None, metadata={"help": "Number of steps; repeatable."})
    minutes: float | None = field(default=None, metadata={"help": "Time to train, instead of max_steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of AdamW."})
    seed: int = field(default=0, metadata={"help": "Everything random derives from it."})

    def __post_init__(self):
        if not 1 <= self.batch_size <= self.num_scenes or self.held_out < 1:
            raise ValueError(
                "batch_size must be between 1 and num_scenes, and held_out at least 1, got"
                f" {self.batch_size}, {self.num_scenes} and {self.held_out}."
            )
        check_budget(self.minutes, max_steps=self.max_steps)


def save_mllm(output: Path, mllm: PreTrainedModel, processor: IOMMProcessor, summary: dict[str, Any]):
    """Writes a warmed-up MLLM in InternVL's layout, with what was measured on held-out scenes beside it."""
    with whole_folder(output, Accelerator(cpu=True)) as folder:
        mllm.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(folder / "summary.json", summary)
    print(f"{output}: {summary}")


class Budget:
    r"""
    Iterates over the steps of a training that lasts `max_steps` or `minutes`, and sets the learning rate: linear
    warm-up, constant, then linear to a twentieth over the last 40 %. Only a budget of steps is repeatable: one of
    minutes ends, and lowers the rate, by the clock.

    Args:
        optimizer (`torch.optim.Optimizer`): Whose rate to set; its own rate is the peak.
        max_steps (`int`, *optional*): Number of steps.
        minutes (`float`, *optional*): Time instead of steps.
        log (`Path`, *optional*): A file that gets a JSON line every 50 steps.
        title (`str`): Name on the progress bar.

    Raises:
        `ValueError`: both budgets, none, or one that is not positive.
        `FloatingPointError`: the loss is not finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_steps: int | None = None,
        minutes: float | None = None,
        log: Path | None = None,
        title: str = "Training",
        warmup: int = 50,
    ):
        check_budget(minutes, max_steps=max_steps)
        self.optimizer, self.log, self.title = optimizer, log, title
        self.max_steps = math.inf if max_steps is None else max_steps
        self.max_seconds = math.inf if minutes is None else 60 * minutes
        self.peak, self.warmup = optimizer.param_groups[0]["lr"], warmup
        self.losses: list[float] = []
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("")

    def __iter__(self) -> Iterator[int]:
        started = time.monotonic()
        bar = tqdm(
            total=100, desc=self.title, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        )
        for step in itertools.count():
            seconds = time.monotonic() - started
            done = max(step / self.max_steps, seconds / self.max_seconds)
            if done >= 1:
                break
            rate = self.peak * min(1.0, (step + 1) / self.warmup, max(0.05, (1 - done) / 0.4))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield step
            if step % 50 == 49:
                loss = sum(self.losses[-50:]) / 50
                bar.set_postfix_str(f"step {step + 1}, loss {loss:.4f}")
                if self.log is not None:
                    with self.log.open("a") as log:
                        row = {"step": step + 1, "seconds": round(seconds, 1), "learning_rate": rate, "loss": loss}
                        log.write(json.dumps(row) + "\n")
            bar.update(100 * done - bar.n)
        bar.update(100 - bar.n)
        bar.close()

    def update(self, loss: torch.Tensor, max_grad_norm: float = 1.0):
        """One optimizer step down `loss`, with clipped gradients."""
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise FloatingPointError(
                f"The loss is {self.losses[-1]} at step {len(self.losses)}; nothing was saved. Lower the learning_rate."
            )
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.optimizer.step()
