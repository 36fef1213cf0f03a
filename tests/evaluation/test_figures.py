import json

import pytest
from PIL import Image

from iomm_hf.evaluation.figures import draw_sheet, plot_losses


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
