"""What each benchmark asks for: the official files and names, seeds that follow from an item's place, and nothing that may not be shipped."""

import json

import pytest

from iomm_hf.evaluation.authors_files import REPOSITORIES
from iomm_hf.evaluation.benchmarks import NAMES, PROMPTS, load_benchmark
from iomm_hf.testing.authors_files import write_authors_files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The authors' files of each benchmark that does not come with the package."""
    return {name: write_authors_files(name, tmp_path_factory.mktemp(name)) for name in REPOSITORIES}


@pytest.mark.parametrize(
    ("name", "count", "each", "paths"),
    [
        ("geneval", 2212, 1, {"00000/samples/0000.png", "00000/samples/0003.png", "00552/samples/0003.png"}),
        ("dpg", 1065, 4, {"0.png", "localized20.png"}),
        ("wise", 1000, 1, {f"{number}.png" for number in range(1, 1001)}),
        ("wise-verified", 1000, 1, {f"{number}.png" for number in range(1, 1001)}),
        ("imgedit", 737, 1, {f"{key}.png" for key in range(1, 738)}),
        ("shapes", 1200, 1, {"00000.png", "01199.png"}),
    ],
)
def test_files_lie_where_the_authors_scorers_look(data, name, count, each, paths):
    drawings = load_benchmark(name, data=data.get(name)).drawings
    found = [drawing.path for drawing in drawings]
    assert len(found) == len(set(found)) == count and paths <= set(found)
    assert {len(drawing.seeds) for drawing in drawings} == {each}  # four pictures are one grid


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_a_seed_of_its_own_whatever_else_is_drawn(data, name):
    whole = load_benchmark(name, data=data.get(name))
    assert [drawing.number for drawing in whole.drawings] == list(range(len(whole.drawings)))
    seeds = [seed for drawing in whole.drawings for seed in drawing.seeds]
    assert len(set(seeds)) == len(seeds)
    few = load_benchmark(name, data=data.get(name), limit=7)
    assert len(few.metadata) == 7 and {drawing for drawing in few.drawings} <= set(whole.drawings)
    other = load_benchmark(name, data=data.get(name), seed=1)
    assert not set(seeds) & {seed for drawing in other.drawings for seed in drawing.seeds}


def test_no_prompts_are_shipped_that_have_no_licence_for_it():
    assert sorted(file.name for file in PROMPTS.iterdir()) == ["README.md", "dpg.jsonl", "geneval.jsonl"]
    assert {name for name in NAMES if name in REPOSITORIES} == {"dpg", "wise", "wise-verified", "imgedit"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wise", lambda rows: rows[:-1], "wise has items 1 to 1000, each once; 999 different ones were found"),
        ("wise-verified", lambda rows: [*rows[:-1], rows[0]], "999 different ones were found"),
        ("wise", lambda rows: [{"prompt_id": 1}, *rows[1:]], "holds an item without Prompt, Explanation"),
        ("imgedit", lambda rows: dict(list(rows.items())[1:]), "imgedit has 737 items, but 736 were found"),
        ("imgedit", lambda rows: rows | {"1": {"id": "a.jpg"}}, "item 1 has no prompt, edit_type"),
    ],
)
def test_a_part_of_the_authors_items_is_no_benchmark(tmp_path, name, change, message):
    folder = write_authors_files(name, tmp_path)
    file = folder / REPOSITORIES[name].prompts[0]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message):
        load_benchmark(name, data=folder)
