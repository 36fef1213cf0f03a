"""Files in the form of a benchmark's authors, with items of our own: theirs are not ours to hand out."""

import json
from pathlib import Path

from ..evaluation.authors_files import REPOSITORIES


WORDING = """
def build(prompt_data, image):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You judge {strictly}."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f'''Of "{prompt_data["Prompt"]}" ({prompt_data['Explanation']}).'''},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]},
    ]
"""


def write_wise(folder: str | Path, name: str):
    r"""
    Writes 1,000 prompts and the judge's task as WISE's authors do.

    Args:
        folder (`str` or `Path`): Where to; `data` of [`~iomm_hf.evaluation.benchmarks.load_benchmark`].
        name (`str`): "wise" or "wise-verified".

    Raises:
        `KeyError`: there is no such benchmark.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from iomm_hf.evaluation.benchmarks import load_benchmark
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_wise(folder, "wise")
    >>> load_benchmark("wise", data=folder).drawings[0].prompt
    'thing 1'
    ```
    """
    origin = REPOSITORIES[name]
    per_file = (range(1, 401), range(401, 701), range(701, 1001))
    for file, ids in zip(origin.prompts, per_file, strict=True):
        Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt_id": i, "Prompt": f"thing {i}", "Explanation": f"it is {i}", "Subcategory": "x"} for i in ids]
        Path(folder, file).write_text(json.dumps(rows))
    Path(folder, origin.wording).write_text(WORDING)
