"""What the two recipes that make the small frozen parts share: a budget of steps or minutes, and a log."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm


class Budget:
    r"""
    Iterates over the steps of a training that ends after `max_steps` or, if that comes first, `minutes`, and sets the
    learning rate: linear warm-up, constant, then linear to a twentieth over the last 40 %. Only steps are repeatable.

    Args:
        optimizer (`torch.optim.Optimizer`): Whose rate to set; its own rate is the peak.
        max_steps (`int`): Most steps.
        minutes (`float`, *optional*): Time limit.
        log (`Path`, *optional*): A file that gets a JSON line every 50 steps.
        title (`str`): Name on the progress bar.

    Raises:
        `ValueError`: a budget that is not positive.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_steps: int,
        minutes: float | None = None,
        log: Path | None = None,
        title: str = "Training",
        warmup: int = 50,
    ):
        if max_steps < 1 or (minutes is not None and minutes <= 0):
            raise ValueError(f"max_steps and minutes must be positive, got {max_steps} and {minutes}.")
        self.optimizer, self.max_steps, self.minutes, self.log, self.title = optimizer, max_steps, minutes, log, title
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
        for step in range(self.max_steps):
            seconds = time.monotonic() - started
            done = max(step / self.max_steps, seconds / (60 * self.minutes) if self.minutes is not None else 0.0)
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
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.optimizer.step()
