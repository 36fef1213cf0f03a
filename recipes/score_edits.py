"""Scores zero-shot editing in the shapes world: change made and rest kept, both at once.

    python recipes/score_edits.py --checkpoint outputs/mine/stage1/final
    python recipes/score_edits.py --checkpoint outputs/image/final --beside pairs=outputs/pair/final

No training shows edits. Beside the model stand the true edits (the ceiling), copies of the sources and the model's pictures of
other cases: the last two must score 0 or nearly so.
"""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.shapes import render
from iomm_hf.evaluation.edits import EditReport, draw_edits, edit_cases, score_edits
from iomm_hf.evaluation.figures import draw_sheet
from iomm_hf.evaluation.options import ScoringOptions
from iomm_hf.files import write_json


@dataclass
class EditsConfig(ScoringOptions):
    output_dir: str = field(default="outputs/edits", metadata={"help": "Folder for edits.json and edits.png."})
    cases_per_kind: int = field(default=100, metadata={"help": "Cases of each of the three kinds of edits."})
    seed: int = field(default=0, metadata={"help": "Seed of scenes and edits."})


def main(config: EditsConfig):
    cases = edit_cases(config.cases_per_kind, config.seed)
    settings = config.sampling
    pipeline = IOMMPipeline.from_pretrained(config.checkpoint)
    sources = [case.picture(pipeline.resolution) for case in cases]
    drawn = draw_edits(pipeline, cases, **settings)
    reports: dict[str, EditReport] = {
        "model": score_edits(drawn, cases),
        "true edits": score_edits(
            [Image.fromarray(render(case.target, pipeline.resolution)) for case in cases], cases
        ),
        "copies": score_edits(sources, cases),
        "another case's": score_edits(drawn[1:] + drawn[:1], cases),
    }
    for name, rival in config.rivals.items():
        reports[name] = score_edits(draw_edits(IOMMPipeline.from_pretrained(rival), cases, **settings), cases)

    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "edits.json",
        {"checkpoint": config.checkpoint, "beside": config.rivals, "seed": config.seed, **settings}
        | {name: report.to_dict() for name, report in reports.items()},
    )
    shown = [
        i for kind in reports["model"].correct for i in [n for n, case in enumerate(cases) if case.kind == kind][:3]
    ]
    draw_sheet(
        {"before": [sources[i] for i in shown], "after": [drawn[i] for i in shown]},
        [cases[i].instruction or "(a variation)" for i in shown],
        output / "edits.png",
    )
    for name, report in reports.items():
        kinds = "  ".join(
            f"{kind} {share.accuracy:.2f} (changed {report.changed[kind].accuracy:.2f}, kept {report.kept[kind].accuracy:.2f})"
            for kind, share in report.correct.items()
        )
        overall = report.overall
        print(f"{name:16} overall {overall.value:.3f} [{overall.low:.3f}, {overall.high:.3f}]  {kinds}")
    print(f"Wrote {output / 'edits.json'} and edits.png")


if __name__ == "__main__":
    main(*TrlParser(EditsConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
