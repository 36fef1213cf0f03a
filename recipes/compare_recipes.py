"""The paper's six recipes in the shapes world: what pre-training reads, times what fine-tuning reads, at equal steps.

    python recipes/compare_recipes.py               # everything; the same command goes on where it stopped
    python recipes/compare_recipes.py --seeds 0     # one seed of it

Pictures are plentiful and pairs few. Pre-training reads pictures alone or pairs alone; fine-tuning reads pictures, pairs, or both,
half and half. All runs of a stage have the settings of one YAML file and differ in data, start and seed. A recipe whose score lies
in `results_dir` is not run again; table, plot and sheet are written anew after every score.
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
from iomm_hf.training.checkpoints import write_json


RECIPES = Path(__file__).parent
SHARES = {"image": 1.0, "pair": 0.0, "mix": 0.5}  # of pictures alone
# GenEval overall of (pre-training, fine-tuning) in the paper, after 5 and 10 epochs.
PAPER = {
    ("image", "image"): 0.61,
    ("image", "pair"): 0.87,
    ("image", "mix"): 0.89,
    ("pair", "image"): 0.78,
    ("pair", "pair"): 0.86,
    ("pair", "mix"): 0.88,
}
# What the paper says of them: mixing helps, image-only pre-training is no worse a start, and pictures alone are not enough.
COMPARISONS = [
    (("image", "mix"), ("image", "pair")),
    (("pair", "mix"), ("pair", "pair")),
    (("image", "mix"), ("pair", "mix")),
    (("image", "pair"), ("pair", "pair")),
    (("image", "mix"), ("image", "image")),
    (("pair", "image"), ("image", "image")),
]
FREE = {"output_dir", "results_dir", "seeds"}  # may change while a study goes on
PROMPTS = ["a star", "a red circle", "two hearts", "a square and a ring", "a heart left of a star", "a blue cross"]


@dataclass
class CompareConfig:
    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder of data and runs."})
    results_dir: str = field(default="results/compare", metadata={"help": "Folder of scores, table, plot and sheet."})
    pretrain: str = field(
        default=str(RECIPES / "configs/compare-pretrain.yaml"), metadata={"help": "Settings of pre-training."}
    )
    finetune: str = field(
        default=str(RECIPES / "configs/compare-finetune.yaml"), metadata={"help": "Settings of fine-tuning."}
    )
    num_images: int = field(default=20_000, metadata={"help": "Pictures without text."})
    num_pairs: int = field(default=1_000, metadata={"help": "Pairs, in pre-training as in fine-tuning."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of fine-tuning."})
    pretrain_seeds: int = field(
        default=2, metadata={"help": "Pre-trainings of each kind; fine-tunings start from them in turn."}
    )
    pictures_per_task: int = field(default=200, metadata={"help": "Pictures of each of the six tasks to score."})
    num_inference_steps: int = field(default=30, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=4.0, metadata={"help": "Strength of guidance."})
    num_processes: int = field(
        default_factory=lambda: torch.cuda.device_count() or os.cpu_count() or 1,
        metadata={"help": "Ranks of a training. Default: one a GPU, or one a CPU core."},
    )


def claim(config: CompareConfig):
    """Writes the study's settings into both folders, or refuses folders of a study with others."""
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


def prepare(config: CompareConfig, kind: str) -> str:
    """The cached pictures or pairs, drawn where they are missing."""
    drawn = Path(config.output_dir, "data", kind)
    cached = drawn.with_name(f"cached-{kind}")
    captions = kind == "pairs"
    number = config.num_pairs if captions else config.num_images
    progress = cached / "progress.json"
    if not (progress.exists() and json.loads(progress.read_text())["done"]):
        write_shards(drawn, number, seed=11 if captions else 10, captions=captions, layout="parquet")
        source = {"path": str(drawn)} | ({"caption_column": "prompt"} if captions else {})
        run("precompute_latents.py", {"source": source, "preset": "tiny", "output_dir": str(cached)})
    return str(cached)


def train(config: CompareConfig, name: str, settings: str, data: str, seed: int, init_from: Path | None) -> Path:
    """One run on `data`, a key of `SHARES`; returns its finished pipeline."""
    final = Path(config.output_dir, name, "final")
    if not final.exists():
        share = SHARES[data]
        changes = {"output_dir": str(final.parent), "seed": seed, "mix_ratio": share}
        changes["images"] = [prepare(config, "images")] if share > 0 else []
        changes["pairs"] = [{"path": prepare(config, "pairs"), "caption_column": "caption"}] if share < 1 else []
        if init_from is not None:
            changes["init_from"] = str(init_from)
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.num_processes}")
        run("finetune_mixed.py", yaml.safe_load(Path(settings).read_text()) | changes, *launch)
    return final


def score(config: CompareConfig, final: Path, path: Path):
    """Scores a finished run and draws the prompts of the sheet beside it."""
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


def write_report(results: Path):
    """Writes `table.md`, `scores.png` and `sheet.png` from the scores in a folder."""
    scores: dict[tuple[str, str], dict[int, dict]] = {}
    for path in sorted(results.glob("*-*-*.json")):
        pretraining, finetuning, seed = path.stem.split("-")
        scores.setdefault((pretraining, finetuning), {})[int(seed)] = json.loads(path.read_text())
    recipes = [recipe for recipe in PAPER if recipe in scores]
    overall = {r: {seed: report["overall"]["value"] for seed, report in scores[r].items()} for r in recipes}

    lines = [
        "| pre-training | fine-tuning | paper | overall, mean of seeds | by seed, with the interval of its pictures | "
        + " | ".join(TASKS)
        + " |",
        "|---" * (5 + len(TASKS)) + "|",
    ]
    for recipe in recipes:
        mean, low, high = interval(list(overall[recipe].values()))
        spread = f" [{low:.3f}, {high:.3f}]" if len(overall[recipe]) > 1 else ""
        seeds = "; ".join(
            "{value:.3f} [{low:.3f}, {high:.3f}]".format(**report["overall"]) for report in scores[recipe].values()
        )
        tasks = [statistics.fmean(r["tasks"][task]["accuracy"] for r in scores[recipe].values()) for task in TASKS]
        cells = [*recipe, f"{PAPER[recipe]:.2f}", f"{mean:.3f}{spread}", seeds, *(f"{task:.2f}" for task in tasks)]
        lines.append("| " + " | ".join(cells) + " |")

    lines += ["", "| difference | paper | here, same seeds | seeds | |", "|---|---|---|---|---|"]
    for one, other in COMPARISONS:
        seeds = sorted(overall.get(one, {}).keys() & overall.get(other, {}).keys())
        if not seeds:
            continue
        mean, low, high = interval([overall[one][seed] - overall[other][seed] for seed in seeds])
        spread = f" [{low:+.3f}, {high:+.3f}]" if len(seeds) > 1 else ""
        verdict = "above 0" if low > 0 else "below 0" if high < 0 else "not told apart"
        lines.append(
            f"| {' > '.join(one)} against {' > '.join(other)} | {PAPER[one] - PAPER[other]:+.2f} | {mean:+.3f}{spread} |"
            f" {len(seeds)} | {verdict} |"
        )
    (results / "table.md").write_text("\n".join(lines) + "\n")

    figure, axis = plt.subplots(figsize=(7, 3.5))
    for position, recipe in enumerate(recipes):
        values = list(overall[recipe].values())
        axis.bar(position, statistics.fmean(values), color="tab:blue" if recipe[0] == "image" else "tab:orange")
        axis.scatter([position] * len(values), values, color="black", s=12, zorder=2)
    axis.set_xticks(range(len(recipes)), [" > ".join(recipe) for recipe in recipes], rotation=20)
    axis.set(ylabel="overall score; dots: seeds")
    axis.grid(alpha=0.3, axis="y")
    save(figure, results / "scores.png")

    rows = {}
    for recipe in recipes:
        first = min(scores[recipe])
        strip = Image.open(results / f"{'-'.join(recipe)}-{first}.png")
        width = strip.width // len(PROMPTS)
        rows[" > ".join(recipe)] = [
            strip.crop((column * width, 0, (column + 1) * width, strip.height)) for column in range(len(PROMPTS))
        ]
    draw_sheet(rows, PROMPTS, results / "sheet.png")


def main(config: CompareConfig):
    claim(config)
    results = Path(config.results_dir)
    for seed in config.seeds:
        for pretraining, finetuning in PAPER:
            path = results / f"{pretraining}-{finetuning}-{seed}.json"
            if not path.exists():
                first = seed % config.pretrain_seeds
                start = train(config, f"{pretraining}-{first}", config.pretrain, pretraining, first, None)
                name = f"{pretraining}-{finetuning}-{seed}"
                score(config, train(config, name, config.finetune, finetuning, seed, start), path)
            write_report(results)
    print((results / "table.md").read_text())
    print(f"Wrote table.md, scores.png and sheet.png in {results}")


if __name__ == "__main__":
    main(*TrlParser(CompareConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
