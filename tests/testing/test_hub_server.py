"""The local Hub is tested with the real clients. They read HF_* variables at import, so each runs in a child process."""

import hashlib
import io
import json
import random
import socket
import subprocess
import sys
import tarfile
import textwrap

import pytest
from PIL import Image

from iomm_hf.testing.hub_server import HubError, LocalHub


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


def run_client(hub, script, **environment):
    """Runs a script, which puts its findings into `report`, in a new process whose Hub is `hub`."""
    script = f"report = {{}}\n{textwrap.dedent(script)}\nimport json; print(json.dumps(report))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, env=hub.environment() | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def fetch(hub, path, method="GET", body=b"", **headers):
    """One raw request, since HTTP libraries tidy paths before they send them."""
    lines = [f"{method} {path} HTTP/1.1", "Host: hub", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        head, _, content = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in rest), content


def test_upload_and_download_round_trip(hub, tmp_path):
    folder = tmp_path / "model"
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Model\n",
        "config.json": b'{"width": 2}',
        "unet/weights.safetensors": b"\x02\0\0\0\0\0\0\0{}" + bytes(range(256)) * 4000,
        "unet/empty.txt": b"",
        "samples/画 1.txt": b"text",
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    report = run_client(
        hub,
        f"""
        from pathlib import Path
        from huggingface_hub import HfApi, snapshot_download
        api = HfApi()
        folder = Path({str(folder)!r})
        report["user"] = api.whoami()["name"]
        report["exists before"] = api.repo_exists("user/model")
        report["url"] = str(api.create_repo("model"))
        api.create_repo("user/model", exist_ok=True)
        report["first"] = api.upload_folder(repo_id="user/model", folder_path=folder).oid
        report["again"] = api.upload_folder(repo_id="user/model", folder_path=folder).oid
        api.create_tag("user/model", tag="v1")
        api.create_branch("user/model", branch="trial/a")
        api.upload_file(path_or_fileobj=b"{{}}", path_in_repo="config.json", repo_id="user/model", revision="trial/a")
        api.delete_file("unet/weights.safetensors", "user/model")

        def snapshot(revision):
            folder = Path(snapshot_download("user/model", revision=revision))
            return {{str(p.relative_to(folder)): p.read_bytes().hex() for p in folder.rglob("*") if p.is_file()}}

        report["snapshots"] = {{revision: snapshot(revision) for revision in ["main", "v1", "trial/a", report["first"]]}}
        info = api.model_info("user/model", revision="v1", files_metadata=True)
        report["sha"] = info.sha
        report["lfs"] = {{file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}}
        report["sizes"] = {{file.rfilename: file.size for file in info.siblings}}
        report["tree"] = [entry.path for entry in api.list_repo_tree("user/model", revision="v1")]
        report["subtree"] = [entry.path for entry in api.list_repo_tree("user/model", "unet", revision="v1")]
        report["paths"] = [type(entry).__name__ for entry in api.get_paths_info("user/model", ["unet", "config.json", "none"])]
        report["refs"] = [ref.name for ref in api.list_repo_refs("user/model").branches]
        report["titles"] = [commit.title for commit in api.list_repo_commits("user/model")]
        report["file exists"] = [api.file_exists("user/model", name) for name in ("config.json", "none.json")]
        """,
    )
    assert report["user"] == "user"
    assert report["exists before"] is False
    assert report["url"] == f"{hub.endpoint}/user/model"
    assert report["first"] == report["again"] == report["sha"]

    for revision in ("v1", report["first"]):
        snapshot = report["snapshots"][revision]
        snapshot.pop(".gitattributes")
        assert {path: bytes.fromhex(content) for path, content in snapshot.items()} == files
    assert "unet/weights.safetensors" not in report["snapshots"]["main"]
    assert report["snapshots"]["trial/a"]["config.json"] == b"{}".hex()
    assert hub.read("user/model", "config.json") == files["config.json"]
    assert hub.read("user/model", "config.json", "trial/a") == b"{}"

    assert list(report["lfs"]) == ["unet/weights.safetensors"]
    assert {path: report["sizes"][path] for path in files} == {path: len(content) for path, content in files.items()}
    assert report["tree"] == [".gitattributes", "README.md", "config.json", "samples", "unet"]
    assert report["subtree"] == ["unet/empty.txt", "unet/weights.safetensors"]
    assert report["paths"] == ["RepoFolder", "RepoFile"]
    assert report["refs"] == ["main", "trial/a"]
    assert len(report["titles"]) == 3 and report["titles"][-1] == "initial commit"
    assert report["file exists"] == [True, False]
    assert [path for method, path in hub.requests if method == "PUT"] == [
        f"/lfs/{report['lfs']['unet/weights.safetensors']}"
    ]


def test_errors_are_those_of_the_hub_and_the_cache_serves_offline(hub):
    hub.commit_files("user/model", {"config.json": b"{}", "weights.bin": b"\0" * 5000})
    script = """
        import os
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        api = HfApi()

        def outcome(call, *arguments, **options):
            try:
                return call(*arguments, **options) and "no error"
            except Exception as error:
                return type(error).__name__

        report["repo"] = outcome(api.model_info, "user/none")
        report["download, repo"] = outcome(hf_hub_download, "user/none", "config.json")
        report["revision"] = outcome(hf_hub_download, "user/model", "config.json", revision="none")
        report["entry"] = outcome(hf_hub_download, "user/model", "none.json")
        report["folder"] = outcome(lambda: list(api.list_repo_tree("user/model", "none")))
        report["type"] = outcome(api.dataset_info, "user/model")
        report["exists"] = outcome(api.create_repo, "user/model")
        report["token"] = outcome(api.model_info, "user/model", token="wrong")
        report["write"] = outcome(api.create_repo, "user/other", token=False)
        report["stale"] = outcome(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="user/model",
                                  parent_commit="0" * 40)
        report["download"] = outcome(hf_hub_download, "user/model", "config.json")
        report["snapshot"] = outcome(snapshot_download, "user/model")
        """
    report = run_client(hub, script)
    assert report == {
        "repo": "RepositoryNotFoundError",
        "download, repo": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "folder": "RemoteEntryNotFoundError",
        "type": "RepositoryNotFoundError",
        "exists": "HfHubHTTPError",
        "token": "HfHubHTTPError",
        "write": "HfHubHTTPError",
        "stale": "HfHubHTTPError",
        "download": "no error",
        "snapshot": "no error",
    }

    hub.requests.clear()
    report = run_client(hub, script, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert report["download"] == report["snapshot"] == "no error"
    assert report["repo"] == "OfflineModeIsEnabled"


def test_interrupted_download_resumes(hub):
    content = random.Random(0).randbytes(24 * 1024**2)  # clients keep what they got in whole blocks of 10 MB
    hub.commit_files("user/model", {"weights.bin": content, "note.txt": b"text"})
    hub.fail_next(path_contains="weights.bin", status=None)
    hub.fail_next(path_contains="note.txt", status=503)
    report = run_client(
        hub,
        """
        import hashlib
        from pathlib import Path
        from huggingface_hub import hf_hub_download
        report["sha256"] = hashlib.sha256(Path(hf_hub_download("user/model", "weights.bin")).read_bytes()).hexdigest()
        try:
            hf_hub_download("user/model", "note.txt")
        except Exception as error:
            report["error"] = str(error)
        report["note"] = Path(hf_hub_download("user/model", "note.txt")).read_text()
        """,
    )
    assert report["sha256"] == hashlib.sha256(content).hexdigest()
    fetched = [path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and path.startswith("/lfs/")]
    assert fetched == ["weights.bin", "weights.bin"]
    assert "503" in report["error"]
    assert report["note"] == "text"


@pytest.mark.parametrize("name", ["note.txt", "weights.bin"])
def test_range_requests(hub, name):
    content = bytes(range(256)) if name == "weights.bin" else b"0123456789" * 3
    commit = hub.commit_files("user/model", {name: content})
    path = f"/user/model/resolve/main/{name}"
    status, headers, _ = fetch(hub, path, "HEAD")
    assert headers["X-Repo-Commit"] == commit
    if name == "weights.bin":
        assert status == 302
        assert headers["X-Linked-Size"] == "256"
        assert headers["Location"].startswith("http://localhost:")
        path = "/" + headers["Location"].split("/", 3)[3]
        status, headers, _ = fetch(hub, path, "HEAD")
    assert (status, headers["Content-Length"]) == (200, str(len(content)))
    for value, expected in {"bytes=0-0": content[:1], "bytes=5-": content[5:], "bytes=-3": content[-3:]}.items():
        status, headers, body = fetch(hub, path, Range=value)
        assert (status, body) == (206, expected)
        assert headers["Content-Range"].endswith(f"/{len(content)}")
    assert fetch(hub, path, Range="bytes=2-9999")[2] == content[2:]
    assert fetch(hub, path, Range=f"bytes={len(content)}-")[0] == 416


def test_nothing_outside_the_repos_can_be_read_or_written(hub):
    hub.commit_files("user/model", {"config.json": b"{}"})
    secret = hub.root.parent / "secret.txt"
    secret.write_text("secret")
    for path in (
        "/user/model/resolve/main/../../../../secret.txt",
        "/user/model/resolve/main/%2e%2e%2f%2e%2e%2f%2e%2e%2fsecret.txt",
        f"/user/model/resolve/main/{secret}",
        "/user/model/resolve/..%2f..%2fsecret.txt/config.json",
        "/../../secret.txt",
        "/lfs/..%2f..%2fsecret.txt/x",
        "/api/models/../model/tree/main",
        "/api/models/..%2f..%2f/secret.txt/tree/main",
        "/api/models/user/model/tree/main/..%2f..%2f..%2f",
        "/api/models/user/model/tree/..%2f..%2f..%2frefs",
        "/user/model/resolve/none%0d%0aX-Injected:%201/画.txt",
    ):
        status, headers, body = fetch(hub, path)
        assert "X-Injected" not in headers
        assert status in (400, 404), path
        assert b'"secret"' not in body and body != b"secret"

    authorization = f"Bearer {hub.token}"
    address = "/api/models/user/model/commit/main"
    header = {"key": "header", "value": {"summary": "Escape", "description": ""}}
    for path in ("../escaped.txt", "/escaped.txt", "a/../../escaped.txt", "a\\escaped.txt", ""):
        item = {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}}
        lines = "\n".join(json.dumps(line) for line in (header, item)).encode()
        assert fetch(hub, address, "POST", lines, Authorization=authorization)[0] == 400
    create = json.dumps({"name": "../../escaped", "type": "model"}).encode()
    assert fetch(hub, "/api/repos/create", "POST", create, Authorization=authorization)[0] == 400
    assert fetch(hub, f"/lfs/{'0' * 64}", "PUT", b"not announced")[0] == 400
    assert fetch(hub, "/api/unknown")[0] == 404
    with pytest.raises(HubError, match="namespace/name"):
        hub.create_repo("../model")
    assert not list(hub.root.parent.rglob("*escaped*"))


def test_repos_stay_in_the_folder_after_the_server_ends(tmp_path):
    with LocalHub(tmp_path) as hub:
        first = hub.commit_files("user/data", {"a.txt": b"1", "b.txt": b"2"}, repo_type="dataset")
        second = hub.commit_files("user/data", {"a.txt": b"3", "b.txt": None}, repo_type="dataset")
    with LocalHub(tmp_path) as hub:
        assert hub.resolve("user/data", repo_type="dataset").id == second
        assert hub.read("user/data", "a.txt", first, "dataset") == b"1"
        assert hub.read("user/data", "a.txt", "main", "dataset") == b"3"
        with pytest.raises(HubError, match="Entry not found"):
            hub.read("user/data", "b.txt", repo_type="dataset")
        with pytest.raises(HubError, match="Repository not found"):
            hub.read("user/data", "a.txt")
        assert hub.commit_files("user/data", {"a.txt": b"3"}, repo_type="dataset") == second


def webdataset_shard(keys):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for key in keys:
            image = io.BytesIO()
            Image.new("RGB", (4, 4), (key, 0, 0)).save(image, format="PNG")
            for suffix, content in {"png": image.getvalue(), "json": json.dumps({"key": key}).encode()}.items():
                member = tarfile.TarInfo(f"{key:04d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_datasets_stream_by_id(hub):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import BufferOutputStream, table

    shards = {f"train-{i:05d}.tar": webdataset_shard(range(3 * i, 3 * i + 3)) for i in range(2)}
    hub.commit_files("user/images", {"README.md": b"# Images\n", **shards}, repo_type="dataset")
    tables = {}
    for i in range(2):
        parquet.write_table(table({"key": list(range(100 * i, 100 * i + 100))}), out := BufferOutputStream())
        tables[f"data/train-{i:05d}-of-00002.parquet"] = out.getvalue().to_pybytes()
    pinned = hub.commit_files("user/numbers", tables, repo_type="dataset")
    hub.commit_files("user/numbers", {"data/train-00001-of-00002.parquet": None}, repo_type="dataset")
    report = run_client(
        hub,
        f"""
        from datasets import load_dataset
        rows = list(load_dataset("user/images", split="train", streaming=True))
        report["images"] = [[row["json"]["key"], row["png"].getpixel((0, 0))[0]] for row in rows]
        numbers = load_dataset("user/numbers", revision={pinned!r}, split="train", streaming=True)
        report["numbers"] = [row["key"] for row in numbers]
        report["fewer"] = load_dataset("user/numbers", split="train").num_rows
        """,
    )
    assert report["images"] == [[key, key] for key in range(6)]
    assert report["numbers"] == list(range(200))
    assert report["fewer"] == 100


@pytest.mark.slow
def test_transformers_and_diffusers_models(hub):
    report = run_client(
        hub,
        """
        import torch
        from transformers import BertConfig, BertModel
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16)
        model = BertModel(BertConfig(**sizes))
        model.push_to_hub("user/bert")
        again = BertModel.from_pretrained("user/bert")
        report["transformers"] = all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))

        unet = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                           up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=4)
        DDPMPipeline(unet, DDPMScheduler()).push_to_hub("user/ddpm")
        again = DDPMPipeline.from_pretrained("user/ddpm").unet
        report["diffusers"] = all(map(torch.equal, unet.state_dict().values(), again.state_dict().values()))
        """,
    )
    assert report == {"transformers": True, "diffusers": True}


def test_a_private_repo_looks_missing_without_a_token(hub):
    hub.create_repo("user/secret", private=True)
    assert hub.is_private("user/secret")
    assert fetch(hub, "/api/models/user/secret")[0] == 401
    status, _, content = fetch(hub, "/api/models/user/secret", Authorization=f"Bearer {hub.token}")
    assert status == 200 and json.loads(content)["private"] is True
