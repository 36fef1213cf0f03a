"""Files that come from their authors: fetched once, named by commit and hash, and whole whoever else fetches them."""

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading

import pytest

from iomm_hf.evaluation import authors_files
from iomm_hf.evaluation.authors_files import WISE_COMMIT, BenchmarkData


FETCH = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from iomm_hf.evaluation.authors_files import BenchmarkData

def fetch(number):
    data = BenchmarkData("imgedit")
    data.picture(f"animal/{number}.jpg")
    return data.describe()["pictures"]

with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
    told = list(pool.map(fetch, (39, 0, 38, 1)))
data = BenchmarkData("imgedit")
told.append([refusal(data.picture, "animal/40.jpg"), refusal(data.picture, "../40.jpg")])
folder = data.folder / "pictures"
told.append(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
Path(sys.argv[1]).write_text(json.dumps(told))
"""


def test_ranks_unpack_the_source_pictures_at_once_and_say_which_they_are(hub, client, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(40):
            content = bytes([number]) * 50_000
            for name in (f"Benchmark/singleturn/animal/{number}.jpg", f"Benchmark/multiturn/{number}.jpg"):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    commit = hub.commit_files("sysuyy/ImgEdit", {"Benchmark.tar": buffer.getvalue()}, repo_type="dataset")
    client(hub.environment(tmp_path / "home"), FETCH, str(tmp_path / "told.json"))
    *ranks, refusals, files = json.loads((tmp_path / "told.json").read_text())
    for number, told in zip((39, 0, 38, 1), ranks, strict=True):
        sha256 = hashlib.sha256(bytes([number]) * 50_000).hexdigest()
        expected = {"repository": "sysuyy/ImgEdit", "commit": commit, "sha256": {f"animal/{number}.jpg": sha256}}
        assert told == expected
    assert refusals[0].startswith(
        "OSError: Benchmark.tar of sysuyy/ImgEdit holds no Benchmark/singleturn/animal/40.jpg"
    )
    assert refusals[1].startswith("ValueError") and "leads out of its folder" in refusals[1]
    assert files == sorted(f"animal/{number}.jpg" for number in range(40))  # nothing half, and nothing else


@pytest.fixture
def github(tmp_path, monkeypatch):
    """A server in place of GitHub's, whose folder this is; fetched files go to a folder of the test's own."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    asked: list[str] = []
    (tmp_path / "github").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "github"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(authors_files, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(authors_files, "cached_assets_path", lambda *names: tmp_path.joinpath("assets", *names))
    yield tmp_path / "github", asked
    server.shutdown()


def test_files_are_fetched_once_at_their_commit(github):
    served, asked = github
    file = served / "PKU-YuanGroup/WISE" / WISE_COMMIT / "gpt_eval.py"
    file.parent.mkdir(parents=True)
    file.write_text("wording")
    for _ in range(2):
        data = BenchmarkData("wise")
        assert data.wording.read_text() == "wording"
    assert len(set(asked)) == 1 and data.describe()["sha256"] == {
        "gpt_eval.py": hashlib.sha256(b"wording").hexdigest()
    }
    with pytest.raises(OSError, match="could not be fetched: .*404.*Fetch it by hand and give its folder with --data"):
        data.path("data/natural_science.json")
    assert not (data.folder / "data/natural_science.json").exists()
