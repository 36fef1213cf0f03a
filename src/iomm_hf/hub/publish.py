"""Publishing a checkpoint: what is uploaded is first written whole into a folder, which anybody can look at.

A published folder is a pipeline folder whose index names the code beside its weights, so that diffusers and transformers
load it without iomm-hf; `IOMMPipeline` puts its own classes in their place and runs none of it.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import safe_open

from ..devices import move
from ..files import begin_folder, replace_folder
from ..integrity import CHECKSUMS, PICKLES, write_checksums
from ..modeling_iomm import IOMMConditionEncoder, resolve_frozen
from ..pipeline_iomm import PARTS, PIPELINE_FILES, IOMMPipeline
from .card import BENCHMARKS, Reference, Sample, check_licences, write_card


# Modules that a published checkpoint carries. The pipeline may import the others, these import none of ours: diffusers
# follows relative imports for one level only.
REMOTE_CODE = (
    "generators",
    "integrity",
    "lora",
    "modeling_iomm",
    "pipeline_inputs",
    "pipeline_iomm",
    "processing_iomm",
)
# transformers takes code from the top of a repository, diffusers from the component's folder: it lies in both.
PART_CODE = {"text_encoder": "modeling_iomm", "processor": "processing_iomm"}
AUTO_MAPS = {
    "text_encoder/config.json": {
        "AutoConfig": "modeling_iomm.IOMMConfig",
        "AutoModel": "modeling_iomm.IOMMConditionEncoder",
    },
    "processor/processor_config.json": {"AutoProcessor": "processing_iomm.IOMMProcessor"},
}
PROMPTS = ("a red circle", "a blue star", "two green squares", "a yellow triangle left of a red circle")
GUIDANCE = 3.0
TOLERANCE = 3  # of 255: the same picture drawn again, allowing for other kernels


@dataclass(frozen=True)
class Published:
    """What [`publish`] did: the folder that it wrote and, unless it was a dry run, the commit on the Hub."""

    folder: Path
    repo_id: str
    commit: str | None


def publish(
    folder: str | Path,
    repo_id: str,
    licences: Mapping[str, str],
    *,
    include_frozen: bool = True,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    output_dir: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    num_inference_steps: int = 30,
    run: str | Path | None = None,
    score: str | Path | Sequence[str | Path] | None = None,
    benchmark: str | None = None,
    data: str | None = None,
    cost: str | None = None,
    limits: str | None = None,
) -> Published:
    r"""
    Uploads a checkpoint with its model card and the code to load it anywhere, and loads it back in a fresh process.

    The same call goes on after an interruption: files that arrived are not sent again. `state/` and everything else that
    loading does not need stays here.

    Args:
        folder (`str` or `Path`): A pipeline folder: `final/`, `best/` or `checkpoint-*/` of a run.
        repo_id (`str`): Where on the Hub, `"user/name"`; created if it is not there.
        licences (`dict[str, str]`): The Hub's identifier of the licence of each of `mllm`, `adapter`, `transformer` and
            `vae`.
        include_frozen (`bool`, *optional*, defaults to `True`): Whether MLLM and autoencoder are uploaded too, or stay
            referenced by Hub id, commit and hash.
        private (`bool`, *optional*): Whether a new repository is private. By default as the account is set.
        revision (`str`, *optional*): A branch to upload to, created if it is not there. Defaults to `main`.
        dry_run (`bool`, *optional*, defaults to `False`): Write and check the folder, upload nothing.
        output_dir (`str` or `Path`, *optional*): Where the folder is written, anew each time. Defaults to
            `outputs/published/` and the repository's id.
        prompts (`list[str]`, *optional*): What the card's pictures show; each is drawn with its number as seed.
        num_inference_steps (`int`, *optional*, defaults to 30): Steps of these pictures.
        run (`str` or `Path`, *optional*): The run's `output_dir`, whose settings and log go into the card.
        score (`str`, `Path` or a list, *optional*): Results of this checkpoint: `result.json` of `iomm-hf evaluate`, or the
            `score.json` of `recipes/score_shapes.py`.
        benchmark (`str`, *optional*): Id of the data set on the Hub whose leaderboard the score belongs to.
        data, cost, limits (`str`, *optional*): What the card says of them beside what the run's files tell.

    Returns:
        [`Published`].

    Raises:
        `ValueError`: a licence is missing, an argument does not fit, or the repository is public and `private` was asked.
        `OSError`: the folder is no checkpoint, holds pickles, cannot be referenced, or does not load back as it was.

    Example:

    ```python
    >>> from iomm_hf.hub.publish import publish
    >>> licences = dict.fromkeys(["mllm", "adapter", "transformer", "vae"], "apache-2.0")
    >>> publish("outputs/nothing", "me/tiny", licences, dry_run=True)
    Traceback (most recent call last):
    OSError: outputs/nothing holds no model_index.json; give a pipeline folder, such as final/ of a run.
    ```
    """
    check_licences(licences)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"The repository must be named as user/name, got {repo_id!r}.")
    if not prompts:
        raise ValueError("Give at least one prompt: the card shows what this checkpoint draws.")
    folder = Path(folder)
    if not (folder / IOMMPipeline.config_name).is_file():
        raise OSError(
            f"{folder} holds no {IOMMPipeline.config_name}; give a pipeline folder, such as final/ of a run."
        )
    output = Path("outputs/published", repo_id) if output_dir is None else Path(output_dir)
    if output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"output_dir={str(output)!r} is written anew and holds the checkpoint itself; name another one."
        )
    if output.exists() and not (output / CHECKSUMS).is_file() and any(output.iterdir()):
        raise ValueError(f"{output} holds something else than a published folder; name another output_dir.")

    # 1. The folder, written here from end to end, and there whole or not at all, before anything is sent
    pipeline = IOMMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    writing = begin_folder(output)
    references = export(folder, writing, pipeline, include_frozen)
    samples = draw_samples(pipeline, writing, prompts, num_inference_steps)
    write_card(
        writing,
        repo_id,
        pipeline,
        licences,
        samples,
        steps=num_inference_steps,
        guidance=GUIDANCE,
        mllm_reference=references.get("mllm"),
        vae_reference=references.get("vae"),
        base_models=base_models(pipeline),
        revision=revision,
        run=None if run is None else Path(run),
        scores=[Path(file) for file in ([score] if isinstance(score, str | Path) else score or [])],
        benchmark=benchmark,
        data=data,
        cost=cost,
        limits=limits,
        step=trained_until(folder),
    )
    # The card may be edited on the Hub's pages later, so it has no sum.
    files = [str(path.relative_to(writing)) for path in writing.rglob("*") if path.is_file()]
    write_checksums(writing, [name for name in files if name != "README.md"])
    replace_folder(writing, output)
    picture = output / samples[0].file
    del pipeline  # the fresh process needs the memory
    if dry_run:
        load_back_in_a_fresh_process(str(output), None, samples[0], picture, num_inference_steps)
        return Published(output, repo_id, None)

    # 2. The upload
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} is there already and public. Make it private in its settings, or name another.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    done = upload(
        api,
        repo_id=repo_id,
        folder_path=output,
        revision=revision,
        # What an earlier checkpoint left, and nothing that its owner added
        delete_patterns=[*(f"{part}/*" for part in PARTS), "samples/[0-9][0-9].png"]
        + [f".eval_results/{name}.yaml" for name in BENCHMARKS],
    )

    # 3. What others will load
    load_back_in_a_fresh_process(repo_id, done.oid, samples[0], picture, num_inference_steps)
    return Published(output, repo_id, done.oid)


def upload(api: HfApi, **folder) -> CommitInfo:
    r"""
    Uploads a folder; what has arrived before is not sent again.

    Raises:
        `OSError`: the upload broke off.
    """
    try:
        return api.upload_folder(commit_message="Publish with iomm-hf", **folder)
    except RuntimeError as error:  # the client's for a file, around the Hub's own
        raise OSError(
            f"{error} {error.__cause__ or ''} Start the same command again: what has arrived is kept."
        ) from error


def export(folder: Path, output: Path, pipeline: IOMMPipeline, include_frozen: bool) -> dict[str, Reference]:
    """Writes the published form of a pipeline folder, without card and sums; returns the references it depends on."""
    for part in PARTS:
        if (folder / part).is_dir():
            pickles = sorted(path.name for path in (folder / part).rglob("*") if path.suffix in PICKLES)
            if pickles:
                raise OSError(f"{folder / part} holds {pickles}: pickles are not published. Save as safetensors.")
            shutil.copytree(folder / part, output / part, ignore=everything_but_what_loading_needs)

    # Frozen parts: in or out, whatever the checkpoint has
    references = {}
    encoder, index = pipeline.text_encoder, pipeline.config
    holds_mllm = any(name.startswith("mllm.") for name in weight_names(folder / "text_encoder"))
    if include_frozen:
        if not holds_mllm:
            rewrite(encoder, output / "text_encoder", include_frozen=True)
        if not (folder / "vae").is_dir():
            source = resolve_frozen(index["vae_name_or_path"], index["vae_revision"], index["vae_subfolder"])
            shutil.copytree(source, output / "vae", ignore=everything_but_what_loading_needs)
    else:
        config = encoder.config
        references["mllm"] = reference("MLLM", config.mllm_name_or_path, None, config.mllm_revision)
        references["vae"] = reference(
            "autoencoder", index["vae_name_or_path"], index["vae_subfolder"], index["vae_revision"]
        )
        if holds_mllm:
            # In the file's own precision; the pipeline is held in float32.
            trained = IOMMConditionEncoder.from_pretrained(folder / "text_encoder", dtype="auto")
            rewrite(trained, output / "text_encoder", include_frozen=False)
        shutil.rmtree(output / "vae", ignore_errors=True)

    # Settings: classes beside the weights, and nothing of this machine
    settings = json.loads((folder / "model_index.json").read_text())
    settings["_class_name"] = ["pipeline_iomm", "IOMMPipeline"]
    for part, module in PART_CODE.items():
        settings[part] = [module, settings[part][1]]
    settings["vae"] = ["diffusers", AutoencoderKL.__name__] if include_frozen else [None, None]
    (output / "model_index.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in output.rglob("*.json"):
        content = json.loads(file.read_text())
        name = str(file.relative_to(output))
        if name in AUTO_MAPS:
            content["auto_map"] = AUTO_MAPS[name]
        cleaned = without_paths(content)
        if cleaned != json.loads(file.read_text()):
            file.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")

    package = Path(__file__).parents[1]
    for module in REMOTE_CODE:
        shutil.copyfile(package / f"{module}.py", output / f"{module}.py")
    for part, module in PART_CODE.items():
        shutil.copyfile(package / f"{module}.py", output / part / f"{module}.py")
    return references


def trained_until(folder: Path) -> int | None:
    """The step at which a run wrote `checkpoint-*/` or `best/`; `None` for `final/`, which is of the whole run."""
    for file in (folder / "state" / "trainer.json", folder / "score.json"):
        if file.is_file():
            return json.loads(file.read_text()).get("step")  # the scores of recipes/score_shapes.py name none
    return None


def everything_but_what_loading_needs(folder: str, names: list[str]) -> list[str]:
    kept = {pattern.removeprefix("*") for pattern in PIPELINE_FILES if pattern.startswith("*")}
    return [
        name
        for name in names
        if name.startswith(".") or not (Path(name).suffix in kept or Path(folder, name).is_dir())
    ]


def rewrite(encoder: IOMMConditionEncoder, folder: Path, include_frozen: bool):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    encoder.save_pretrained(folder, include_frozen=include_frozen)


def weight_names(folder: Path) -> list[str]:
    """Names of all weights in a component's safetensors files."""
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names += weights.keys()
    return names


def reference(part: str, name: str | None, subfolder: str | None, revision: str | None) -> Reference:
    r"""
    Raises:
        `OSError`: nobody else could follow it.
    """
    if name is None or not on_hub(name):
        raise OSError(
            f"The {part} cannot be left out: this checkpoint refers to {name!r}, and others need a Hub id. Publish with"
            " the frozen parts included."
        )
    return Reference(name, subfolder, revision)


def on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def base_models(pipeline: IOMMPipeline) -> list[str]:
    """Hub ids of what this checkpoint was built on."""
    names = (pipeline.text_encoder.config.mllm_name_or_path, pipeline.config["vae_name_or_path"])
    return list(dict.fromkeys(name for name in names if name is not None and on_hub(name)))


def without_paths(settings: Any) -> Any:
    """Settings without `_name_or_path`, in which libraries note where a part came from, and without references to
    folders of this machine."""
    if not isinstance(settings, dict):
        return settings
    cleaned = {name: without_paths(value) for name, value in settings.items() if name != "_name_or_path"}
    for part in ("mllm", "vae"):
        name = cleaned.get(f"{part}_name_or_path")
        if name is not None and not on_hub(name):
            for field in ("name_or_path", "revision", "hash", "subfolder"):
                if f"{part}_{field}" in cleaned:
                    cleaned[f"{part}_{field}"] = None
    return cleaned


def draw_samples(pipeline: IOMMPipeline, output: Path, prompts: Sequence[str], steps: int) -> list[Sample]:
    move(pipeline)
    (output / "samples").mkdir()
    samples = [Sample(prompt, seed, f"samples/{seed:02d}.png") for seed, prompt in enumerate(prompts)]
    for sample in samples:
        draw(pipeline, sample, steps).save(output / sample.file)
    return samples


def draw(pipeline: IOMMPipeline, sample: Sample, steps: int) -> Image.Image:
    images, *_ = pipeline(
        sample.prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(sample.seed),
        return_dict=False,
    )
    return images[0]


def load_back_in_a_fresh_process(where: str, revision: str | None, sample: Sample, picture: Path, steps: int):
    r"""
    Loads a published checkpoint as others will and draws a picture of its card again.

    Raises:
        `OSError`: it does not load, or draws something else.
    """
    request = {"where": where, "revision": revision, "sample": asdict(sample), "picture": str(picture), "steps": steps}
    done = subprocess.run(
        [sys.executable, "-c", "from iomm_hf.hub.publish import load_back; load_back()"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        at = f" at {revision}" if revision else ""
        raise OSError(
            f"{where}{at} was written but did not load back as it should:\n{done.stderr.strip()[-2000:]}\nRepair what"
            " is named here and publish again."
        )


def load_back():
    """The fresh process of [`load_back_in_a_fresh_process`]; reads its request from the standard input."""
    request = json.loads(sys.stdin.read())
    options = {} if request["revision"] is None else {"revision": request["revision"]}
    pipeline = IOMMPipeline.from_pretrained(request["where"], **options)
    pipeline.set_progress_bar_config(disable=True)
    move(pipeline)
    drawn = np.asarray(draw(pipeline, Sample(**request["sample"]), request["steps"]), dtype=int)
    expected = np.asarray(Image.open(request["picture"]), dtype=int)
    if drawn.shape != expected.shape or np.abs(drawn - expected).max() > TOLERANCE:
        raise SystemExit(
            f"It loads but does not draw {request['sample']['prompt']!r} as the checkpoint did before: its frozen parts"
            " or its weights are not the same."
        )
