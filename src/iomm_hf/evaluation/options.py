"""What every recipe that scores checkpoints lets its user choose."""

from dataclasses import dataclass, field

from ..shipped import shipped_model


@dataclass
class ScoringOptions:
    """
    Which checkpoints to score, and how they draw.

    Raises:
        `ValueError`: an entry of `beside` without a name of its own.

    Example:

    ```python
    >>> ScoringOptions(beside=["pairs=outputs/pairs/final"]).rivals
    {'pairs': 'outputs/pairs/final'}
    ```
    """

    checkpoint: str = field(
        default_factory=lambda: str(shipped_model()),
        metadata={"help": "Pipeline folder or Hub id. Default: the shipped model."},
    )
    num_inference_steps: int = field(default=30, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Strength of guidance."})
    beside: list[str] = field(
        default_factory=list, metadata={"help": "Rivals to score the same way, each as NAME=FOLDER_OR_ID."}
    )

    def __post_init__(self):
        self.rivals = dict(rival.split("=", 1) for rival in self.beside if "=" in rival)
        if len(self.rivals) < len(self.beside):
            raise ValueError(f"Each of `beside` needs its own NAME=FOLDER_OR_ID, got {self.beside}.")

    @property
    def sampling(self) -> dict[str, float]:
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
