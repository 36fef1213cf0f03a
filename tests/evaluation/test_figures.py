import json

import pytest
from PIL import Image, ImageChops

from iomm_hf.evaluation.figures import draw_bars, draw_radar, draw_sheet, plot_logs, plot_losses, plot_run


def test_a_sheet_has_a_row_a_model_and_a_column_a_prompt(tmp_path, images):
    draw_sheet({"before": images, "after": images}, ["a", "b", "c", "d"], tmp_path / "two.png")
    draw_sheet({"before": images}, ["a", "b", "c", "d"], tmp_path / "one.png")
    two, one = Image.open(tmp_path / "two.png"), Image.open(tmp_path / "one.png")
    assert two.width == one.width and two.height == pytest.approx(2 * one.height, rel=0.02)
    with pytest.raises(ValueError):
        draw_sheet({"before": images}, ["a", "b"], tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()


def test_losses_of_several_runs_share_a_plot(tmp_path):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"images": 16 * step, "loss": 1 / step}) for step in range(1, 9)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(rows))
    plot_losses({name: tmp_path / name for name in ("stage1", "stage2")}, tmp_path / "loss.png")
    assert len(Image.open(tmp_path / "loss.png").convert("RGB").getcolors(100_000)) > 3  # two curves, axes, white


def test_each_log_of_stage_0_has_its_panel(tmp_path):
    log = tmp_path / "vae-log.jsonl"
    log.write_text("\n".join(json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 9)))
    plot_logs([log], tmp_path / "one.png")
    plot_logs([log, log], tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width == 2 * Image.open(tmp_path / "one.png").width


def test_a_sheet_may_have_a_prompt_over_each_picture(tmp_path, images):
    titles = {"one": ["a", "b", "c", "d"], "two": ["e", "f", "g", "h"]}
    draw_sheet({"one": images, "two": images}, titles, tmp_path / "sheet.png")
    with pytest.raises(KeyError):
        draw_sheet({"three": images}, titles, tmp_path / "never.png")


def test_a_run_shows_all_its_curves_and_gaps_where_an_update_was_left_out(tmp_path):
    row = {"grad_norm": 0.5, "learning_rate": 1e-3, "images_per_second": 40.0, "skipped": {"not an image": 2}}
    groups = {"loss_by_time": {"0-0.25": 0.2, "0.25-0.5": 0.4}, "loss_by_source": {"0: photos": 0.3}}
    rows = [
        {"step": step, "images": 3 * step, "loss": 1 / step, "alignment": 0.1, **row, **groups} for step in range(1, 9)
    ]
    rows[3] = {"step": 4, **row, "grad_norm": None, "loss_by_time": {}, "loss_by_source": {}}
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plot_run(tmp_path, tmp_path / "curves.png")
    plot_losses({"run": tmp_path}, tmp_path / "loss.png")
    curves, loss = (
        len(Image.open(tmp_path / f"{n}.png").convert("RGB").getcolors(500_000)) for n in ("curves", "loss")
    )
    assert curves > loss > 3
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 9, "lo')  # being written
    plot_run(tmp_path, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_scores_are_drawn_with_all_names_inside_the_picture(tmp_path):
    rows = {
        "a run of mine, 30 steps, guidance 3 (only 6 items)": [0.5, 0.2, 0.9],
        "IOMM-B 512 (paper)": [0.9, 0.8, 0.7],
    }
    parts = ["single_object", "counting", "color_attr"]
    draw_radar(parts, rows, tmp_path / "radar.png")
    draw_bars({name: dict(zip(parts, row, strict=True)) for name, row in rows.items()}, tmp_path / "bars.png")
    for name in ("radar.png", "bars.png"):
        picture = Image.open(tmp_path / name).convert("RGB")
        left, top, right, bottom = ImageChops.invert(picture).getbbox()  # of what is not white
        assert left > 0 and top > 0 and right < picture.width and bottom < picture.height, name
