"""Two things timed in turn, so that whatever else the machine does falls on both, and the ratio of their times."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import trange


@dataclass(frozen=True)
class Ratio:
    """Median seconds of both, and the median of their ratios round by round with its quartiles."""

    first: float
    second: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int

    @classmethod
    def of(cls, ones: list[float], twos: list[float]) -> "Ratio":
        """From the times of each round."""
        ratios = [one / two for one, two in zip(ones, twos, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        medians = (statistics.median(times) for times in (ones, twos, ratios))
        return cls(*medians, (low, high), len(ratios))

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.quartiles[0]:.3f}, {self.quartiles[1]:.3f}] ({self.first:.3f} s / {self.second:.3f} s)"


def seconds(function: Callable[[], Any]) -> float:
    """One run, to its end on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(first: Callable[[], Any], second: Callable[[], Any], rounds: int = 10, label: str = "") -> Ratio:
    """Times both in turn, after one run of each that does not count."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in trange(rounds, desc=label, leave=False)]
    return Ratio.of(*map(list, zip(*times, strict=True)))


def saved_bytes(function: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """What autograd keeps for the backward pass of one run, parameters left out, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
        size = sum(kept.values())
        del result
    return size


def record(name: str, results: dict[str, Any], folder: str = "benchmarks/results"):
    """Writes `name.json` with the machine's words for itself, and prints the results."""
    path = Path(folder, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    plain = {key: asdict(value) if isinstance(value, Ratio) else value for key, value in results.items()}
    machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps(machine | plain, indent=2) + "\n")
    for key, value in results.items():
        print(f"{key:48} {value}")
    print(f"Wrote {path}")
