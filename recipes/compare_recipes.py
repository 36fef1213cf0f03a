"""The paper's studies in the shapes world: one training with one thing changed, scored on the same prompts and noise.

    python recipes/compare_recipes.py                         # the six recipes; the same command goes on where it stopped
    python recipes/compare_recipes.py --seeds 0               # one seed of them
    python recipes/compare_recipes.py --studies mask_ratio pairs
    python recipes/compare_recipes.py --studies pairs --arms "pictures first, 16000" "pairs alone, 16000"

Pictures are plentiful and pairs few. Both stages have the settings of one YAML file each; an arm of a study changes some of
them. Arms that train alike share their runs and scores. What is scored is not run again, nor is a pre-training that lies in
`pretrained` of the results (a run's `run.json`, `log.jsonl` and `final`), so `--results_dir results/compare` goes on with the
published study. Table, plot and sheet are written anew after every score.

On CPU a run takes one core. Start the same command once a core: each takes what no other is at.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.shapes import TASKS
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.condition_use import condition_losses
from iomm_hf.evaluation.drawing import draw_plan
from iomm_hf.evaluation.edits import draw_edits, edit_cases, score_edits
from iomm_hf.evaluation.figures import draw_sheet
from iomm_hf.evaluation.shapes import BenchmarkPicture, benchmark_plan, report_verdicts, score_image
from iomm_hf.evaluation.studies import Arm, Study, write_study
from iomm_hf.files import write_json
from iomm_hf.presets import get_preset
from iomm_hf.shipped import shipped_model
from iomm_hf.software import software
from iomm_hf.training.config import as_source


RECIPES = Path(__file__).parent
FREE = {"output_dir", "results_dir", "studies", "arms", "seeds"}  # may change while studies go on
PROMPTS = ["a star", "a red circle", "two hearts", "a square and a ring", "a heart left of a star", "a blue cross"]


PICTURES, PAIRS, BOTH = {"mix_ratio": 1.0}, {"mix_ratio": 0.0}, {"mix_ratio": 0.5}
SCREENING = PICTURES | {"max_steps": 2400}  # of studies whose arms each need a pre-training of their own
QUERIES = {"condition_tokens": "queries", "num_queries": 16}
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
    "editing": Study(
        "Edits after pre-training alone, on pictures or on pairs (paper: ImgEdit-Bench, 1 to 5)",
        [Arm("image", PICTURES, None, 2.82), Arm("pair", PAIRS, None, 2.61)],
        [("image", "pair")],
        seeds=(0, 1),
        edits=True,
    ),
    "condition": Study(
        "What the generator reads: all rows of the MLLM without and with the adapter and masking, or the queries alone"
        " (paper: XL)",
        [
            Arm(
                "raw MLLM",
                SCREENING | {"num_queries": 0, "mask_ratio": 0.0},
                BOTH | {"mask_ratio": 0.0},
                0.44,
            ),
            Arm("+ adapter", SCREENING | {"mask_ratio": 0.0}, BOTH | {"mask_ratio": 0.0}, 0.82),
            Arm("+ masking", SCREENING, BOTH, 0.88),
            Arm("queries alone", SCREENING | QUERIES | {"num_queries": 4}, BOTH),  # as many as the preset's
        ],
        [("+ adapter", "raw MLLM"), ("+ masking", "+ adapter"), ("+ masking", "queries alone")],
    ),
    "adapter": Study(
        "The residual query adapter against plain learned queries (MetaQuery's), the generator reading sixteen of them alone",
        [
            Arm("residual", SCREENING | QUERIES, BOTH),
            Arm("plain", SCREENING | QUERIES | {"adapter_type": "plain"}, BOTH),
        ],
        [("residual", "plain")],
    ),
    "queries": Study(
        "What fewer queries cost, the generator reading them alone (a step of `base` costs 0.79 of the plain one with 256 of them,"
        " 0.67 with 128, 0.61 with 64: benchmarks/README.md)",
        [
            Arm(f"{number} queries", SCREENING | QUERIES | {"num_queries": number}, BOTH, x=number)
            for number in (16, 8, 4)
        ],
        [("8 queries", "16 queries"), ("4 queries", "16 queries")],
        x_label="queries",
    ),
    "mask_mode": Study(
        "Masked image tokens left out, or set to zero",
        [Arm("drop", SCREENING, BOTH), Arm("zero", SCREENING | {"mask_mode": "zero"}, BOTH)],
        [("drop", "zero")],
    ),
    "mask_ratio": Study(
        "Share of image tokens hidden in pre-training (paper: best at 0.45 for XL, 0.77 at 0.95)",
        [
            Arm(f"r = {ratio}", SCREENING | changes, BOTH, 0.77 if ratio == 0.95 else None, x=ratio)
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
        "How many pairs it takes, with pictures alone first and mixed in after, and with pairs alone in both stages at equal steps",
        [
            Arm(f"{series}, {number}", *stages, x=number, series=series, num_pairs=number)
            for series, stages in {"pictures first": (PICTURES, BOTH), "pairs alone": (PAIRS, PAIRS)}.items()
            for number in (250, 1000, 4000, 16000)
        ],
        [(f"pictures first, {number}", f"pairs alone, {number}") for number in (250, 1000, 4000, 16000)],
        x_label="pairs",
    ),
}


@dataclass
class CompareConfig:
    studies: list[str] = field(
        default_factory=lambda: ["six_recipes"], metadata={"help": f"Of {', '.join(STUDIES)}; or all."}
    )
    arms: list[str] | None = field(
        default=None, metadata={"help": "Only these of the studies, by label. Default: all."}
    )
    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder of data and runs."})
    results_dir: str = field(
        default="outputs/compare-results",
        metadata={"help": "Folder of scores, and of a table, plot and sheet a study."},
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
        default=2, metadata={"help": "Pre-trainings of each kind; later fine-tunings start from the last."}
    )
    pictures_per_task: int = field(default=200, metadata={"help": "Pictures of each of the six tasks to score."})
    held_out_pairs: int = field(default=512, metadata={"help": "New pairs whose loss is measured."})
    edits_per_kind: int = field(default=40, metadata={"help": "Cases of each of the three kinds of edits to score."})
    num_inference_steps: int = field(default=12, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Strength of guidance."})
    num_processes: int = field(
        default_factory=lambda: torch.cuda.device_count() or 1,
        metadata={"help": "Ranks of a training. Default: one a GPU, or one."},
    )

    def __post_init__(self):
        if self.pretrain_seeds < 1:
            raise ValueError(f"pretrain_seeds must be positive, got {self.pretrain_seeds}.")
        if self.studies == ["all"]:
            self.studies = list(STUDIES)
        if unknown := [name for name in self.studies if name not in STUDIES]:
            raise ValueError(f"Unknown studies {unknown}; choose of {', '.join(STUDIES)}, or all.")
        labels = [arm.label for name in self.studies for arm in STUDIES[name].arms]
        if unknown := [label for label in self.arms or [] if label not in labels]:
            raise ValueError(f"Unknown arms {unknown}; choose of {'; '.join(labels)}.")
        for name in self.studies:
            if self.arms and not {arm.label for arm in STUDIES[name].arms} & set(self.arms):
                raise ValueError(f"None of the arms {self.arms} is one of {name}: leave it out of the studies.")


def claim(config: CompareConfig):
    """Writes what all studies share into both folders, or refuses folders of others."""
    study = {key: value for key, value in asdict(config).items() if key not in FREE}
    study |= {stage: yaml.safe_load(Path(study[stage]).read_text()) for stage in ("pretrain", "finetune")}
    folders = Path(config.output_dir), Path(config.results_dir)
    for folder in folders:
        file = folder / "study.json"
        if file.exists() and (saved := json.loads(file.read_text())) != study:
            differing = sorted(key for key in study if saved.get(key) != study[key])
            raise ValueError(f"{folder} holds a study with another {', '.join(differing)}; choose other folders.")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", study)


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
    drawn.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{drawn}.lock"):  # waits: it takes a minute
        if not (progress.exists() and json.loads(progress.read_text())["done"]):
            write_shards(drawn, number, seed=11 if captions else 10, captions=captions, layout="parquet")
            source = {"path": str(drawn)} | ({"caption_column": "prompt"} if captions else {})
            device = "cuda" if torch.cuda.is_available() else "cpu"
            settings = {"source": source, "preset": "tiny", "device": device, "output_dir": str(cached)}
            run("precompute_latents.py", settings)
    return str(cached)


def held_out_losses(config: CompareConfig, pipeline: IOMMPipeline) -> dict[str, list[float]]:
    """Loss of each new pair under its `own` caption and under `another`'s, with the same times and noise in every score."""
    drawn = Path(config.output_dir, "data", f"held-out-pairs-{config.held_out_pairs}")
    with FileLock(f"{drawn}.lock"):
        write_shards(drawn, config.held_out_pairs, seed=12, layout="parquet")
    stream = build_stream((), [as_source({"path": str(drawn), "caption_column": "prompt"})])
    new = islice(stream, config.held_out_pairs)
    # Draws and order derive from keys, which begin with a digest of the path: what follows is a pair's place in its file.
    pairs = sorted((pair | {"key": pair["key"].partition("/")[2]} for pair in new), key=itemgetter("key"))
    losses = condition_losses(pipeline, pairs, len(pairs), mask_ratio=0.0, draws=2)
    return {
        name: [round(loss, 5) for loss in of.tolist()] for name, of in zip(("own", "another"), losses, strict=True)
    }


def name_of(stage: str, changes: dict[str, Any], num_pairs: int) -> str:
    """The same for the same training: `pretrain_mask_ratio=0.25,mix_ratio=1.0`."""
    settings = changes | ({"num_pairs": num_pairs} if changes["mix_ratio"] < 1 else {})
    return f"{stage}_{','.join(f'{name}={value}' for name, value in sorted(settings.items()))}"


def train(
    config: CompareConfig, name: str, settings: dict[str, Any], num_pairs: int, seed: int, init_from: Path | None
) -> Path:
    """One run; returns its finished pipeline. Raises `filelock.Timeout` while another process is at it."""
    published = Path(config.results_dir, "pretrained", name, "final")
    if published.exists():
        return published
    final = Path(config.output_dir, name, "final")
    with FileLock(f"{final.parent}.lock", timeout=0):
        if final.exists():
            return final
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
        if changes is not None
    ]
    return Path(config.results_dir, "scores", f"{'-'.join(stages)}-seed_{seed}.json")


def pretrain_seed(config: CompareConfig, seed: int) -> int:
    """Of the pre-training that a fine-tuning with `seed` starts from: its own, or the last one there is."""
    return min(seed, config.pretrain_seeds - 1)


def train_and_score(config: CompareConfig, arm: Arm, seed: int):
    """Both stages of an arm, and its score; what is there already is used. Raises as [`train`] does."""
    path = score_file(config, arm, seed)
    num_pairs = arm.num_pairs or config.num_pairs
    pretrain, finetune = (yaml.safe_load(Path(file).read_text()) for file in (config.pretrain, config.finetune))
    with FileLock(Path(config.output_dir, f"{path.stem}-score.lock"), timeout=0):
        if path.exists():
            return
        first = pretrain_seed(config, seed)
        name = f"{name_of('pretrain', arm.pretrain, num_pairs)}-seed_{first}"
        runs = [train(config, name, pretrain | arm.pretrain, num_pairs, first, None)]
        if arm.finetune is not None:
            runs.append(train(config, path.stem, finetune | arm.finetune, num_pairs, seed, runs[0]))
        score(config, runs, path)


def record_of(run: Path) -> dict[str, Any]:
    """What a score tells of a training: settings that decide it, the commit that it began with, hours by its log's clock."""
    start = json.loads((run / "run.json").read_text())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    before = [0, *(row["images"] for row in rows)]
    seconds = sum(
        (row["images"] - images) / row["images_per_second"] for row, images in zip(rows, before, strict=False)
    )
    settings = {name: start["config"][name] for name in ("seed", "mix_ratio", "batch_size", "max_steps")}
    last = {name: rows[-1][name] for name in ("images", "skipped")}
    return settings | last | {"hours": round(seconds / 3600, 3), "commit": start["commit"]}


def score(config: CompareConfig, runs: list[Path], path: Path):
    """Scores the last of an arm's finished runs and draws the prompts of the sheet beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    on_gpu = torch.cuda.is_available()
    pipeline = IOMMPipeline.from_pretrained(runs[-1]).to("cuda" if on_gpu else "cpu")
    plan = benchmark_plan(pictures_per_task=config.pictures_per_task)
    sampling = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    drawing = sampling | {"batch_size": 200 if on_gpu else 16}
    drawn = draw_plan(pipeline, plan, **drawing)
    wanted = [item.metadata for item in plan]
    verdicts = [score_image(picture, metadata) for picture, metadata in zip(drawn, wanted, strict=True)]
    report = report_verdicts([verdict.correct for verdict in verdicts], wanted, seeds=[item.seed for item in plan])
    found: dict[str, list[int]] = {task: [] for task in TASKS}
    for verdict, metadata in zip(verdicts, wanted, strict=True):
        found[metadata["tag"]].append(len(verdict.found))
    samples = draw_plan(pipeline, [BenchmarkPicture({"prompt": prompt}, 0) for prompt in PROMPTS], **sampling)
    strip = Image.new("RGB", (sum(sample.width for sample in samples), samples[0].height))
    for column, sample in enumerate(samples):
        strip.paste(sample, (column * sample.width, 0))
    strip.save(path.with_suffix(".png"))
    cases = edit_cases(config.edits_per_kind)
    edits = score_edits(draw_edits(pipeline, cases, **sampling), cases)

    # The MLLM is frozen: what it says of a picture is what it said before.
    pictures = [case.picture(pipeline.resolution) for case in cases]
    source = IOMMPipeline.from_pretrained(shipped_model()).to(pipeline.device)  # of the frozen parts
    before, after = (pipe.describe(pictures, max_new_tokens=32) for pipe in (source, pipeline))
    captions = {"same": sum(a == b for a, b in zip(before, after, strict=True)), "of": len(before)}
    write_json(
        path,
        report.to_dict()
        | {"objects": {task: statistics.fmean(numbers) for task, numbers in found.items()}}
        | {"held_out_pairs": held_out_losses(config, pipeline)}
        | {"edits": edits.to_dict(), "captions_as_before_training": captions, **sampling}
        | {"trainings": [record_of(run.parent) for run in runs], "device": pipeline.device.type}
        | {"processes": config.num_processes, "hours": round((time.monotonic() - began) / 3600, 3), **software()},
    )


def command(config: CompareConfig, study: str) -> str:
    """That makes this study again."""
    chosen = [f"--studies {study}"]
    for setting in fields(config):
        value = getattr(config, setting.name)
        default = setting.default_factory() if callable(setting.default_factory) else setting.default
        if setting.name not in {"studies", "output_dir", "results_dir"} and value != default:
            values = value if isinstance(value, list) else [value]
            chosen.append(f"--{setting.name} {shlex.join(map(str, values))}")
    return " ".join(["python recipes/compare_recipes.py", *chosen])


def write_report(config: CompareConfig, name: str):
    """Writes `table.md`, `scores.png` and `sheet.png` of a study, from those of its arms that are scored."""
    study = STUDIES[name]
    reports: dict[str, dict[int, dict]] = {}
    strips: dict[str, Path] = {}
    took: dict[str, float] = {}  # hours by what was done, as arms share trainings
    for arm in study.arms:
        for seed in config.seeds or study.seeds:
            path = score_file(config, arm, seed)
            if path.exists():
                report = json.loads(path.read_text())
                reports.setdefault(arm.label, {})[seed] = report
                strips.setdefault(arm.label, path.with_suffix(".png"))
                names = [f"{path.stem.split('-')[0]} {pretrain_seed(config, seed)}", path.stem]
                took |= {name: run["hours"] for name, run in zip(names, report["trainings"], strict=False)}
                took |= {f"{path.stem}, its score": report["hours"]}

    everything = [report for of in reports.values() for report in of.values()]
    said = [report["captions_as_before_training"] for report in everything]
    commits = {(run["commit"] or "unknown")[:7] for report in everything for run in report["trainings"]}
    devices = sorted({report["device"] for report in everything})
    asked: dict[str, list[int]] = {task: [] for task in TASKS}
    for item in benchmark_plan(pictures_per_task=config.pictures_per_task):
        asked[item.metadata["tag"]].append(sum(part["count"] for part in item.metadata["include"]))
    last = config.pretrain_seeds - 1
    shared = any(seed > last for of in reports.values() for seed in of)
    closing = [
        f"Captions of pictures as before training: {sum(of['same'] for of in said)} of {sum(of['of'] for of in said)}."
        f" {6 * config.pictures_per_task} pictures, {config.held_out_pairs} new pairs and {3 * config.edits_per_kind}"
        f" edits a score, {config.num_inference_steps} sampling steps, guidance {config.guidance_scale}."
        f"{f' Seeds from {last} on share a pre-training.' if shared else ''} {sum(took.values()):.1f} hours by the clock, what"
        f" arms share counted once, on {' and '.join(devices)}. Commits of the trainings: {', '.join(sorted(commits))}.",
        "",
        f"```bash\n{command(config, name)}\n```",
    ]
    folder = Path(config.results_dir, name)
    means = {task: statistics.fmean(numbers) for task, numbers in asked.items()}
    write_study(study, reports, means, closing, folder)

    rows = {}
    for label, path in strips.items():
        strip = Image.open(path)
        width = strip.width // len(PROMPTS)
        rows[label] = [
            strip.crop((column * width, 0, (column + 1) * width, strip.height)) for column in range(len(PROMPTS))
        ]
    draw_sheet(rows, PROMPTS, folder / "sheet.png")


def main(config: CompareConfig):
    claim(config)
    todo = [
        (name, arm, seed)
        for name in config.studies
        for seed in config.seeds or STUDIES[name].seeds
        for arm in STUDIES[name].arms
        if config.arms is None or arm.label in config.arms
    ]
    while todo:
        for item in todo:
            name, arm, seed = item
            try:
                train_and_score(config, arm, seed)
            except Timeout:
                continue  # another process is at it
            with FileLock(Path(config.output_dir, f"{name}.lock")):
                write_report(config, name)
            todo.remove(item)
            break
        else:
            time.sleep(10)
    for name in config.studies:
        print((Path(config.results_dir) / name / "table.md").read_text())
        print(f"Wrote table.md, scores.png and sheet.png in {Path(config.results_dir) / name}")


if __name__ == "__main__":
    main(*TrlParser(CompareConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
