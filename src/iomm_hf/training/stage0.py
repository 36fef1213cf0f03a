"""What the two recipes that make the small frozen parts share: a budget of steps or minutes, and a log."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm


def check_budget(minutes: float | None, **steps: int | None):
    """Raises a `ValueError` unless either `minutes` or each number of `steps` is given, and what is given is positive."""
    given = [value for value in steps.values() if value is not None]
    if (minutes is None) != (len(given) == len(steps)) or (minutes is not None and given):
        raise ValueError(f"Give either minutes or {' and '.join(steps)}, got minutes={minutes} and {steps}.")
    if any(value <= 0 for value in (minutes, *given) if value is not None):
        raise ValueError(f"A budget must be positive, got minutes={minutes} and {steps}.")


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
