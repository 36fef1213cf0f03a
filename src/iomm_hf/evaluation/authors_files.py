"""Benchmark files that only their authors may hand out: fetched from them once, and hashed.

Files on GitHub are fetched at pinned commits. ImgEdit-Bench's archive of source pictures, on the Hub, is not pinned,
for nobody here has read any commit of it: the newest is fetched, and its commit is recorded beside the pictures and
in results. What could be read of them is said beside each commit; what could not is marked unverified. A folder of
one's own (`--data`) takes their place, offline or when an address has moved; files lie in it under their paths in the
authors' repository.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import cached_assets_path, hf_hub_download

from ..files import write_whole
from ..integrity import sha256


# dpg_bench/compute_dpg_bench.py was read at this commit and names dpg_bench/dpg_bench.csv; the file itself: unverified.
DPG_COMMIT = "025f650e9b36b9603d606042635d98da09e870de"
# README.md was read at this commit and names data/*.json and gpt_eval.py; gpt_eval.py was read at two others. The
# prompt files themselves: unverified.
WISE_COMMIT = "0382b252d7f65bd18aba94a7e1af326c340e8327"
# eval_qwen.sh was read at this commit and names data_verified/*.json and vllm_eval.py; these themselves: unverified.
WISE_VERIFIED_COMMIT = "d6bfe425fdd6ce98031e35b02bf967db487033a9"
# Benchmark/Basic/basic_edit.json was read at this commit; prompts.json beside it: unverified.
IMGEDIT_COMMIT = "c14480ac5e7b622e08cd8c46f96624a48eb9ab46"
# Benchmark.tar with Benchmark/singleturn/<id> is what users of this data set name; the archive itself: unverified, so no
# commit of it is pinned.
IMGEDIT_PICTURES = ("sysuyy/ImgEdit", "Benchmark.tar", "Benchmark/singleturn")
PICTURES_COMMIT = "pictures-commit"  # file that names the data set's commit, beside the pictures' folder

GITHUB = "https://raw.githubusercontent.com"

WISE_FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")


@dataclass(frozen=True)
class AuthorsRepository:
    """Where a benchmark's files are: repository on GitHub, commit, prompts, and the file that words the judge's task."""

    repository: str
    commit: str
    prompts: tuple[str, ...]
    wording: str


REPOSITORIES = {
    "dpg": AuthorsRepository("TencentQQGYLab/ELLA", DPG_COMMIT, (), "dpg_bench/dpg_bench.csv"),
    "wise": AuthorsRepository(
        "PKU-YuanGroup/WISE", WISE_COMMIT, tuple(f"data/{name}.json" for name in WISE_FILES), "gpt_eval.py"
    ),
    "wise-verified": AuthorsRepository(
        "PKU-YuanGroup/WISE",
        WISE_VERIFIED_COMMIT,
        tuple(f"data_verified/{name}_verified.json" for name in WISE_FILES),
        "vllm_eval.py",
    ),
    "imgedit": AuthorsRepository(
        "PKU-YuanGroup/ImgEdit", IMGEDIT_COMMIT, ("Benchmark/Basic/basic_edit.json",), "Benchmark/Basic/prompts.json"
    ),
}


class BenchmarkData:
    """
    The authors' files of one benchmark, in a folder of one's own or fetched when they are first asked for.

    Args:
        benchmark (`str`): One of `REPOSITORIES`.
        folder (`Path`, *optional*): Where they lie already. Without it they go to huggingface_hub's folder for assets.

    Example:

    ```python
    >>> BenchmarkData("wise").prompt_files[0]
    'data/cultural_common_sense.json'
    ```
    """

    def __init__(self, benchmark: str, folder: Path | None = None):
        self.origin = REPOSITORIES[benchmark]
        self.given = folder is not None
        self.folder = folder or cached_assets_path("iomm-hf", benchmark, self.origin.commit)
        self.hashes: dict[str, str] = {}
        self.picture_hashes: dict[str, str] = {}

    @property
    def prompt_files(self) -> tuple[str, ...]:
        return self.origin.prompts

    def path(self, file: str) -> Path:
        """
        A file of the authors' repository, fetched if need be.

        Raises:
            OSError: If a given folder does not hold it, or it cannot be fetched.
        """
        target = self.folder / file
        if not target.is_file():
            if self.given:
                raise OSError(
                    f"{self.folder} holds no {file}, which {self.origin.repository} has at {self.origin.commit}."
                )
            url = f"{GITHUB}/{self.origin.repository}/{self.origin.commit}/{file}"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(target), progress=False)  # appears whole or not at all
            except OSError as error:
                raise OSError(
                    f"{url} could not be fetched: {error}. Fetch it by hand and give its folder with --data, laid out as the"
                    " authors' repository."
                ) from error
        self.hashes[file] = sha256(target)
        return target

    @property
    def wording(self) -> Path:
        """The file that words what the judge is asked."""
        return self.path(self.origin.wording)

    @property
    def pictures(self) -> Path:
        """The folder of ImgEdit-Bench's source pictures."""
        return self.folder / "pictures"

    def picture(self, name: str) -> Path:
        """
        A source picture of ImgEdit-Bench. The newest archive is fetched once, all pictures are taken out of it, and
        the data set's commit is written down beside them.

        Raises:
            OSError: If it is neither in the folder nor in the archive.
            ValueError: If its name leads elsewhere.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name or not relative.parts:
            raise ValueError(f"A source picture is named {name!r}, which leads out of its folder.")
        target = self.pictures / relative
        if not target.is_file():
            if self.given:
                raise OSError(f"{self.folder} holds no pictures/{name}.")
            self.unpack_pictures()
            if not target.is_file():
                repository, archive, inner = IMGEDIT_PICTURES
                raise OSError(f"{archive} of {repository} holds no {inner}/{name}.")
        self.picture_hashes[name] = sha256(target)
        return target

    def unpack_pictures(self):
        """All source pictures out of their archive, each whole or not at all, also where several ranks unpack at once."""
        repository, archive, inner = IMGEDIT_PICTURES
        downloaded = Path(hf_hub_download(repository, archive, repo_type="dataset"))
        # The Hub's cache names snapshots by their commit.
        write_whole(self.folder / PICTURES_COMMIT, downloaded.parent.name.encode())
        with tarfile.open(downloaded) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or ".." in path.parts or not path.is_relative_to(inner):
                    continue
                content = tar.extractfile(member)
                assert content is not None
                write_whole(self.pictures / path.relative_to(inner), content.read())

    def describe(self) -> dict[str, Any]:
        """Repository, commit and the hashes of the files that were used; the same of source pictures, `None` where none were."""
        told = {"repository": self.origin.repository, "commit": self.origin.commit, "sha256": dict(self.hashes)}
        if not self.picture_hashes:
            return told | {"pictures": None}
        commit = self.folder / PICTURES_COMMIT
        pictures = {
            "repository": None if self.given else IMGEDIT_PICTURES[0],
            "commit": commit.read_text() if commit.is_file() else None,
            "sha256": dict(sorted(self.picture_hashes.items())),
        }
        return told | {"pictures": pictures}
