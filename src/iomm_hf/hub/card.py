"""The model card of a published checkpoint: `model_card.md` filled in with what its files, its run and its scores say.

Nothing is guessed: what no file or argument says stands in the card as not given. Of a run's data only what lies on the Hub is named, never
a path of the machine that it ran on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from .. import __version__
from ..evaluation.results import AVERAGED, SCHEMA, reservations, values_of
from ..modeling_iomm import hash_weight_files
from ..pipeline_iomm import IOMMPipeline


TEMPLATE = Path(__file__).with_name("model_card.md")  # also linked at the top of the repository
COMPONENTS = ("mllm", "adapter", "transformer", "vae")  # each needs a licence of its own
LIMITS = (
    "It draws what its training pictures taught it and inherits their biases and those of the frozen parts. Nothing filters prompts or"
    " pictures. Objects may be left out or miscounted, and colours or places exchanged between them."
)

# Of each benchmark's scores: the Hub's type and name of the data set, of the metric, and what it is.
BENCHMARKS = {
    "geneval": ("geneval", "GenEval", "accuracy", "pictures that show their prompt"),
    "dpg": ("dpg-bench", "DPG-Bench", "dpg", "questions that hold, per cent"),
    "wise": ("wise", "WISE (legacy)", "wiscore", "WiScore"),
    "wise-verified": ("wise-verified", "WISE_Verified", "wiscore", "binary WiScore"),
    "imgedit": ("imgedit-bench", "ImgEdit-Bench (basic)", "score", "mean of three scores of 1 to 5"),
    "shapes": ("iomm-hf-shapes-world", "iomm-hf's shapes world", "accuracy", "pictures that show their prompt"),
}


@dataclass(frozen=True)
class Sample:
    """A picture of the card: `file` is its path in the repository."""

    prompt: str
    seed: int
    file: str


@dataclass(frozen=True)
class Reference:
    """Frozen weights that a checkpoint leaves out, and where they lie on the Hub."""

    name: str
    subfolder: str | None
    revision: str | None


def check_licences(licences: Mapping[str, str]):
    r"""
    Refuses anything but one licence for each of `mllm`, `adapter`, `transformer` and `vae`.

    Raises:
        `ValueError`: a part has none, is unknown, or its licence is empty or not of the form of the Hub's identifiers.

    Example:

    ```python
    >>> from iomm_hf.hub.card import check_licences
    >>> check_licences(dict(mllm="mit", adapter="apache-2.0", transformer="apache-2.0", vae="apache-2.0"))
    ```
    """
    missing = [part for part in COMPONENTS if part not in licences]
    unknown = sorted(set(licences) - set(COMPONENTS))
    if missing or unknown:
        raise ValueError(
            f"A licence is needed for each of {', '.join(COMPONENTS)}:"
            + (f" none was given for {', '.join(missing)}." if missing else "")
            + (f" {', '.join(unknown)} is not such a part." if unknown else "")
            + " Look it up at each part's source and say it as mllm=apache-2.0."
        )
    for part, licence in licences.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
            raise ValueError(
                f"The licence of {part} must be one of the Hub's identifiers, such as apache-2.0, mit or other; got"
                f" {licence!r}."
            )


def write_card(
    folder: Path,
    repo_id: str,
    pipeline: IOMMPipeline,
    licences: Mapping[str, str],
    samples: Sequence[Sample],
    *,
    steps: int,
    guidance: float,
    mllm_reference: Reference | None = None,
    vae_reference: Reference | None = None,
    base_models: Sequence[str] = (),
    revision: str | None = None,
    run: Path | None = None,
    scores: Sequence[Path] = (),
    benchmark: str | None = None,
    data: str | None = None,
    cost: str | None = None,
    limits: str | None = None,
    step: int | None = None,
):
    """Writes `README.md` into an exported folder, with `benchmark` also the scores as `.eval_results/<name>.yaml`. `step` is the
    run's at which the checkpoint was written, if that is not its end."""
    settings, seen = read_run(run, step) if run is not None else ({}, {})
    sources, datasets = describe_sources(settings)
    read = [read_score(score, folder) for score in scores]
    results = [result for own, _ in read for result in own]
    tables = [table for _, table in read]
    if benchmark is not None:
        if len(read) != 1:
            raise ValueError(
                f"benchmark={benchmark!r} names where a score belongs, but {len(read)} scores were given."
            )
        write_eval_results(folder, results, benchmark, tables[0]["about"], tables[0]["name"])
    encoder = pipeline.text_encoder
    adapter = [part for part in (encoder.adapter, encoder.connector) if part is not None]
    parts = [
        _part("mllm", "frozen multimodal LLM", [encoder.mllm], "no", licences, mllm_reference),
        _part("adapter", "residual query adapter, connector", adapter, "yes", licences, None),
        _part("transformer", "generator", [pipeline.transformer], "yes", licences, None),
        _part("vae", "frozen autoencoder", [pipeline.vae], "no", licences, vae_reference),
    ]
    one = licences["transformer"] if len(set(licences.values())) == 1 else None
    card_data = ModelCardData(
        license=one or "other",
        license_name=None if one else "one-for-each-part",
        license_link=None if one else f"https://huggingface.co/{repo_id}#parts-and-licences",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["iomm", "iomm-hf", "text-to-image", "image-to-image"],
        base_model=list(base_models) or None,
        datasets=datasets or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        version=__version__,
        repo_id=repo_id,
        revision=revision,
        samples=samples,
        steps=steps,
        guidance=guidance,
        resolution=pipeline.resolution,
        vae_reference=vae_reference,
        parts=parts,
        data=" ".join(filter(None, [data, sources])) or "Not given.",
        training={**describe_settings(settings), **seen},
        cost=cost or seen.get("time") or "Not given.",
        evaluations=tables,
        limits=" ".join(filter(None, [limits, LIMITS])),
    )
    card.save(folder / "README.md")


def _part(
    name: str, description: str, modules: list, trained: str, licences: Mapping[str, str], reference: Reference | None
) -> dict[str, Any]:
    where = "in this repository"
    if reference is not None:
        path = f"{reference.name}/{reference.subfolder}" if reference.subfolder else reference.name
        where = f"[{path}](https://huggingface.co/{reference.name}) at `{reference.revision}`, fetched at load"
    classes = " and ".join(f"`{type(module).__name__}`" for module in modules if type(module).__name__ != "ModuleList")
    return {
        "name": name,
        "description": f"{description}, {classes}" if classes else description,
        "weights": sum(weight.numel() for module in modules for weight in module.parameters()),
        "trained": trained,
        "licence": licences[name],
        "where": where,
    }


def read_run(run: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    r"""
    A run's settings and what its log says until a step, by default to its end, from its `run.json` and `log.jsonl`.

    Raises:
        `OSError`: the folder is no run's.
    """
    if not (run / "run.json").is_file() or not (run / "log.jsonl").is_file():
        raise OSError(f"{run} holds no run.json with log.jsonl; give the output_dir of a training run.")
    started = json.loads((run / "run.json").read_text())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    if step is not None:
        rows = [row for row in rows if row["step"] <= step]
    seconds = images = 0.0
    for row in rows:
        seconds += (row["images"] - images) / row["images_per_second"]
        images = row["images"]
    seen = {} if step is None else {"steps taken": f"{step:,}"}
    if rows:
        logged = rows[-1]["step"]  # the checkpoint may be of a step between two lines of the log
        taken = step or logged
        last = [row["loss"] for row in rows[-10:] if "loss" in row]
        seen = {
            "pictures seen": f"{int(images) * taken // logged:,}",
            "steps taken": f"{taken:,}",
            "pictures a second": f"{images / seconds:.1f}",
            "time": f"{seconds / 3600:.2f} hours by the clock in {logged:,} training steps, without set-up, evaluation and saving.",
        }
        if last:
            seen["last logged loss"] = f"{sum(last) / len(last):.4f} (mean of the last {len(last)} lines of the log)"
    software = {
        "versions": started["versions"],
        "commit": started["commit"],
        "modified": started.get("modified", False),
    }
    settings = started["config"] | software
    return settings, seen


def describe_settings(settings: dict[str, Any]) -> dict[str, str]:
    """The settings of a run that say how a model was made, as rows of the card."""
    if not settings:
        return {}
    names = (
        "preset mask_ratio mix_ratio resolution batch_size gradient_accumulation max_steps optimizer learning_rate"
        " adapter_learning_rate ema_decay mixed_precision condition_dropout timestep_sampling seed"
    )
    rows = {name: f"`{settings[name]}`" for name in names.split() if settings.get(name) is not None}
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    commit = f"`{settings['commit']}`" if settings["commit"] else "not known"
    return rows | {"software": versions, "commit": commit + (", modified" if settings.get("modified") else "")}


def describe_sources(settings: dict[str, Any]) -> tuple[str, list[str]]:
    """A sentence about a run's data, and the ids of its data sets that surely lie on the Hub."""
    groups = {"pictures without text": "images", "pairs of picture and text": "pairs"}
    sentences, datasets = [], []
    for title, key in groups.items():
        paths = [source if isinstance(source, str) else source["path"] for source in settings.get(key) or []]
        named = []
        for path in paths:
            on_hub = re.match(r"hf://datasets/([^/]+/[^/@]+)", path)
            if on_hub:
                datasets.append(on_hub.group(1))
            named.append(source_name(path))
        if named:
            sentences.append(f"{title.capitalize()}: {', '.join(dict.fromkeys(named))}.")
    return " ".join(sentences), list(dict.fromkeys(datasets))


def source_name(path: str) -> str:
    r"""
    What a card says of a source of data: its public address, and of everything else nothing that could be private.

    Args:
        path (`str`): As in a run's settings.

    Returns:
        `str`: a Hub id, `hf://` or `http(s)://` address as code. An address with a password or a query, which may hold
        a key, and whatever else is not surely public, is "files of the trainer's own".

    Example:

    ```python
    >>> from iomm_hf.hub.card import source_name
    >>> source_name("https://example.org/a.tar"), source_name("/home/me/*.tar")
    ('`https://example.org/a.tar`', "files of the trainer's own")
    ```
    """
    # A folder of two names that is not here any more looks like an id: name it, but claim no data set of it.
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".") and not Path(path).exists()
    address = re.fullmatch(r"hf://[^\s`]+|https?://[^\s`/@?#]+(/[^\s`?#]*)?", path) and "::" not in path
    return f"`{path}`" if hub_id or address else "files of the trainer's own"


def read_score(score: Path, folder: Path) -> tuple[list[EvalResult], dict[str, Any]]:
    r"""
    Scores for the card's metadata and its table, from a `result.json` of `iomm-hf evaluate` or from the `score.json` of
    `recipes/score_shapes.py`.

    Args:
        score (`Path`): The file.
        folder (`Path`): The published folder, whose generator a result must be of.

    Raises:
        `OSError`: the file is of another shape, or tells of a part of a benchmark only.
        `ValueError`: the scores are another generator's.
    """
    scores = json.loads(score.read_text())
    if scores.get("schema") == SCHEMA:
        return read_result(score, scores, folder)
    reports = {name: value for name, value in scores.items() if isinstance(value, dict) and "overall" in value}
    if "model" not in reports:
        raise OSError(f"{score} holds no scores of `model`; give the score.json that recipes/score_shapes.py writes.")
    check_generator(score, scores.get("weights_sha256"), folder)
    model = reports["model"]
    tasks = list(model["tasks"])
    steps, guidance = scores["num_inference_steps"], scores["guidance_scale"]
    about = (
        f"Share of {model['pictures']:,} pictures ({model['prompts']} prompts, seeds {min(model['seeds'])} to"
        f" {max(model['seeds'])}) of the shapes world that show their prompt, judged by rule, {steps} steps, guidance"
        f" {guidance}; 95 % intervals. Its six tasks are named after GenEval's and are not GenEval."
    )
    values = {"overall": model["overall"]["value"]} | {task: model["tasks"][task]["accuracy"] for task in tasks}
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="iomm-hf-shapes-world",  # drawn by the package; not a data set of the Hub
            dataset_name="iomm-hf's shapes world",
            dataset_config=task,
            metric_type="accuracy",
            metric_name="pictures that show their prompt",
            metric_value=round(value, 4),
        )
        for task, value in values.items()
    ]
    rows = []
    for name, report in reports.items():
        overall = report["overall"]
        row = [name, f"{overall['value']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}]"]
        for task in tasks:
            cell = report["tasks"][task]
            row.append(f"{cell['accuracy']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]")
        rows.append(row)
    return results, {"name": "shapes", "about": about, "columns": ["overall", *tasks], "rows": rows}


def check_generator(file: Path, scored: dict[str, str] | None, folder: Path):
    """Refuses scores of other weights than the folder's generator, or that do not say of which."""
    if scored is None:
        raise OSError(f"{file} does not say of which weights it tells: score the checkpoint again.")
    published = hash_weight_files(folder / "transformer")
    if scored.get("transformer") != published:
        raise ValueError(
            f"{file} is of a generator whose weights hash to {scored.get('transformer')}, this checkpoint's to {published}."
        )


def read_result(file: Path, result: dict[str, Any], folder: Path) -> tuple[list[EvalResult], dict[str, Any]]:
    """A result of `iomm-hf evaluate`, checked to be of this folder's generator and of a whole benchmark; see [`read_score`]."""
    benchmark, generation, counts, scorer = (result[name] for name in ("benchmark", "generation", "counts", "scorer"))
    name = benchmark["name"]
    if benchmark["subset"] is not None or result["scores"]["overall"] is None:
        raise OSError(f"{file} tells of {benchmark['items']} items of {name} only; a card takes whole benchmarks.")
    if generation is None:
        raise OSError(f"{file} does not know which model drew its pictures; a card takes results of this checkpoint.")
    check_generator(file, generation["model"]["weights_sha256"], folder)
    dataset_type, dataset_name, metric_type, metric_name = BENCHMARKS[name]
    values = values_of(name, result["scores"])
    results = [
        EvalResult(
            task_type="image-to-image" if name == "imgedit" else "text-to-image",
            dataset_type=dataset_type,
            dataset_name=dataset_name,
            dataset_config=part,
            dataset_revision=benchmark["version"],
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=round(value, 4),
        )
        for part, value in values.items()
        if value is not None
    ]
    arguments = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in generation["arguments"].items())
    who = scorer.get("judge") or scorer.get("detector") or scorer["rules"]
    commit = scorer.get("revision") or scorer.get("detector_revision")
    rewriting = benchmark["rewriting"]
    about = (
        f"{dataset_name}: {counts['found']:,} of {counts['expected']:,} files, {arguments}, {', '.join(result['picture_sizes'])} px, seed"
        f" {generation['seed']}, prompts {'as published' if rewriting is None else 'rewritten by ' + rewriting['file']}, looked at by `{who}`"
        + (f" at `{commit}`" if commit else "")
        + f", {AVERAGED[generation['model']['ema']]}"
        + "".join(f", {remark}" for remark in reservations(result))
        + f". Benchmark version `{benchmark['version']}`, prompts sha256 `{benchmark['prompts_sha256'][:16]}`, iomm-hf"
        f" {result['software']['versions']['iomm-hf']}."
    )
    columns = [part for part, value in values.items() if value is not None]
    row = [generation["model"]["name"], *(f"{values[part]:.3f}" for part in columns)]
    return results, {"name": name, "about": about, "columns": columns, "rows": [row]}


def write_eval_results(folder: Path, results: Sequence[EvalResult], benchmark: str, notes: str, name: str):
    """Writes the scores as the Hub's leaderboards read them: only for a benchmark that is a data set there."""
    entries = [
        EvalResultEntry(
            dataset_id=benchmark, task_id=str(result.dataset_config), value=result.metric_value, notes=notes
        )
        for result in results
    ]
    file = folder / ".eval_results" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
