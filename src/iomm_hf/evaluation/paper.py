"""The paper's published figures, to stand in a column of their own beside measured ones: never measured here.

Sun, Xie, Lin, "Rethinking UMM Visual Generation", arXiv 2603.16139v1: GenEval by task, DPG-Bench and WISE of its table of results, and
the overall scores of ImgEdit-Bench without any editing data. Baselines are as that paper reports them.
"""

from dataclasses import dataclass

from ..data.shapes import TASKS


@dataclass(frozen=True)
class PaperRow:
    """A model's row: benchmark scores by name, with GenEval's tasks by theirs."""

    name: str
    overall: float
    tasks: dict[str, float]


def _row(name: str, overall: float, *tasks: float) -> PaperRow:
    return PaperRow(name, overall, dict(zip(TASKS, tasks, strict=False)))


PAPER: dict[str, list[PaperRow]] = {
    "geneval": [  # single_object, two_object, counting, colors, position, color_attr
        _row("IOMM-B 512", 0.89, 0.99, 0.92, 0.83, 0.94, 0.91, 0.75),
        _row("IOMM-B 1024", 0.87, 0.99, 0.91, 0.75, 0.93, 0.88, 0.75),
        _row("IOMM-L 512", 0.87, 0.99, 0.91, 0.82, 0.94, 0.85, 0.72),
        _row("IOMM-L 1024", 0.85, 1.00, 0.91, 0.71, 0.92, 0.78, 0.78),
        _row("BAGEL-7B", 0.88, 0.98, 0.95, 0.84, 0.95, 0.78, 0.77),
        _row("BLIP3-o-8B", 0.84),
        _row("MetaQuery-XL", 0.80),
    ],
    "dpg": [
        _row("IOMM-B 512", 82.95),
        _row("IOMM-B 1024", 80.71),
        _row("IOMM-L 512", 76.09),
        _row("IOMM-L 1024", 72.26),
        _row("BLIP3-o-8B", 81.60),
        _row("MetaQuery-XL", 82.05),
    ],
    "wise": [  # the legacy version: the paper predates the verified one
        _row("IOMM-B 512", 0.55),
        _row("IOMM-B 1024", 0.50),
        _row("IOMM-L 512", 0.53),
        _row("IOMM-L 1024", 0.48),
        _row("BAGEL-7B", 0.52),
        _row("BLIP3-o-8B", 0.62),
        _row("MetaQuery-XL", 0.55),
    ],
    "imgedit": [
        _row("after image-only pre-training", 2.82),
        _row("after pair pre-training", 2.61),
    ],
}
