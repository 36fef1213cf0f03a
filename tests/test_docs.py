"""The documentation builds without a warning, and what it tells its reader to do works.

Fast: the pages are built (links and headings included), every command's flags go through the real parser and every YAML block
through the recipe's own settings, the blocks of the first pages and the README's Python run, and each quoted error message
occurs in the source. Slow: a reader goes through the guides from top to bottom, block after block in one folder,
against a Hub and a judge on this machine; and the figure is drawn again. Three comments steer that, each about the block below it:

    <!-- test: --max_steps 4 -->                     flags that are added to its commands, for a smoke size
    <!-- served: -->                                 the same for a server: its page is asked for, then Ctrl-C ends it
    <!-- checked, not run: it takes eight GPUs -->   only parsed, and why; of the pages these are what `ONLY_CHECKED` names

The tables of figures and the words around them are not tested here.
"""

import ast
import base64
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import cached_assets_path
from PIL import Image
from trl import TrlParser
from typer.testing import CliRunner

from iomm_hf.cli import app
from iomm_hf.evaluation.authors_files import REPOSITORIES
from iomm_hf.evaluation.geneval_models import CLIP, DETECTOR
from iomm_hf.testing.authors_files import write_authors_files
from iomm_hf.testing.judge_server import LocalJudge
from iomm_hf.testing.tiny_detectors import save_tiny_detectors


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = ["train", "fine-tune", "lora", "publish", "demo", "evaluate", "scale"]  # a reader's way through them
BLOCK = re.compile(
    r"(?:^<!-- (test|served|checked, not run):(.*?)-->\n)?^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
COMMAND = re.compile(r"^((?=.*(?:recipes/\w+\.py|iomm-hf |pip ))(?!#).*?)(\s+#.*)?$", re.MULTILINE)
ONLY_CHECKED = {  # first commands of the blocks that no test runs, and why
    "make quickstart": "seven minutes, and the tests themselves",
    "accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/pretrain_image_only.py --config"
    " recipes/configs/base-pretrain.yaml": "it takes eight GPUs, and full-size weights and data that lie on the Hub",
}


class Block(NamedTuple):
    page: str
    language: str
    code: str
    flags: str = ""  # added to its commands
    only_checked: str = ""  # why it is not run
    served: bool = False

    def commands(self) -> list[list[str]]:
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def smoke(self) -> str:
        return COMMAND.sub(lambda line: f"{line[1]} {self.flags}", self.code.replace("\\\n", " "))


def blocks(page: str, *languages: str) -> list[Block]:
    found = []
    for kind, note, language, code in BLOCK.findall((DOCS / f"{page}.md").read_text()):
        note = note.strip()
        flags, reason = ("", note) if kind == "checked, not run" else (note, "")
        if not languages or language in languages:
            found.append(Block(page, language, code, flags, reason, kind == "served"))
    return found


README = "../README"
PAGES = sorted(str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md"))
BASH = [
    pytest.param(block, id=f"{page}-{i}") for page in [*PAGES, README] for i, block in enumerate(blocks(page, "bash"))
]


def test_pages_build_without_a_warning(tmp_path):
    # As `make docs` does, in a process of its own: autodoc replaces default values of the functions that it shows.
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*build, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "html/reference/pipeline.html").read_text()
    assert "num_inference_steps" in page and "Strength of guidance" in page  # from the docstring
    assert "Learned queries; 0: none" in (tmp_path / "html/reference/settings.html").read_text()
    for path in (tmp_path / "html/reference").glob("*.html"):
        words = re.sub(r"<(pre|script)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        assert "`" not in words, path.name  # Markdown that reached the page as it was


@pytest.mark.parametrize("page", [*PAGES, README])
def test_every_block_is_of_a_kind_that_is_tested(page):
    indented = re.findall(r"^(?: +```|~~~).*", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    assert indented == [], "no test would find them"
    for block in blocks(page):
        if block.language.startswith("{"):  # a directive: the build runs it
            continue
        if page == "troubleshooting":
            assert block.language == "text"
            continue
        if page == README and block.language in ("", "bibtex"):  # drawings, outputs
            continue
        assert page in ("index", "how-it-works", README, *GUIDES) and block.language in ("python", "bash", "yaml")
        if block.language == "yaml":
            assert re.match(r"# [\w-]+\.yaml\n", block.code), "its first line names the file"


def test_blocks_that_are_only_checked_are_few_and_named():
    checked = [block for page in PAGES for block in blocks(page) if block.only_checked]
    assert {shlex.join(block.commands()[0]): block.only_checked for block in checked} == ONLY_CHECKED


def test_the_listing_names_every_module_and_folder_of_the_package():
    (listing,) = (block.code for block in blocks(README, "") if block.code.startswith("src/iomm_hf/"))
    named = set(re.findall(r"[\w.]+(?:\.py|/)", listing.partition("spaces_demo/")[0]))
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "src/iomm_hf").iterdir()}
    assert {name for name in there if not name.startswith("__")} == named - {"src/", "iomm_hf/"}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:recipes|results|docs|tests|benchmarks)/[\w./*-]+)`", (DOCS / f"{page}.md").read_text())
    for name in named:
        assert list(ROOT.glob(name)), f"{page} names {name}"


# No network here, so no link is opened: a wrong host or form of address is what can be seen.
ADDRESSES = {
    "arxiv.org": r"/abs/\d{4}\.\d{5}",
    "github.com": r"/[\w-]+/[\w.-]+(/(blob|tree|commit)/[0-9a-f]{40}(/[\w.-]+)*)?",
    "huggingface.co": r"(/datasets|/spaces)?/[\w-]+/[\w.-]+(/(blob|tree|commit)/[0-9a-f]{40}(/[\w.-]+)*)?",
}
TEXTS = [
    *ROOT.glob("*.md"),
    *(p for name in ("benchmarks", "docs", "results", "src") for p in (ROOT / name).rglob("*.md")),
]


@pytest.mark.parametrize(
    "path", [*TEXTS, ROOT / "src/iomm_hf/demo/app.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_to_files_that_exist_and_to_known_hosts(path):
    text = path.read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]*)\)", text) if "{{" not in target]
    addresses = [target for target in targets if "://" in target] + re.findall(r"\b\w+://[^\s)\]>\"'`|{}]+", text)
    for address in addresses:
        parts = urlsplit(address.rstrip(".,;"))
        if parts.hostname == "127.0.0.1" or parts.scheme in ("hf", "file"):
            continue
        assert parts.scheme == "https" and parts.netloc in ADDRESSES, address
        assert re.fullmatch(ADDRESSES[parts.netloc], parts.path), address
    for target in targets:
        file = target.split("#")[0]
        assert "://" in target or (path.resolve().parent / file).exists(), f"{path} links to {target}"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as the repository's is to a reader, with the YAML files that the pages show."""
    lay_out(tmp_path)
    for page in GUIDES:
        for block in blocks(page, "yaml"):
            write_yaml(block, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay_out(folder: Path):
    for name in ("recipes", "results", "Makefile", "constraints.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)


def write_yaml(block: Block, folder: Path):
    (folder / block.code.splitlines()[0].removeprefix("# ")).write_text(block.code)


def check_recipe(words: list[str]):
    script, *flags = words
    assert script.startswith("recipes/")
    main = runpy.run_path(script, run_name="recipe")["main"]
    hints = typing.get_type_hints(main)
    hints.pop("return", None)
    TrlParser(list(hints.values())).parse_args_and_config(flags)


def check_command_line(words: list[str]):
    commands = typing.cast(typing.Any, typer.main.get_command(app)).commands
    commands[words[0]].make_context(words[0], words[1:])


def check_command(words: list[str]):
    """Whether the program that it calls understands it."""
    program, *rest = words
    if program == "accelerate":
        assert rest[0] == "launch"
        parsed = launch_command_parser().parse_args(rest[1:])
        assert parsed.config_file is None or Path(parsed.config_file).is_file()
        if parsed.module:
            assert parsed.training_script == "iomm_hf"
            check_command_line(parsed.training_script_args)
        else:
            check_recipe([parsed.training_script, *parsed.training_script_args])
    elif program == "python":
        check_recipe(rest)
    elif program == "iomm-hf":
        check_command_line(rest)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *rest], check=True, capture_output=True)
    elif program == "pip":
        assert rest[:2] == ["install", "-e"]  # with flags of the test behind what is installed
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", rest[2])) <= set(extras)
    else:
        assert program == "export" and all("=" in word for word in rest), f"no test knows what {program} is"


@pytest.mark.parametrize("block", BASH)
def test_commands_are_understood_by_what_they_call(block, desk):
    for shown in blocks(block.page, "yaml"):  # pages show files of the same name
        write_yaml(shown, desk)
    for words in block._replace(code=block.smoke()).commands():
        check_command(words)


def test_every_command_is_in_the_reference():
    commands = typing.cast(typing.Any, typer.main.get_command(app)).commands
    described = re.findall(r"^```{command} (.+)$", (DOCS / "reference/commands.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(commands)


def install(words: list[str], copy: Path):
    """In a copy of the repository, since a build writes beside the sources."""
    if not copy.exists():
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            copy.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    done = subprocess.run([sys.executable, "-m", "pip", *words], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install iomm-hf" in done.stdout, done.stderr


@pytest.mark.parametrize("page", ["index", "how-it-works"])
def test_blocks_of_the_first_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(page, "python", "bash"):
        if block.language == "python":
            exec(compile(block.code, f"{page}.md", "exec"), namespace)
        elif not block.only_checked:
            for words in block._replace(code=block.smoke()).commands():
                if words[0] == "pip":
                    install(words[1:], tmp_path / "copy")
                    continue
                assert words[0] == "iomm-hf"
                done = CliRunner().invoke(app, words[1:])
                assert done.exit_code == 0, done.output
    if page == "index":
        picture = np.asarray(Image.open("picture.png").resize((4, 4), Image.Resampling.BOX), dtype=float)
        assert (picture[..., 0] - picture[..., 1:].mean(-1)).max() > 30  # a red circle was asked for
    else:
        assert np.asarray(namespace["picture"]).std() > 5  # something was drawn


def test_python_of_the_readme_runs_from_block_to_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    checked = 0
    for block in blocks(README, "python"):
        code = compile(block.code, "README.md", "exec")
        if block.only_checked:
            checked += 1
        else:
            exec(code, namespace)
    assert checked == 3 and type(namespace["pipe"].scheduler).__name__ == "UniPCMultistepScheduler"
    assert np.asarray(namespace["variation"]).std() > 5  # something was drawn


@pytest.mark.slow
def test_the_figure_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["method.py", "--output_dir", str(tmp_path)])
    runpy.run_path(str(DOCS / "figures/method.py"), run_name="__main__")
    embedded = re.compile(r'href="data:image/png;base64,([^"]+)"')
    for theme in ("light", "dark"):
        drawn, kept = ((folder / f"method-{theme}.svg").read_text() for folder in (tmp_path, DOCS / "figures"))
        assert embedded.sub("", drawn) == embedded.sub("", kept)
        for one, two in zip(embedded.findall(drawn), embedded.findall(kept), strict=True):
            pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=float) for data in (one, two)]
            assert np.abs(pixels[0] - pixels[1]).mean() < 4  # other machines round otherwise


def messages() -> set[str]:
    """What the package and the recipes raise, with … for what is filled in."""
    found = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(filled_in(part, constants) for part in node.values))
    return found


def filled_in(part: ast.expr, constants: dict[str, typing.Any]) -> str:
    if isinstance(part, ast.Constant):
        return part.value
    assert isinstance(part, ast.FormattedValue)
    return str(constants.get(part.value.id, "…")) if isinstance(part.value, ast.Name) else "…"


def test_quoted_messages_occur_in_the_source():
    raised = messages()
    quoted = [block.code.strip() for block in blocks("troubleshooting", "text")]
    assert len(quoted) >= 25 and len(set(quoted)) == len(quoted)
    assert [message for message in quoted if not any(message in template for template in raised)] == []
    assert min(len(message.replace("…", "")) for message in quoted) > 15  # enough to be found by


# Runs the blocks that it gets on stdin, one namespace for all of Python, and stops at the first that fails.
READER = """
import json, re, shlex, signal, subprocess, sys, urllib.request
namespace = {}
for place, language, code in json.load(sys.stdin):
    print(place, flush=True)
    if language == "python":
        exec(compile(code, place, "exec"), namespace)
    elif language == "served":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        server = subprocess.Popen(shlex.split(code), stdout=subprocess.PIPE, text=True)
        try:
            address = re.search(r"http://[^/]+/", server.stdout.readline())[0]
            assert urllib.request.urlopen(address).status == 200
            server.send_signal(signal.SIGINT)
            assert server.wait() == 0
        finally:
            server.kill()
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
"""


@pytest.fixture
def judge():
    """Answers under the guides' placeholder for a model, as WISE's authors want it."""
    with LocalJudge(lambda request: "Consistency: 2\nRealism: 1\nAesthetic Quality: 0", model="MODEL") as judge:
        yield judge


@pytest.fixture
def environment(tmp_path, hub) -> dict[str, str]:
    """A reader's: a Hub with GenEval's models under their names, the authors' files as if fetched before, no accelerator."""
    for name, folder in zip((DETECTOR, CLIP), save_tiny_detectors(tmp_path / "detectors"), strict=True):
        hub.commit_files(name, {file.name: file.read_bytes() for file in folder.iterdir()})
    assets = tmp_path / "home/assets"
    write_authors_files("wise", cached_assets_path("iomm-hf", "wise", REPOSITORIES["wise"].commit, assets_dir=assets))
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment = hub.environment(tmp_path / "home") | settings
    return environment | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])}


def read_page(page: str, folder: Path, environment: dict[str, str], judge: LocalJudge):
    """Does what a page says, in a process of its own."""
    steps = []
    for number, block in enumerate(blocks(page, "python", "bash", "yaml")):
        code = block.smoke().replace("http://127.0.0.1:8000/v1", judge.address)
        if block.language == "yaml":
            write_yaml(block, folder)
        elif not block.only_checked:
            steps.append((f"{page}.md, block {number}", "served" if block.served else block.language, code))
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(steps),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_a_reader_goes_through_the_guides(tmp_path, hub, judge, environment):
    lay_out(tmp_path)
    for page in GUIDES:
        read_page(page, tmp_path, environment, judge)
    assert (tmp_path / "outputs/mine/stage2/final/model_index.json").is_file()
    assert "model_index.json" in hub.resolve("user/name").files
    assert len(list((tmp_path / "outputs/mine").glob("*/scores/*/result.json"))) == 2 and judge.requests
