"""Files in the form of a benchmark's authors, with items of our own: theirs are not ours to hand out."""

import json
from pathlib import Path

from PIL import Image

from ..evaluation.authors_files import REPOSITORIES
from ..evaluation.benchmarks import PROMPTS, read_lines


WISE_WORDING = """
def build(prompt_data, image):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You judge {strictly}."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f'''Of "{prompt_data["Prompt"]}" ({prompt_data['Explanation']}).'''},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]},
    ]
"""
DPG_COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def write_authors_files(name: str, folder: str | Path) -> Path:
    r"""
    Writes a whole benchmark's files: WISE's 1,000 prompts and the judge's task, ImgEdit-Bench's 737 instructions to one green
    picture, or DPG-Bench's questions, two for each of its prompts.

    Args:
        name (`str`): "dpg", "wise", "wise-verified" or "imgedit".
        folder (`str` or `Path`): Where to; `data` of [`~iomm_hf.evaluation.benchmarks.load_benchmark`].

    Returns:
        `Path` of the folder.

    Raises:
        `KeyError`: there is no such benchmark.

    Example:

    ```python
    >>> import tempfile
    >>> from iomm_hf.evaluation.benchmarks import load_benchmark
    >>> folder = write_authors_files("wise", tempfile.mkdtemp())
    >>> load_benchmark("wise", data=folder).drawings[0].prompt
    'thing 1'
    ```
    """
    origin, folder = REPOSITORIES[name], Path(folder)
    for file in (*origin.prompts, origin.wording):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if name == "dpg":
        items = [row["item_id"] for row in read_lines(PROMPTS / "dpg.jsonl")]
        rows = [f"{item},x,,1,0,e,w,t,Is it red?\n{item},x,,2,1,e,w,t,Is it there?" for item in items]
        (folder / origin.wording).write_text("\n".join([DPG_COLUMNS, *rows]))
    elif name == "imgedit":
        (folder / "pictures/animal").mkdir(parents=True)
        Image.new("RGB", (64, 64), "green").save(folder / "pictures/animal/1.jpg")
        edits = {
            str(i): {"id": "animal/1.jpg", "prompt": f"edit {i}", "edit_type": "add" if i % 2 else "style"}
            for i in range(1, 738)
        }
        (folder / origin.prompts[0]).write_text(json.dumps(edits))
        wording = {"add": "Add <edit_prompt>!", "style": "Style <edit_prompt>!"}
        (folder / origin.wording).write_text(json.dumps(wording))
    else:  # both forms of WISE
        per_file = (range(1, 401), range(401, 701), range(701, 1001))
        for file, ids in zip(origin.prompts, per_file, strict=True):
            prompts = [
                {"prompt_id": i, "Prompt": f"thing {i}", "Explanation": f"it is {i}", "Subcategory": "x"} for i in ids
            ]
            (folder / file).write_text(json.dumps(prompts))
        (folder / origin.wording).write_text(WISE_WORDING)
    return folder
