"""The page from outside: its API through gradio_client, its tools through MCP, and files that visitors should not send."""

import asyncio
import base64
import json
import struct
import zlib
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio.route_utils import delete_files_created_by_app
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

from iomm_hf.demo import app, model


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def api(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """Where `photo` lies, as Gradio's upload folder."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def photo(tmp_path):
    """A camera's sideways picture, red at the left."""
    picture = Image.new("RGB", (96, 64), "blue")
    picture.paste("red", (0, 0, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that would decode to width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_the_api_is_four_documented_functions(api):
    endpoints = api.view_api(return_format="dict")["named_endpoints"]
    assert {name: [p["parameter_name"] for p in endpoint["parameters"]] for name, endpoint in endpoints.items()} == {
        "/draw": ["prompt", "seed", "size", "steps", "guidance_scale"],
        "/edit": ["picture", "instruction", "seed", "steps", "guidance_scale"],
        "/ask": ["picture", "question"],
        "/learn": ["picture", "mask_ratio", "seed"],
    }


def test_the_first_pictures_are_this_models_own(api):
    [(file, caption)] = [entry for entry in app.welcome(None) if "red circle" in entry[1]]
    assert caption == "a red circle · seed 1"
    drawn = np.asarray(Image.open(api.predict("a red circle", 1, api_name="/draw")), dtype=int)
    assert np.abs(drawn - np.asarray(Image.open(file), dtype=int)).max() <= 3


def test_edit_ask_and_learn_through_the_api(api, photo):
    assert Image.open(api.predict(handle_file(photo), "make it green", 0, 2, api_name="/edit")).size == (64, 64)
    assert isinstance(api.predict(handle_file(photo), "How many stars are there?", api_name="/ask"), str)
    sheet = Image.open(api.predict(handle_file(photo), 0.5, 0, api_name="/learn"))
    assert sheet.getpixel((20, 20))[:3] == (255, 0, 0)  # the turned picture's upper half
    assert sheet.getpixel((20, sheet.height - 20))[:3] == (0, 0, 255)


def test_mistakes_come_back_as_sentences(api, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(AppError, match="Say what to draw"):
        api.predict(" ", api_name="/draw")
    with pytest.raises(AppError, match="cannot be used: expected one of JPEG, PNG"):
        api.predict(handle_file(tmp_path / "text.png"), api_name="/ask")
    with pytest.raises(AppError, match="whole number, got 2.5"):
        api.predict(handle_file(app.HERE / "pictures" / "1 a red circle.png"), "", 0, 2.5, api_name="/edit")


def test_mcp_tools_are_the_same_functions(address):
    async def visit():
        async with (
            streamable_http_client(f"{address}gradio_api/mcp/") as streams,
            ClientSession(streams[0], streams[1]) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            return tools, await session.call_tool("draw", {"prompt": "a red circle", "steps": 2})

    tools, drawn = asyncio.run(visit())
    assert set(tools) == {"draw", "edit", "ask", "learn"}
    for name, tool in tools.items():
        assert tool.description.startswith(getattr(app, name).__doc__.split("\n")[0].rstrip("."))
        assert all(field.get("description") for field in tool.inputSchema["properties"].values()), name
        assert "/tmp" not in json.dumps(tool.inputSchema)
    assert [content.type for content in drawn.content] == ["image", "text"] and not drawn.isError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"no picture", "expected one of JPEG"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected one of JPEG"),
        ("bomb.png", bomb(30_000, 30_000), "exceeds limit|pixels, expected at most"),
        ("large.png", bomb(7_000, 6_000), "7000x6000 pixels, expected at most 40000000"),
        ("pixel.png", bomb(1, 1), "shorter edge"),
        ("cut.png", bomb(64, 64), "PNG of 64x64 pixels"),
        ("empty.png", b"", "expected the bytes of a picture"),
        ("heavy.png", bytes(app.MAX_BYTES + 1), "larger than 10 MB"),
    ],
)
def test_files_that_are_no_pictures(uploads, name, content, message):
    (uploads / name).write_bytes(content)
    with pytest.raises(gr.Error, match=message) as refusal, app.told():
        app.read_upload({"path": str(uploads / name)})
    assert not content or repr(content[:16]) not in str(refusal.value)  # what lies in a file is nobody's to read


def test_only_regular_files_of_the_upload_folder_are_read(uploads, photo, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "photo.png"
    elsewhere.write_bytes(photo.read_bytes())
    (uploads / "link.png").symlink_to(elsewhere)
    climbing = uploads / ".." / elsewhere.relative_to(uploads.parent)
    for path in (elsewhere, climbing, uploads / "link.png", uploads, uploads / "gone.png", "/dev/zero"):
        with pytest.raises(ValueError, match="not uploaded here"):
            app.read_upload({"path": str(path)})
    with pytest.raises(ValueError, match="not uploaded here"):
        app.compare({"path": str(photo)}, {"path": str(elsewhere)})
    assert app.read_upload({"path": str(photo)}).mode == "RGB"


def test_uploads_come_upright_and_in_rgb(uploads, photo):
    picture = app.read_upload({"path": str(photo)})
    assert (picture.size, picture.mode) == ((64, 96), "RGB")
    assert picture.getpixel((0, 0)) == (255, 0, 0) and picture.getpixel((0, 95)) == (0, 0, 255)
    with pytest.raises(ValueError, match="Give a picture first"):
        app.read_upload(None)
    for upload in ({"url": "data:image/png;base64,AAAA", "path": None}, {"path": 1}, ["photo.png"], "photo.png"):
        with pytest.raises(ValueError, match="not as a data URL"):
            app.read_upload(upload)


def test_the_server_takes_no_heavy_uploads(http):
    heavy = http.post("gradio_api/upload", files={"files": ("a.png", bytes(app.MAX_BYTES + 1))})
    assert heavy.status_code == 413


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
@pytest.mark.parametrize(("name", "others"), [("edit", ["", 0, 1, 1]), ("ask", ["Describe it."]), ("learn", [0.5, 0])])
def test_pictures_of_the_servers_own_are_not_read(http, photo, name, others, meta):
    asked = http.post(f"gradio_api/call/{name}", json={"data": [{"path": str(photo)} | meta, *others]}).json()
    answer = http.get(f"gradio_api/call/{name}/{asked['event_id']}").text
    assert "event: error" in answer and "event: complete" not in answer and "event: generating" not in answer


def test_uploads_and_drawings_are_deleted_when_their_time_is_over(api, http, page):
    with open(app.HERE / "pictures" / "1 a red circle.png", "rb") as file:
        [upload] = http.post("gradio_api/upload", files={"files": ("mine.png", file)}).json()
    api.predict("a star", 0, 64, 1, api_name="/draw")
    files = {Path(upload), *(Path(name) for files in page.temp_file_sets for name in files if name.endswith(".png"))}
    assert all(file.is_file() for file in files) and len(files) > 1
    delete_files_created_by_app(page, 0)
    kept = {Path(name) for block in page.blocks.values() for name in getattr(block, "keep_in_cache", ())}
    assert not any(file.exists() for file in files - kept) and Path(upload) not in kept


def test_pictures_sent_over_mcp_are_deleted_too_and_examples_are_not(address, api, page, photo):
    Image.fromarray(np.random.default_rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo)  # like no other
    sent = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"

    async def ask():
        async with (
            streamable_http_client(f"{address}gradio_api/mcp/") as streams,
            ClientSession(streams[0], streams[1]) as session,
        ):
            await session.initialize()
            return await session.call_tool("ask", {"picture": sent, "question": "What is it?"})

    assert not asyncio.run(ask()).isError
    arrived = [file for file in Path(get_upload_folder()).rglob("*.png") if file.read_bytes() == photo.read_bytes()]
    kept = {Path(name) for block in page.blocks.values() for name in getattr(block, "keep_in_cache", ())}
    delete_files_created_by_app(page, 0)
    app.delete_sent_over_mcp(app.KEPT_SECONDS)
    assert any(file.exists() for file in arrived)  # not yet
    app.delete_sent_over_mcp(0)
    assert not any(file.exists() for file in arrived) and kept and all(file.exists() for file in kept)


def test_a_served_page_deletes_by_age(uploads, monkeypatch):
    monkeypatch.setattr(app, "KEPT_SECONDS", 0.03)
    (uploads / "hash").mkdir()
    for name in ("file.png", "photo.png"):
        (uploads / "hash" / name).write_bytes(b"sent")

    async def serve():
        async with app.launch_options()["app_kwargs"]["lifespan"](None):
            await asyncio.sleep(1)

    asyncio.run(serve())
    assert [file.name for file in (uploads / "hash").iterdir()] == ["photo.png"]


def test_nothing_is_kept_and_nothing_phones_home(http):
    config = http.get("config").json()
    assert config["analytics_enabled"] is False and config["run_history"] is False
    page = http.get("").text
    assert "fonts.googleapis.com" not in page and "cdnjs" not in page


def test_the_queue_is_limited_and_the_model_has_one_visitor_at_a_time(page):
    assert page._queue.max_size == app.QUEUE
    shared = [block for block in page.fns.values() if block.api_name in ("draw", "edit", "ask", "learn")]
    assert {(block.concurrency_id, block.concurrency_limit) for block in shared} == {("model", 1)} and len(shared) == 4
    assert page.delete_cache[1] <= 3600


def test_each_tab_has_a_stop(page):
    stops = [block.cancels for block in page.fns.values() if block.cancels]
    assert [[page.fns[number].api_name for number in numbers] for numbers in stops] == [
        ["draw"], ["edit"], ["ask"], ["learn"],
    ]  # fmt: skip


def test_the_notes_say_what_was_measured(request):
    results = request.config.rootpath / "results/shapes"
    score = json.loads((results / "score.json").read_text())["model"]["overall"]
    assert f"**{score['value']:.0%}".replace("%", " %") in app.SHIPPED_NOTES["draw"]
    edits = json.loads((results / "edits.json").read_text())["model"]["correct"]
    assert (edits["recolor"]["correct"], edits["remove"]["correct"]) == (0, 0)  # "none was right"
    assert {edits[kind]["total"] for kind in edits} == {10}
    assert f"of 10 variations {edits['variation']['correct']} kept" in app.SHIPPED_NOTES["edit"]
    assert f"{edits['variation']['correct']} of 10 variations" in app.SHIPPED_NOTES["learn"]
    weights = sum(parameter.numel() for parameter in model.load(device="cpu").text_encoder.mllm.parameters())
    assert f"{weights / 1e6:.1f} million" in app.SHIPPED_NOTES["ask"]


def test_another_checkpoint_is_named_and_gets_none_of_the_shipped_ones_notes(shipped, tmp_path):
    shipped.save_pretrained(tmp_path / "mine")
    page = app.build(str(tmp_path / "mine"), "cpu")
    texts = " ".join(str(block["props"].get("value")) for block in page.get_config_file()["components"])
    assert "mine</code>" in texts
    assert not any(said in texts for said in ("eight shapes", "none** was right", "chosen"))
