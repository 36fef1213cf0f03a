"""A benchmark's pictures: in the official layout, the same whoever draws them, never drawn over, for any diffusers pipeline."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from iomm_hf.evaluation.benchmarks import check_item, first_items, load_benchmark
from iomm_hf.evaluation.generation import generate, grid, in_batches, read_note
from iomm_hf.evaluation.results import Incomplete, find_pictures, read_software
from iomm_hf.integrity import sha256


STEPS = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def geneval():
    return load_benchmark("geneval", limit=2)


def draw(pipe, benchmark, output, **more):
    return generate(pipe, benchmark, output, about={"name": "tiny"}, asked=STEPS, **{"batch_size": 1} | more)


def files_of(output) -> dict[str, bytes]:
    folder = output / "pictures"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_geneval_folders_are_the_official_ones(pipe, geneval, tmp_path):
    assert draw(pipe, geneval, tmp_path) == 8
    files = files_of(tmp_path)
    for item, metadata in geneval.metadata.items():
        assert json.loads(files[f"{item}/metadata.jsonl"]) == metadata
        assert {f"{item}/samples/{i:04}.png" for i in range(4)} <= set(files)
    assert len(files) == 10 and set(geneval.metadata) == {"00000", "00276"}
    pictures = {name: content for name, content in files.items() if name.endswith(".png")}
    assert len(set(pictures.values())) == 8  # each from its own noise


def test_ranks_and_an_interruption_change_no_picture(pipe, geneval, tmp_path):
    draw(pipe, geneval, tmp_path / "whole")
    shares = [draw(pipe, geneval, tmp_path / "ranks", rank=rank, num_ranks=3) for rank in (2, 0, 1)]
    assert shares == [2, 3, 3] and files_of(tmp_path / "ranks") == files_of(tmp_path / "whole")
    # Stopped after one rank of two, and gone on with by one process; what was there stays untouched.
    draw(pipe, geneval, tmp_path / "stopped", rank=1, num_ranks=2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped/pictures").rglob("*.png")}
    assert len(kept) == 4 and draw(pipe, geneval, tmp_path / "stopped") == 4
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    assert draw(pipe, geneval, tmp_path / "stopped") == 0


def test_neither_shares_nor_what_is_missing_change_who_is_drawn_with_whom(tmp_path):
    """A pipeline whose pictures tell of their whole batch: rounding tells of it too, but not on every machine."""
    benchmark = load_benchmark("shapes", limit=10)

    def run(name, **more):
        return generate(Sociable(), benchmark, tmp_path / name, about={}, batch_size=4, **more)

    assert run("whole") == 10
    whole = files_of(tmp_path / "whole")
    assert len({Image.open(tmp_path / "whole/pictures" / name).getpixel((0, 0)) for name in whole}) == 3  # 4, 4 and 2
    assert [run("ranks", rank=rank, num_ranks=2) for rank in (1, 0)] == [4, 6]
    assert files_of(tmp_path / "ranks") == whole
    names = sorted(whole)
    for name in (names[1], names[6], names[9]):
        (tmp_path / "ranks/pictures" / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "ranks/pictures").iterdir()}
    assert [run("ranks", rank=rank, num_ranks=3) for rank in range(3)] == [1, 1, 1]
    assert files_of(tmp_path / "ranks") == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_part_of_the_benchmark_draws_the_pictures_of_the_whole():
    whole = load_benchmark("geneval")
    few = first_items(whole, 1)
    assert [drawing for drawing in whole.drawings if drawing.item in few.metadata] == few.drawings
    assert len({drawing.seeds for drawing in whole.drawings}) == 2212
    other = load_benchmark("geneval", seed=1)
    assert not {drawing.seeds for drawing in other.drawings} & {drawing.seeds for drawing in whole.drawings}


def test_other_settings_are_refused_in_a_folder_that_was_begun(pipe, geneval, tmp_path):
    draw(pipe, geneval, tmp_path, rank=0, num_ranks=8)
    before = files_of(tmp_path)
    with pytest.raises(OSError, match="batch_size was 1 and is now 2"):
        draw(pipe, geneval, tmp_path, batch_size=2)
    with pytest.raises(OSError, match="arguments was"):
        generate(pipe, geneval, tmp_path, about={"name": "tiny"}, asked=STEPS | {"guidance_scale": 2.0}, batch_size=1)
    with pytest.raises(OSError, match="model was"):
        generate(pipe, geneval, tmp_path, about={"name": "other"}, asked=STEPS, batch_size=1)
    assert files_of(tmp_path) == before


def test_every_session_that_drew_is_on_record(pipe, geneval, tmp_path):
    draw(pipe, geneval, tmp_path, rank=0, num_ranks=2)
    [first] = read_software(tmp_path)
    version = first["versions"]["torch"]
    assert first["device"] == "cpu" and version is not None
    # An earlier session of other versions; going on adds one's own, and only who draws something does.
    file = next((tmp_path / "software").iterdir())
    file.write_text(json.dumps(first | {"versions": {"torch": "1.0"}}))
    file.rename(file.with_name("earlier.json"))
    draw(pipe, geneval, tmp_path, rank=0, num_ranks=2)
    assert len(read_software(tmp_path)) == 1
    draw(pipe, geneval, tmp_path)
    assert sorted(record["versions"]["torch"] for record in read_software(tmp_path)) == ["1.0", version]


def test_a_failed_write_leaves_nothing_half(pipe, geneval, tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        draw(pipe, geneval, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_dpg_is_one_grid_a_prompt_row_by_row(pipe, tmp_path):
    benchmark = load_benchmark("dpg", limit=2)
    draw(pipe, benchmark, tmp_path, batch_size=3)  # a grid of four is more than a batch
    assert set(files_of(tmp_path)) == {drawing.path for drawing in benchmark.drawings} == {"0.png", "localized20.png"}
    sheet = Image.open(tmp_path / "pictures/0.png")
    assert sheet.size == (128, 128)
    generators = [torch.Generator().manual_seed(seed) for seed in benchmark.drawings[0].seeds]
    alone = pipe([benchmark.drawings[0].prompt] * 4, generator=generators, **STEPS).images
    for number, box in enumerate([(0, 0, 64, 64), (64, 0, 128, 64), (0, 64, 64, 128), (64, 64, 128, 128)]):
        difference = torch.tensor(list(sheet.crop(box).tobytes())) - torch.tensor(list(alone[number].tobytes()))
        assert difference.abs().max() <= 1  # another batch rounds otherwise
    note = read_note(tmp_path / "pictures/0.png")
    assert note["prompt"] == benchmark.drawings[0].prompt and note["seeds"] == list(benchmark.drawings[0].seeds)


def test_grids_are_of_one_size():
    with pytest.raises(ValueError, match="of one size"):
        grid([Image.new("RGB", (8, 8))] * 3 + [Image.new("RGB", (8, 9))])


def test_batches_fill_up_without_parting_a_grid():
    singles, grids = load_benchmark("geneval").drawings[:5], load_benchmark("dpg").drawings[:3]
    assert [len(batch) for batch in in_batches(singles, 2)] == [2, 2, 1]
    assert [len(batch) for batch in in_batches(grids, 8)] == [2, 1]
    assert [len(batch) for batch in in_batches(grids, 2)] == [1, 1, 1]


class PlainPipeline(DiffusionPipeline):
    """Another library's pipeline: no guidance scale of ours, an argument of its own, a filter."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __call__(
        self,
        prompt,
        num_inference_steps=7,
        true_cfg_scale=4.0,
        height=None,
        instruction=("Draw", "well."),
        generator=None,
        dtype=torch.float32,
    ):
        self.calls.append((prompt, num_inference_steps, true_cfg_scale))
        noise = [torch.rand(3, generator=own) for own in generator]
        images = [Image.new("RGB", (16, 16), tuple((own * 255).int().tolist())) for own in noise]
        output = ImagePipelineOutput(images=images)
        output["nsfw_content_detected"] = [text.endswith("cow") for text in prompt]
        return output


class Sociable(DiffusionPipeline):
    """Each of its pictures has a colour that comes of all prompts that were drawn with it."""

    def __call__(self, prompt, generator=None):
        color = tuple(hashlib.sha256("".join(prompt).encode()).digest()[:3])
        return ImagePipelineOutput(images=[Image.new("RGB", (8, 8), color) for _ in prompt])


def test_any_pipeline_is_called_by_its_own_signature(tmp_path):
    pipeline, benchmark = PlainPipeline(), load_benchmark("geneval", limit=553)
    benchmark = type(benchmark)(**{**vars(benchmark), "drawings": benchmark.drawings[:8]})
    generate(
        pipeline, benchmark, tmp_path, about={}, asked={"true_cfg_scale": 2.5, "guidance_scale": None}, batch_size=8
    )
    assert pipeline.calls == [(["a photo of a bench"] * 4 + ["a photo of a cow"] * 4, 7, 2.5)]
    settings = json.loads((tmp_path / "generation.json").read_text())
    assert settings["arguments"] == {"num_inference_steps": 7, "true_cfg_scale": 2.5}  # the default is told too
    # What it was not called with as well, as far as JSON can hold it.
    assert settings["defaults"] == {"height": None, "instruction": ["Draw", "well."]}
    assert read_note(tmp_path / "pictures/00001/samples/0000.png")["filtered"] == 1
    with pytest.raises(
        ValueError, match="PlainPipeline has no argument guidance_scale. It has: dtype, generator, height"
    ):
        generate(pipeline, benchmark, tmp_path / "other", about={}, asked={"guidance_scale": 3.0})
    assert not (tmp_path / "other").exists()


def test_a_pipeline_that_cannot_edit_or_draws_too_few_says_so(tmp_path):
    pipeline, benchmark = PlainPipeline(), load_benchmark("geneval", limit=1)
    edits = type(benchmark.drawings[0])(0, "1", "1.png", "make it red", (0,), source="a.jpg")
    with pytest.raises(ValueError, match="PlainPipeline takes no image"):
        generate(pipeline, type(benchmark)(**{**vars(benchmark), "drawings": [edits]}), tmp_path, about={})

    class Short(PlainPipeline):
        def __call__(self, prompt, generator=None):
            return ImagePipelineOutput(images=[Image.new("RGB", (8, 8))])

    with pytest.raises(ValueError, match="answered 4 prompts with 1 of Image"):
        generate(Short(), benchmark, tmp_path / "short", about={})


def test_rewritten_prompts_are_drawn_and_told(pipe, tmp_path):
    file = tmp_path / "rewritten.jsonl"
    items = load_benchmark("geneval").metadata
    rows = [
        {"item": item, "prompt": row["prompt"] + (", large" if i else "")}
        for i, (item, row) in enumerate(items.items())
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    benchmark = load_benchmark("geneval", rewritten=file, limit=3)
    assert benchmark.drawings[3].prompt == "a photo of a bench" and benchmark.drawings[4].prompt.endswith(", large")
    told = {"file": "rewritten.jsonl", "sha256": sha256(file), "prompts_changed": 552}
    assert benchmark.rewriting == benchmark.describe()["rewriting"] == told
    file.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(ValueError, match="1 are missing"):
        load_benchmark("geneval", rewritten=file)


def test_a_folder_of_the_official_generator_is_read(geneval, tmp_path):
    """It names samples with five digits, adds a grid, and writes no note."""
    for item, metadata in geneval.metadata.items():
        (tmp_path / item / "samples").mkdir(parents=True)
        (tmp_path / item / "metadata.jsonl").write_text(json.dumps(metadata))
        Image.new("RGB", (8, 8)).save(tmp_path / item / "grid.png")
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / item / f"samples/{number:05}.png")
    found = find_pictures(geneval, tmp_path)
    assert found["00276/samples/0003.png"] == tmp_path / "00276/samples/00003.png" and len(found) == 8
    assert read_note(found["00276/samples/0003.png"]) is None

    (tmp_path / "00276/samples/00003.png").unlink()
    with pytest.raises(Incomplete, match="1 of 8 pictures of geneval are missing"):
        find_pictures(geneval, tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "00000/samples/00004.png")
    with pytest.raises(Incomplete, match="holds 5 pictures"):
        find_pictures(geneval, tmp_path)
    own = geneval.metadata["00000"]
    for other in (geneval.metadata["00276"], own | {"prompt": "A weathered oak bench, 8k"}):
        (tmp_path / "00000/metadata.jsonl").write_text(json.dumps(other))
        with pytest.raises(Incomplete, match="other prompts, or in another order"):
            find_pictures(geneval, tmp_path)
    (tmp_path / "00000/metadata.jsonl").unlink()
    with pytest.raises(Incomplete, match="metadata.jsonl is missing, so nothing says what"):
        find_pictures(geneval, tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 65, "x\n", "C:"])
def test_no_item_leaves_the_folder(name):
    with pytest.raises(ValueError, match="An item is named"):
        check_item(name)
