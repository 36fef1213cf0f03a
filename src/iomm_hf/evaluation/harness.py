"""From a checkpoint and a benchmark's name to a result: draw, then score, with a folder between the two.

```
OUTPUT/generation.json         how the pictures are drawn
OUTPUT/software/               versions, commit and device of every session that drew some
OUTPUT/pictures/...            the official layout: the authors' scorers read it
OUTPUT/scores/SCORER/          scorer.json, software/, details-*.jsonl (what was seen), result.json, report
```

Under `accelerate launch` ranks share out drawing, detection and judging by a model that runs here; the first one asks served judges and
adds up. The same command goes on after
an interruption, and where a result is there already it only shows it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..devices import default_device
from ..files import write_whole
from ..integrity import sha256
from ..shipped import shipped_model
from . import geneval
from .benchmarks import Benchmark, load_benchmark
from .generation import PICTURES, SETTINGS, generate, read_note
from .geneval_models import CLIP, DETECTOR, GenEvalModels, load_picture, public_name, resolve_model
from .judges import EndpointJudge, Judge, TransformersJudge
from .judging import Judged, add_up, ask_all, judged
from .pipelines import fetch_index, hash_parts, load_pipeline
from .results import (
    LOCAL,
    RESULT,
    Details,
    as_json,
    build_result,
    find_pictures,
    folder_name,
    hash_pictures,
    read_result,
    read_software,
    record_software,
    write_settings,
)
from .shapes import report_verdicts, score_image


SCORES = "scores"
SCORER = "scorer.json"
WORDED = ("wise", "wise-verified", "imgedit")  # judged in words that can be replaced
JUDGED = ("dpg", *WORDED)


@dataclass
class EvaluationConfig:
    """
    What to evaluate, and how.

    Args:
        benchmark (`str`): geneval, dpg, wise, wise-verified, imgedit or shapes.
        output (`Path`): The run's folder.
        checkpoint (`str`, *optional*): Folder or Hub id of any diffusers pipeline. Defaults to the shipped model.
        revision (`str`, *optional*): Of a Hub id.
        pictures (`Path`, *optional*): A folder in the official layout to score, in place of drawing.
        step (`str`, *optional*, defaults to `"both"`): "generate", "score" or "both".
        arguments (`dict`, *optional*): For the pipeline; what is not named keeps the pipeline's own default.
        seed (`int`, *optional*): Every picture's seed is made of it and of the picture's number. Defaults to 0. This and whatever else
            says how to draw must fit pictures that are there already, if it is given.
        batch_size (`int`, *optional*): Pictures drawn at a time. Defaults to 8.
        device (`str`, *optional*): Of pipeline, detectors and a judge that runs here.
        dtype (`str`, *optional*): Of the pipeline. Defaults to float32.
        ema (`bool`, *optional*): Whether the weights are averaged ones, where the checkpoint's folder does not say.
        limit (`int`, *optional*): Only so many items. The result is marked.
        rewritten (`Path`, *optional*): Rewritten prompts. The result says so.
        data (`Path`, *optional*): A folder with the authors' files, in place of fetching them.
        detector, detector_revision, clip, clip_revision (`str`, *optional*): What GenEval looks with.
        judge (`str`, *optional*): The judge's model. dpg, wise, wise-verified and imgedit need one to be named.
        judge_url (`str`, *optional*): Its OpenAI-compatible address. Without one it is a transformers model that runs here.
        judge_revision (`str`, *optional*): Commit of a judge that runs here; of a served one it is recorded as given.
        judge_options (`dict`, *optional*): Further arguments of [`~iomm_hf.evaluation.judges.EndpointJudge`] or
            [`~iomm_hf.evaluation.judges.TransformersJudge`].
        wording (`Path`, *optional*): What the judge is asked, in place of the authors' wording. Not for dpg, whose
            wording is its questions.
        unreadable (`str`, *optional*, defaults to `"error"`): "error" or "lowest", for answers that cannot be read.
        max_requests (`int`, *optional*): Refuse to ask more than these.
        prices (`tuple[float, float]`, *optional*): For a million tokens read and written, to say what asking costs.
    """

    benchmark: str
    output: Path
    checkpoint: str | None = None
    revision: str | None = None
    pictures: Path | None = None
    step: str = "both"
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    ema: bool | None = None
    limit: int | None = None
    rewritten: Path | None = None
    data: Path | None = None
    detector: str = DETECTOR
    detector_revision: str | None = None
    clip: str = CLIP
    clip_revision: str | None = None
    judge: str | None = None
    judge_url: str | None = None
    judge_revision: str | None = None
    judge_options: dict[str, Any] = field(default_factory=dict)
    wording: Path | None = None
    unreadable: str = "error"
    max_requests: int | None = None
    prices: tuple[float, float] | None = None

    def __post_init__(self):
        if self.step not in ("generate", "score", "both"):
            raise ValueError(f"step must be generate, score or both, got {self.step!r}.")
        if self.pictures is not None and (self.how_to_draw or self.step == "generate"):
            told = ", ".join(self.how_to_draw) or "--step generate"
            raise ValueError(f"Pictures are given to be scored as they are: leave out {told}, or the pictures.")
        if self.benchmark in JUDGED and self.step != "generate" and self.judge is None:
            raise ValueError(
                f"{self.benchmark} is scored by a judge, which has no default: name one with --judge MODEL, and with --judge-url"
                " where it is served. --step generate draws without scoring."
            )
        if self.wording is not None and self.benchmark not in WORDED:
            raise ValueError(
                f"--wording replaces what {', '.join(WORDED)} ask a judge; {self.benchmark} has no such text."
            )
        kind = TransformersJudge if self.judge_url is None else EndpointJudge
        known = set(signature(kind).parameters) - {"model", "base_url", "revision", "device"}
        unknown = sorted(set(self.judge_options) - known)
        if unknown:
            raise ValueError(f"{kind.__name__} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        if self.unreadable not in ("error", "lowest"):
            raise ValueError(f"unreadable must be error or lowest, got {self.unreadable!r}.")

    @property
    def how_to_draw(self) -> dict[str, Any]:
        """What was given of the model and its sampling, without what is left to their defaults."""
        given = {
            name: getattr(self, name) for name in ("checkpoint", "revision", "dtype", "ema", "seed", "batch_size")
        }
        return {name: value for name, value in (given | self.arguments).items() if value is not None}


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int
    count: int
    wait: Callable[[], None]

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that a launcher started, or this one alone, without any communication then."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(0, 1, lambda: None)
        return
    from accelerate import PartialState

    # The first rank may ask a judge for hours while the others wait.
    state = PartialState(cpu=default_device() == "cpu", timeout=timedelta(days=7))
    try:
        yield Ranks(state.process_index, state.num_processes, state.wait_for_everyone)
    finally:
        state.destroy_process_group()


def evaluate(
    config: EvaluationConfig, confirm: Callable[[str], bool] = lambda text: True
) -> tuple[dict[str, Any], Path] | None:
    """
    Draws and scores a benchmark.

    Args:
        config ([`EvaluationConfig`]): What and how.
        confirm (`Callable[[str], bool]`, *optional*): Is told what a served judge will be asked, and says whether to go on. By default
            yes.

    Returns:
        The result and its file; `None` on all ranks but the first, or where only pictures were asked for.

    Raises:
        ValueError: If the settings do not fit each other, the model or the judge.
        OSError: If something is not found, or was begun with other settings.
        [`~iomm_hf.evaluation.results.Incomplete`]: If pictures or answers are missing: there is no score then.

    Example:

    ```python
    >>> import tempfile
    >>> config = EvaluationConfig("shapes", Path(tempfile.mkdtemp()), limit=6, arguments={"num_inference_steps": 1}, device="cpu")
    >>> result, file = evaluate(config)
    >>> result["counts"]["found"], result["benchmark"]["subset"], len(result["scores"]["tasks"]), file.name
    (6, 6, 6, 'result.json')
    ```
    """
    with ranks() as group:
        benchmark = load_benchmark(
            config.benchmark, seed=config.seed or 0, limit=config.limit, rewritten=config.rewritten, data=config.data
        )
        folder = config.pictures if config.pictures is not None else config.output / PICTURES
        judge_task = None
        if config.benchmark in JUDGED and config.step != "generate" and group.first:  # before hours of drawing
            judge_task = prepare_judge(config, benchmark, folder, confirm)
        if config.pictures is None and config.step != "score":
            draw(config, benchmark, group)
        group.wait()
        if config.step == "generate":
            return None
        return score(config, benchmark, folder, group, judge_task)


def draw(config: EvaluationConfig, benchmark: Benchmark, group: Ranks):
    """This rank's share of the pictures."""
    pipeline, about = load_pipeline(
        config.checkpoint or shipped_model(),
        revision=config.revision,
        dtype=config.dtype or "float32",
        device=rank_device(group, config.device),
    )
    if config.ema is not None:
        if about["ema"] not in (None, config.ema):
            raise ValueError(f"The checkpoint's run says ema: {about['ema']}, and it was given as {config.ema}.")
        about["ema"] = config.ema
    generate(
        pipeline,
        benchmark,
        config.output,
        about=about,
        asked=config.arguments,
        seed=config.seed or 0,
        batch_size=8 if config.batch_size is None else config.batch_size,
        rank=group.rank,
        num_ranks=group.count,
    )


def rank_device(group: Ranks, device: str | None = None) -> str:
    """This rank's own device of the kind that was asked for, by default the accelerator."""
    device = default_device() if device is None else device
    return device if group.count == 1 or device == "cpu" else f"{device.split(':')[0]}:{os.environ['LOCAL_RANK']}"


def prepare_judge(
    config: EvaluationConfig,
    benchmark: Benchmark,
    folder: Path,
    confirm: Callable[[str], bool] = lambda text: True,
) -> tuple[Judged, Judge | None]:
    """Everything about judging that can fail, before hours of drawing: files, key, cost, and where a
    judge that runs here is to be found; it is loaded later."""
    pictures = {drawing.path: folder / drawing.path for drawing in benchmark.drawings}
    task = judged(benchmark, pictures, config.wording)
    assert config.judge is not None
    if config.judge_url is None:
        resolve_model(config.judge, config.judge_revision)
        return task, None
    judge = EndpointJudge(config.judge, config.judge_url, revision=config.judge_revision, **config.judge_options)
    if (scorer_folder(config) / SCORER).is_file():
        begin_scoring(scorer_folder(config), judge.about | {"wording": task.wording}, benchmark)
    hashes = {path: sha256(file) for path, file in pictures.items() if file.is_file()}
    if len(hashes) == len(pictures) and kept_result(config, benchmark, hashes) is not None:
        return task, judge  # nothing will be asked
    waiting = len(task.unanswered(Details(scorer_folder(config), pictures=depends_on(benchmark, hashes)).read()))
    answered = len(task.keys) - waiting
    if config.max_requests is not None and waiting > config.max_requests:
        raise ValueError(
            f"{waiting:,} requests would be sent, more than the {config.max_requests:,} that max_requests allows."
        )
    if waiting and not confirm(f"{judge.about['address']}: {task.cost(answered, judge.max_tokens, config.prices)}"):
        raise ValueError("Not asked, as you wished.")
    return task, judge


def scorer_folder(config: EvaluationConfig) -> Path:
    """Where a scorer's files go: one folder for each judge or detector."""
    if config.benchmark == "geneval":
        names = [public_name(config.detector), config.detector_revision]
    elif config.benchmark == "shapes":
        names = ["rules"]
    else:
        assert config.judge is not None
        names = [public_name(config.judge), config.judge_revision]
    return config.output / SCORES / folder_name(*filter(None, names))


def score(
    config: EvaluationConfig,
    benchmark: Benchmark,
    folder: Path,
    group: Ranks,
    judge_task: tuple[Judged, Judge | None] | None,
) -> tuple[dict[str, Any], Path] | None:
    """The second step: what is seen in every picture, and what it adds up to."""
    pictures = find_pictures(benchmark, folder)
    generation = read_generation(folder, benchmark)
    notes = read_notes(benchmark, pictures)
    if config.step == "score":
        check_how_drawn(config, generation, folder)
    target = scorer_folder(config)
    hashes = {path: sha256(file) for path, file in pictures.items()}
    details = Details(target, group.rank, depends_on(benchmark, hashes))
    counts: dict[str, int] = {}
    about: dict[str, Any]
    device = rank_device(group, config.device)
    if config.benchmark == "geneval":
        models = GenEvalModels(
            config.detector,
            config.clip,
            detector_revision=config.detector_revision,
            clip_revision=config.clip_revision,
            device=device,
        )
        about = models.about
        begin_scoring(target, about, benchmark)
        if (kept := kept_result(config, benchmark, hashes)) is not None:
            return kept if group.first else None
        look(benchmark, pictures, details, group, device, models.score)
    elif config.benchmark == "shapes":
        about = {"kind": "rules", "rules": "iomm_hf.evaluation.shapes.score_image"}
        begin_scoring(target, about, benchmark)
        if (kept := kept_result(config, benchmark, hashes)) is not None:
            return kept if group.first else None
        look(benchmark, pictures, details, group, "cpu", look_at_shapes)
    if config.benchmark not in JUDGED:
        group.wait()
        if not group.first:
            return None
        lines = details.read()
        ordered = [lines[drawing.path] for drawing in benchmark.drawings]
        if config.benchmark == "geneval":
            scores = geneval.summarize((line["task"], line["correct"]) for line in ordered)
        else:
            metadata = [benchmark.metadata[drawing.item] for drawing in benchmark.drawings]
            seeds = [row["seed"] for row in metadata]
            scores = report_verdicts([line["correct"] for line in ordered], metadata, seeds=seeds).to_dict()
    else:
        assert config.judge is not None
        task, served = judge_task or prepare_judge(config, benchmark, folder)
        judge = served or TransformersJudge(
            config.judge,
            revision=config.judge_revision,
            device=device,
            **config.judge_options,
        )
        about = judge.about | {"wording": task.wording}
        begin_scoring(target, about, benchmark)
        if (kept := kept_result(config, benchmark, hashes)) is not None:
            return kept if group.first else None
        if served is None:  # runs here, on every rank
            ask_all(task, judge, details, rank=group.rank, num_ranks=group.count)
        elif group.first:
            ask_all(task, judge, details)
        group.wait()
        if not group.first:
            return None
        scores, counts = add_up(task, details, config.unreadable)
        lines = details.read()
        about = about | {
            "unreadable": config.unreadable,
            "models_that_answered": sorted({line["model"] for line in lines.values() if line.get("model")}),
            "tokens": {
                kind: sum(line.get("usage", {}).get(kind, 0) for line in lines.values())
                for kind in ("read", "written")
            },
        }
    counts = {
        "expected": len(benchmark.drawings),
        "found": len(pictures),
        "pictures": sum(len(drawing.seeds) for drawing in benchmark.drawings),
        "filtered": sum(note["filtered"] for note in notes if note is not None),
        "without_note": notes.count(None),
        **counts,
    }
    about = about | {"software": read_software(target)}
    result = build_result(
        benchmark, scores, scorer=about, counts=counts, pictures=pictures, hashes=hashes, generation=generation
    )
    result = json.loads(as_json(result))
    write_whole(target / RESULT, as_json(result), target / ".writing")
    places = {} if config.pictures is None else {"pictures": str(folder.resolve())}
    if config.benchmark == "imgedit" and benchmark.data is not None:
        places["sources"] = str(benchmark.data.pictures.resolve())
    if places:
        write_whole(target / LOCAL, as_json(places), target / ".writing")
    return result, target / RESULT


def depends_on(benchmark: Benchmark, hashes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What is seen in a picture, or answered about it, holds for these files alone: the picture and, of an edit, its source."""
    depends = {}
    for drawing in benchmark.drawings:
        if drawing.path in hashes:
            source = benchmark.source_picture(drawing)
            own = {} if source is None else {"source": sha256(source)}
            depends[drawing.path] = {"picture": hashes[drawing.path], **own}
    return depends


def begin_scoring(target: Path, about: Mapping[str, Any], benchmark: Benchmark):
    """Writes what every line of details depends on besides its picture, or checks that it is what they were begun with."""
    described = benchmark.describe()
    files = benchmark.data.describe()["sha256"] if benchmark.data is not None else None
    asked = {name: described[name] for name in ("name", "version", "prompts_sha256", "rewriting")}
    write_settings(target / SCORER, {**about, "benchmark": asked, "files": files}, "Scoring was")


def look(
    benchmark: Benchmark,
    pictures: Mapping[str, Path],
    details: Details,
    group: Ranks,
    device: str,
    see: Callable[[Any, Mapping[str, Any]], dict[str, Any]],
):
    """This rank's share of the pictures that have no line yet."""
    done = details.read()
    waiting = [drawing for drawing in benchmark.drawings[group.rank :: group.count] if drawing.path not in done]
    if waiting:
        record_software(details.folder, device)
    for drawing in tqdm(waiting, desc="Looking", unit="picture", disable=None if group.first else True):
        metadata = benchmark.metadata[drawing.item]
        line = {"key": drawing.path, "item": drawing.item, "task": metadata["tag"], "prompt": drawing.prompt}
        details.add(line | see(load_picture(pictures[drawing.path]), metadata))


def look_at_shapes(picture: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    verdict = score_image(picture, dict(metadata))
    found = [{"label": d.label, "box": list(d.box), "score": d.score, "color": d.color} for d in verdict.found]
    return {"correct": verdict.correct, "reason": verdict.reason, "detections": found}


def read_generation(folder: Path, benchmark: Benchmark) -> dict[str, Any] | None:
    """
    How the pictures in a folder were drawn, and by which software; `None` for those that came from elsewhere.

    Raises:
        OSError: If they were drawn for another benchmark, version, subset or wording of prompts.
    """
    file = folder.parent / SETTINGS
    if not file.is_file():
        return None
    generation = json.loads(file.read_text())
    drawn, asked = generation["benchmark"], json.loads(json.dumps(benchmark.describe()))
    # A part of what was drawn may be scored; rewritten prompts are told from others by their own record.
    differing = [name for name in asked if name not in ("subset", "items") and drawn.get(name) != asked[name]]
    if differing:
        name = differing[0]
        raise OSError(f"The pictures in {folder} were drawn with {name} {drawn.get(name)!r}, not {asked[name]!r}.")
    return generation | {"software": read_software(folder.parent)}


def read_notes(benchmark: Benchmark, pictures: Mapping[str, Path]) -> list[dict[str, Any] | None]:
    """
    What each picture says of itself; `None` for those that were not drawn here.

    Raises:
        OSError: If one says that it is of another benchmark, item or prompt.
    """
    notes = []
    for drawing in benchmark.drawings:
        note = read_note(pictures[drawing.path])
        source = benchmark.source_picture(drawing)
        asked = {"benchmark": benchmark.name, "item": drawing.item, "prompt": drawing.prompt}
        asked |= {"source": sha256(source)} if source is not None else {}
        for name, value in asked.items():
            if note is not None and note.get(name) != value:
                raise OSError(
                    f"{pictures[drawing.path]} was drawn for the {name} {note.get(name)!r}, and {value!r} is asked for."
                    + (" Prompts that were rewritten are given with --rewritten." if name == "prompt" else "")
                    + (" Its source picture has changed since: draw into another folder." if name == "source" else "")
                )
        notes.append(note)
    return notes


def check_how_drawn(config: EvaluationConfig, generation: Mapping[str, Any] | None, folder: Path):
    """
    Refuses a model or a sampling that was given for pictures which were drawn otherwise.

    Raises:
        OSError: If they were, or if nothing tells how they were drawn.
    """
    given = json.loads(json.dumps(config.how_to_draw, default=str))
    if not given:
        return
    if generation is None:
        raise OSError(
            f"No {SETTINGS} beside {folder} tells how its pictures were drawn: leave out {', '.join(given)}."
        )
    model = generation["model"]
    drawn = {"checkpoint": model["name"], "seed": generation["seed"], "batch_size": generation["batch_size"]}
    drawn |= {name: model[name] for name in ("revision", "dtype", "ema")}
    drawn |= generation["defaults"] | generation["arguments"]
    if config.checkpoint is not None:
        given["checkpoint"] = public_name(str(config.checkpoint))
        if Path(config.checkpoint).is_dir():  # a name that holds two folders' ends does not tell runs apart
            drawn["weights"], given["weights"] = model["weights_sha256"], hash_parts(Path(config.checkpoint))
    if drawn["revision"] is not None and given.get("revision", drawn["revision"]) != drawn["revision"]:
        given["revision"] = fetch_index(given.get("checkpoint", model["name"]), config.revision)[
            1
        ]  # of a branch or tag
    differing = [name for name, value in given.items() if drawn.get(name) != value]
    if differing:
        name = differing[0]
        raise OSError(
            f"The pictures in {folder} were drawn with other settings: {name} was {drawn.get(name)} and is now {given[name]}. Give the"
            " settings that they were drawn with or none, or draw into another folder."
        )


def source_hashes(files: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Of the pictures that are edited, in what is said of the authors' files; `None` where there are none."""
    return None if files is None or files["pictures"] is None else files["pictures"]["sha256"]


def kept_result(
    config: EvaluationConfig, benchmark: Benchmark, hashes: Mapping[str, str]
) -> tuple[dict[str, Any], Path] | None:
    """
    The result that is there already, and its file; `None` where there is none yet.

    Raises:
        OSError: If it is another one than these pictures have: results are not replaced.
    """
    file = scorer_folder(config) / RESULT
    if not file.is_file():
        return None
    there = read_result(file)
    asked = {
        "benchmark": json.loads(json.dumps(benchmark.describe())),
        "pictures_sha256": hash_pictures(hashes),
        "unreadable": config.unreadable if config.benchmark in JUDGED else None,
        "source pictures": source_hashes(benchmark.data.describe()) if benchmark.data is not None else None,
    }
    found = there | {
        "unreadable": there["scorer"].get("unreadable"),
        "source pictures": source_hashes(there.get("files")),
    }
    differing = [name for name, value in asked.items() if found[name] != value]
    if differing:
        raise OSError(
            f"{file} holds another result ({', '.join(differing)} differ), and results are never replaced. Remove it, and what was"
            " seen and answered beside it serves a new one, or give another output folder."
        )
    return there, file
