"""The paper's studies in the shapes world: one training with one thing changed, scored on the same prompts and noise.

    python recipes/compare_recipes.py                         # the six recipes; the same command goes on where it stopped
    python recipes/compare_recipes.py --seeds 0               # one seed of them
    python recipes/compare_recipes.py --studies mask_ratio pairs

Pictures are plentiful and pairs few. Both stages have the settings of one YAML file each; an arm of a study changes some of
them, and where it leaves out pre-training, fine-tuning takes the steps of both. Arms that train alike share their runs and
scores. What is scored is not run again; table, plot and sheet are written anew after every score.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml
from PIL import Image
from scipy.stats import t as student
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.shapes import TASKS
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.evaluation.drawing import draw_plan
from iomm_hf.evaluation.figures import draw_sheet, save
from iomm_hf.evaluation.shapes import BenchmarkPicture, benchmark_plan, score_pictures
from iomm_hf.presets import get_preset
from iomm_hf.training.checkpoints import write_json


RECIPES = Path(__file__).parent
FREE = {"output_dir", "results_dir", "studies", "seeds"}  # may change while studies go on
PROMPTS = ["a star", "a red circle", "two hearts", "a square and a ring", "a heart left of a star", "a blue cross"]


@dataclass(frozen=True)
class Arm:
    """One way to train: changes to the settings of both stages (`mix_ratio` is the share of pictures alone)."""

    label: str
    pretrain: dict[str, Any] | None  # None: no pre-training
    finetune: dict[str, Any]
    paper: float | None = None  # GenEval overall there
    x: float | None = None  # its place on the plot's axis
    series: str = ""  # the curve that it belongs to
    num_pairs: int | None = None  # default: the config's


@dataclass(frozen=True)
class Study:
    """Arms to compare, and pairs of labels whose difference the report tells."""

    question: str
    arms: list[Arm]
    comparisons: list[tuple[str, str]]
    seeds: tuple[int, ...] = (0,)
    x_label: str | None = None  # None: bars


PICTURES, PAIRS, BOTH = {"mix_ratio": 1.0}, {"mix_ratio": 0.0}, {"mix_ratio": 0.5}
ALL_ROWS = {"condition_tokens": "all"}
STUDIES = {
    "six_recipes": Study(
        "Pre-training on pictures or on pairs, fine-tuning on pictures, pairs or both (paper: after 5 and 10 epochs)",
        [
            Arm("image > image", PICTURES, PICTURES, 0.61),
            Arm("image > pair", PICTURES, PAIRS, 0.87),
            Arm("image > mix", PICTURES, BOTH, 0.89),
            Arm("pair > image", PAIRS, PICTURES, 0.78),
            Arm("pair > pair", PAIRS, PAIRS, 0.86),
            Arm("pair > mix", PAIRS, BOTH, 0.88),
        ],
        # Mixing helps, image-only pre-training is no worse a start, and pictures alone are not enough.
        [
            ("image > mix", "image > pair"),
            ("pair > mix", "pair > pair"),
            ("image > mix", "pair > mix"),
            ("image > pair", "pair > pair"),
            ("image > mix", "image > image"),
            ("pair > image", "image > image"),
        ],
        seeds=(0, 1, 2),
    ),
    "condition": Study(
        "What the generator reads: all rows of the MLLM without and with the adapter and masking, or the queries alone"
        " (paper: XL)",
        [
            Arm(
                "raw MLLM",
                PICTURES | ALL_ROWS | {"num_queries": 0, "mask_ratio": 0.0},
                BOTH | {"mask_ratio": 0.0},
                0.44,
            ),
            Arm("+ adapter", PICTURES | ALL_ROWS | {"mask_ratio": 0.0}, BOTH | {"mask_ratio": 0.0}, 0.82),
            Arm("+ masking", PICTURES | ALL_ROWS, BOTH, 0.88),
            Arm("queries alone", PICTURES, BOTH),
        ],
        [("+ adapter", "raw MLLM"), ("+ masking", "+ adapter"), ("+ masking", "queries alone")],
    ),
    "adapter": Study(
        "The residual query adapter against plain learned queries",
        [Arm("residual", PICTURES, BOTH), Arm("plain", PICTURES | {"adapter_type": "plain"}, BOTH)],
        [("residual", "plain")],
    ),
    "mask_mode": Study(
        "Masked image tokens left out, or set to zero",
        [Arm("drop", PICTURES, BOTH), Arm("zero", PICTURES | {"mask_mode": "zero"}, BOTH)],
        [("drop", "zero")],
    ),
    "mask_ratio": Study(
        "Share of image tokens hidden in pre-training (paper: best at 0.45 for XL, 0.77 at 0.95)",
        [
            Arm(f"r = {ratio}", PICTURES | changes, BOTH, 0.77 if ratio == 0.95 else None, x=ratio)
            for ratio in (0.0, 0.25, 0.5, 0.75, 0.95)
            for changes in [{} if ratio == get_preset("tiny").mask_ratio else {"mask_ratio": ratio}]
        ],
        [("r = 0.5", "r = 0.0"), ("r = 0.5", "r = 0.95")],
        x_label="mask ratio of pre-training",
    ),
    "mix_ratio": Study(
        "Share of pictures alone in fine-tuning (paper: best at 0.5)",
        [Arm(f"{share}", PICTURES, {"mix_ratio": share}, x=share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        [("0.5", "0.0"), ("0.5", "1.0")],
        x_label="share of pictures alone in fine-tuning",
    ),
    "pairs": Study(
        "How many pairs it takes, with and without image-only pre-training, at equal steps in all",
        [
            Arm(f"{series}, {number}", *stages, x=number, series=series, num_pairs=number)
            for series, stages in {"pictures first": (PICTURES, BOTH), "pairs alone": (None, PAIRS)}.items()
            for number in (125, 500, 2000, 8000)
        ],
        [(f"pictures first, {number}", f"pairs alone, {number}") for number in (125, 500, 2000, 8000)],
        x_label="pairs",
    ),
}


@dataclass
class CompareConfig:
    studies: list[str] = field(
        default_factory=lambda: ["six_recipes"], metadata={"help": f"Of {', '.join(STUDIES)}; or all."}
    )
    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder of data and runs."})
    results_dir: str = field(
        default="results/compare", metadata={"help": "Folder of scores, and of a table, plot and sheet a study."}
    )
    pretrain: str = field(
        default=str(RECIPES / "configs/compare-pretrain.yaml"), metadata={"help": "Settings of pre-training."}
    )
    finetune: str = field(
        default=str(RECIPES / "configs/compare-finetune.yaml"), metadata={"help": "Settings of fine-tuning."}
    )
    num_images: int = field(default=20_000, metadata={"help": "Pictures without text."})
    num_pairs: int = field(default=1_000, metadata={"help": "Pairs, in pre-training as in fine-tuning."})
    seeds: list[int] | None = field(default=None, metadata={"help": "Of fine-tuning. Default: the study's."})
    pretrain_seeds: int = field(
        default=2, metadata={"help": "Pre-trainings of each kind; fine-tunings start from them in turn."}
    )
    pictures_per_task: int = field(default=200, metadata={"help": "Pictures of each of the six tasks to score."})
    num_inference_steps: int = field(default=30, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Strength of guidance."})
    num_processes: int = field(
        default_factory=lambda: torch.cuda.device_count() or os.cpu_count() or 1,
        metadata={"help": "Ranks of a training. Default: one a GPU, or one a CPU core."},
    )

    def __post_init__(self):
        if self.studies == ["all"]:
            self.studies = list(STUDIES)
        if unknown := [name for name in self.studies if name not in STUDIES]:
            raise ValueError(f"Unknown studies {unknown}; choose of {', '.join(STUDIES)}, or all.")


def claim(config: CompareConfig):
    """Writes what all studies share into both folders, or refuses folders of others."""
    study = {key: value for key, value in asdict(config).items() if key not in FREE}
    study |= {stage: yaml.safe_load(Path(study[stage]).read_text()) for stage in ("pretrain", "finetune")}
    for folder in (Path(config.output_dir), Path(config.results_dir)):
        file = folder / "study.json"
        if file.exists() and (saved := json.loads(file.read_text())) != study:
            differing = sorted(key for key in study if saved.get(key) != study[key])
            raise ValueError(f"{folder} holds a study with another {', '.join(differing)}; choose other folders.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, study)


def run(script: str, settings: dict[str, Any], *launch: str):
    """Runs a recipe with `settings` as its YAML file; a stopped one resumes."""
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, *launch, str(RECIPES / script), "--config", str(file)]
    if code := subprocess.run(command, env=environment).returncode:
        sys.exit(f"{script} failed with exit code {code}; its settings are in {file}.")


def prepare(config: CompareConfig, kind: str, number: int) -> str:
    """That many cached `pictures` or `pairs`, drawn where they are missing."""
    drawn = Path(config.output_dir, "data", f"{kind}-{number}")
    cached = drawn.with_name(f"cached-{drawn.name}")
    captions = kind == "pairs"
    progress = cached / "progress.json"
    if not (progress.exists() and json.loads(progress.read_text())["done"]):
        write_shards(drawn, number, seed=11 if captions else 10, captions=captions, layout="parquet")
        source = {"path": str(drawn)} | ({"caption_column": "prompt"} if captions else {})
        run("precompute_latents.py", {"source": source, "preset": "tiny", "output_dir": str(cached)})
    return str(cached)


def name_of(stage: str, changes: dict[str, Any] | None, num_pairs: int) -> str:
    """The same for the same training: `pretrain_mask_ratio=0.25,mix_ratio=1.0`."""
    if changes is None:
        return f"{stage}_none"
    settings = changes | ({"num_pairs": num_pairs} if changes["mix_ratio"] < 1 else {})
    return f"{stage}_{','.join(f'{name}={value}' for name, value in sorted(settings.items()))}"


def train(
    config: CompareConfig, name: str, settings: dict[str, Any], num_pairs: int, seed: int, init_from: Path | None
) -> Path:
    """One run; returns its finished pipeline."""
    final = Path(config.output_dir, name, "final")
    if not final.exists():
        settings = settings | {"output_dir": str(final.parent), "seed": seed, "images": [], "pairs": []}
        if settings["mix_ratio"] > 0:
            settings["images"] = [prepare(config, "pictures", config.num_images)]
        if settings["mix_ratio"] < 1:
            settings["pairs"] = [{"path": prepare(config, "pairs", num_pairs), "caption_column": "caption"}]
        if init_from is not None:
            settings["init_from"] = str(init_from)
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.num_processes}")
        run("finetune_mixed.py", settings, *launch)
    return final


def score_file(config: CompareConfig, arm: Arm, seed: int) -> Path:
    stages = [
        name_of(stage, changes, arm.num_pairs or config.num_pairs)
        for stage, changes in (("pretrain", arm.pretrain), ("finetune", arm.finetune))
    ]
    return Path(config.results_dir, "scores", f"{'-'.join(stages)}-seed_{seed}.json")


def train_and_score(config: CompareConfig, arm: Arm, seed: int):
    """Both stages of an arm, and its score; what is there already is used."""
    path = score_file(config, arm, seed)
    if path.exists():
        return
    num_pairs = arm.num_pairs or config.num_pairs
    pretrain, finetune = (yaml.safe_load(Path(file).read_text()) for file in (config.pretrain, config.finetune))
    start = None
    if arm.pretrain is None:
        finetune["max_steps"] += pretrain["max_steps"]
    else:
        first = seed % config.pretrain_seeds
        name = f"{name_of('pretrain', arm.pretrain, num_pairs)}-seed_{first}"
        start = train(config, name, pretrain | arm.pretrain, num_pairs, first, None)
    score(config, train(config, path.stem, finetune | arm.finetune, num_pairs, seed, start), path)


def score(config: CompareConfig, final: Path, path: Path):
    """Scores a finished run and draws the prompts of the sheet beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pipeline = IOMMPipeline.from_pretrained(final)
    plan = benchmark_plan(pictures_per_task=config.pictures_per_task)
    sampling = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    drawn = draw_plan(pipeline, plan, **sampling)
    report = score_pictures(drawn, [item.metadata for item in plan], seeds=[item.seed for item in plan])
    samples = draw_plan(pipeline, [BenchmarkPicture({"prompt": prompt}, 0) for prompt in PROMPTS], **sampling)
    strip = Image.new("RGB", (sum(sample.width for sample in samples), samples[0].height))
    for column, sample in enumerate(samples):
        strip.paste(sample, (column * sample.width, 0))
    strip.save(path.with_suffix(".png"))
    write_json(path, report.to_dict() | sampling)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval over seeds; infinitely wide for a single one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, -float("inf"), float("inf")
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def write_report(config: CompareConfig, name: str):
    """Writes `table.md`, `scores.png` and `sheet.png` of a study, from those of its arms that are scored."""
    study = STUDIES[name]
    reports: dict[str, dict[int, dict]] = {}
    strips: dict[str, Path] = {}
    for arm in study.arms:
        for seed in config.seeds or study.seeds:
            path = score_file(config, arm, seed)
            if path.exists():
                reports.setdefault(arm.label, {})[seed] = json.loads(path.read_text())
                strips.setdefault(arm.label, path.with_suffix(".png"))
    arms = [arm for arm in study.arms if arm.label in reports]
    overall = {
        label: {seed: report["overall"]["value"] for seed, report in by_seed.items()}
        for label, by_seed in reports.items()
    }
    folder = Path(config.results_dir, name)
    folder.mkdir(parents=True, exist_ok=True)

    columns = ["", "paper", "overall, mean of seeds", "by seed, with the interval of its pictures", *TASKS]
    lines = [study.question + ".", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in arms:
        mean, low, high = interval(list(overall[arm.label].values()))
        spread = f" [{low:.3f}, {high:.3f}]" if len(overall[arm.label]) > 1 else ""
        by_seed = reports[arm.label].values()
        seeds = "; ".join("{value:.3f} [{low:.3f}, {high:.3f}]".format(**report["overall"]) for report in by_seed)
        tasks = [statistics.fmean(report["tasks"][task]["accuracy"] for report in by_seed) for task in TASKS]
        paper = "" if arm.paper is None else f"{arm.paper:.2f}"
        cells = [arm.label, paper, f"{mean:.3f}{spread}", seeds, *(f"{task:.2f}" for task in tasks)]
        lines.append(f"| {' | '.join(cells)} |")

    papers = {arm.label: arm.paper for arm in arms}
    lines += ["", "| difference | paper | here, same seeds | seeds | |", "|---|---|---|---|---|"]
    for one, other in study.comparisons:
        seeds = sorted(overall.get(one, {}).keys() & overall.get(other, {}).keys())
        if not seeds:
            continue
        mean, low, high = interval([overall[one][seed] - overall[other][seed] for seed in seeds])
        spread = f" [{low:+.3f}, {high:+.3f}]" if len(seeds) > 1 else ""
        verdict = "above 0" if low > 0 else "below 0" if high < 0 else "not told apart"
        known = papers[one] is not None and papers[other] is not None
        paper = f"{papers[one] - papers[other]:+.2f}" if known else ""
        lines.append(f"| {one} against {other} | {paper} | {mean:+.3f}{spread} | {len(seeds)} | {verdict} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")

    plot_scores(study, [(arm, list(overall[arm.label].values())) for arm in arms], folder / "scores.png")
    rows = {}
    for label, path in strips.items():
        strip = Image.open(path)
        width = strip.width // len(PROMPTS)
        rows[label] = [
            strip.crop((column * width, 0, (column + 1) * width, strip.height)) for column in range(len(PROMPTS))
        ]
    draw_sheet(rows, PROMPTS, folder / "sheet.png")


def plot_scores(study: Study, scored: list[tuple[Arm, list[float]]], path: Path):
    """Curves over `x`, or bars; a dot a seed."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    if study.x_label is None:
        for position, (_, values) in enumerate(scored):
            axis.bar(position, statistics.fmean(values), color="tab:blue")
            axis.scatter([position] * len(values), values, color="black", s=12, zorder=2)
        axis.set_xticks(range(len(scored)), [arm.label for arm, _ in scored], rotation=20)
    else:
        for series in dict.fromkeys(arm.series for arm, _ in scored):
            points = [(arm.x, values) for arm, values in scored if arm.series == series]
            axis.plot([x for x, _ in points], [statistics.fmean(v) for _, v in points], marker="o", label=series)
        if len({arm.series for arm, _ in scored}) > 1:
            axis.legend()
        if max(arm.x for arm, _ in scored) > 1:
            axis.set_xscale("log")
        axis.set_xlabel(study.x_label)
    axis.set(ylabel="overall score")
    axis.grid(alpha=0.3, axis="y")
    save(figure, path)


def main(config: CompareConfig):
    claim(config)
    for name in config.studies:
        for seed in config.seeds or STUDIES[name].seeds:
            for arm in STUDIES[name].arms:
                train_and_score(config, arm, seed)
                write_report(config, name)
        print((Path(config.results_dir) / name / "table.md").read_text())
        print(f"Wrote table.md, scores.png and sheet.png in {Path(config.results_dir) / name}")


if __name__ == "__main__":
    main(*TrlParser(CompareConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
