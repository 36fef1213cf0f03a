"""What GenEval looks at pictures with, through transformers: Mask2Former finds objects, CLIP names their colours.

The rules after it are in `geneval_rules`. What differs from the original (djghosh13/geneval, evaluation/evaluate_images.py), which
runs mmdet 2.27 and open_clip:

- The detector is transformers' conversion of a Mask2Former by its first authors (Swin-S, COCO instances, 50 epochs) and not
  mmdet's own training of it (`mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`): other weights, so scores differ by some points
  and belong beside others of the same detector.
- Pictures reach the detector at the size that the checkpoint's own processor decides, resized with PIL; mmdet's test
  pipeline keeps their ratio, within 1333 x 800 pixels, and resizes with OpenCV. Masks are resized to the picture from
  the network's output directly, mmdet resizes twice.
- CLIP ViT-L/14 has the same weights in both libraries; pictures are resized by its processor with PIL, as in open_clip.

Everything after the networks follows mmdet (read in open-mmlab/mmdetection,
mmdet/models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py, `instance_postprocess`): the 100 best pairs of query and
class, confidence times the mean probability inside the mask, boxes around masks. transformers' own post-processing would round
masks to 384 x 384 first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageColor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from ..data.images import load_image
from ..modeling_iomm import hash_weight_files
from .geneval_rules import CLASSES, COLORS, Detection, counted_objects, judge


DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]  # chat templates, tokenizers; no pickles
MAX_DETECTIONS = 100  # pairs of query and class a picture, mmdet's `max_per_image`
BACKGROUND = "#999"  # put around an object before its colour is named
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

# GenEval's names of COCO's classes where the data set, or a conversion of it, has others.
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "tvmonitor": "tv",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
}


class GenEvalModels:
    """
    Detector and colour classifier.

    Args:
        detector, clip (`str`, *optional*): Folders or Hub ids of a Mask2Former for COCO instances, and of a CLIP.
        detector_revision, clip_revision (`str`, *optional*): Commits of Hub ids. They are looked up either way.
        device (`str`, *optional*, defaults to `"cpu"`): Where both run, in float32.

    Raises:
        OSError: If a model is found nowhere, or only as a pickle.
        ValueError: If the detector does not know GenEval's 80 classes.
    """

    def __init__(
        self,
        detector: str = DETECTOR,
        clip: str = CLIP,
        *,
        detector_revision: str | None = None,
        clip_revision: str | None = None,
        device: str = "cpu",
    ):
        detector_folder, detector_commit = resolve_model(detector, detector_revision)
        clip_folder, clip_commit = resolve_model(clip, clip_revision)
        self.device = device
        options = {"dtype": torch.float32, "use_safetensors": True}
        self.detector_processor = Mask2FormerImageProcessorPil.from_pretrained(detector_folder)
        self.detector = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder, **options)
        self.detector.to(device).eval()
        self.labels = class_names(self.detector.config.id2label)
        self.clip_processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
        self.tokenizer = AutoTokenizer.from_pretrained(clip_folder)
        self.clip = CLIPModel.from_pretrained(clip_folder, **options).to(device).eval()
        self._classifiers: dict[str, torch.Tensor] = {}
        size = ", ".join(f"{name} {value}" for name, value in self.detector_processor.to_dict()["size"].items())
        self.about = {
            "kind": "detector",
            "detector": public_name(detector),
            "detector_revision": detector_commit,
            "detector_sha256": hash_weight_files(detector_folder),
            "detector_processor": self.detector_processor.to_dict(),
            "clip": public_name(clip),
            "clip_revision": clip_commit,
            "clip_sha256": hash_weight_files(clip_folder),
            "differs_from_original": "Mask2Former and CLIP run through transformers, not mmdet and open_clip: other"
            f" detector weights; pictures reach the detector resized by its processor to {size}, where mmdet keeps"
            " their ratio within 1333 x 800",
        }

    def score(self, picture: Image.Image, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """
        What is seen in a picture, and GenEval's verdict on it.

        Args:
            picture (`PIL.Image.Image`): RGB.
            metadata (`dict`): Its line of `evaluation_metadata.jsonl`.

        Returns:
            `dict` with `correct`, `reason`, and `detections`: the objects that count, with boxes in pixels.
        """
        found, masks = self.detect(picture)
        order = {id(item): number for number, item in enumerate(found)}
        counted = counted_objects(found, metadata["tag"])
        wanted = {entry["class"]: entry["count"] for entry in metadata["include"] if "color" in entry}
        coloured, taken = [], dict.fromkeys(wanted, 0)
        for item in counted:
            if taken.get(item.label, 0) < wanted.get(item.label, 0):
                taken[item.label] += 1
                color = self.name_color(picture, item, masks[order[id(item)]])
                item = Detection(item.label, item.box, item.score, color)
            coloured.append(item)
        correct, reason = judge(coloured, metadata)
        return {
            "correct": correct,
            "reason": reason,
            "detections": [
                {"label": d.label, "box": list(d.box), "score": d.score, "color": d.color} for d in coloured
            ],
        }

    @torch.no_grad()
    def detect(self, picture: Image.Image) -> tuple[list[Detection], np.ndarray]:
        """
        All objects, most confident first, and their masks.

        Returns:
            Up to 100 [`Detection`] with boxes (left, top, right, bottom), the last two exclusive, and `bool` masks of shape
            `(objects, height, width)`.
        """
        inputs = self.detector_processor(picture, return_tensors="pt").to(self.device)
        outputs = self.detector(**inputs)
        return read_detections(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0], picture.size, self.labels
        )

    @torch.no_grad()
    def name_color(self, picture: Image.Image, item: Detection, mask: np.ndarray) -> str:
        """CLIP's colour of an object, cut out of the picture and put on grey, out of GenEval's ten."""
        inputs = self.clip_processor(cut_out(picture, item.box, mask), return_tensors="pt").to(self.device)
        features = F.normalize(self.clip.get_image_features(**inputs).pooler_output, dim=-1)  # (1, D)
        return COLORS[int((features @ self.color_classifier(item.label).T).argmax())]

    def color_classifier(self, name: str) -> torch.Tensor:
        """One direction for each colour of a class, the mean over three wordings, of shape `(10, D)`."""
        if name not in self._classifiers:
            rows = []
            for color in COLORS:
                texts = [template.format(color=color, name=name) for template in COLOR_TEMPLATES]
                inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                features = F.normalize(self.clip.get_text_features(**inputs).pooler_output, dim=-1)
                rows.append(F.normalize(features.mean(dim=0), dim=-1))
            self._classifiers[name] = torch.stack(rows)
        return self._classifiers[name]


def cut_out(picture: Image.Image, box: tuple[float, float, float, float], mask: np.ndarray) -> Image.Image:
    """
    An object on grey, as large as its box.

    Args:
        picture (`PIL.Image.Image`): What it was found in.
        box (`tuple[float, float, float, float]`): Left, top, right and bottom in pixels, the last two exclusive.
        mask (`numpy.ndarray` of shape `(height, width)`, `bool`): Which pixels of the picture are its own.

    Example:

    ```python
    >>> mask = np.eye(4, dtype=bool)
    >>> cut_out(Image.new("RGB", (4, 4), "red"), (0, 0, 2, 1), mask).getcolors()
    [(1, (153, 153, 153)), (1, (255, 0, 0))]
    ```
    """
    blank = Image.new("RGB", picture.size, ImageColor.getrgb(BACKGROUND))
    return Image.composite(picture, blank, Image.fromarray(mask.astype(np.uint8) * 255)).crop(box)


def read_detections(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int], labels: Sequence[str]
) -> tuple[list[Detection], np.ndarray]:
    """
    Objects out of a Mask2Former's output for one picture, as mmdet reads them.

    Args:
        class_logits (`torch.Tensor` of shape `(queries, classes + 1)`): The last class is "nothing".
        mask_logits (`torch.Tensor` of shape `(queries, h, w)`): At the network's resolution.
        size (`tuple[int, int]`): Width and height of the picture, in pixels.
        labels (`list[str]`): Names of the classes.

    Returns:
        Up to 100 [`Detection`], most confident first, with boxes in pixels, and `bool` masks of shape `(objects, height, width)`.
    """
    logits = F.interpolate(mask_logits[None], size=size[::-1], mode="bilinear", align_corners=False)[
        0
    ]  # (queries, H, W)
    chances = class_logits.softmax(dim=-1)[:, :-1]  # (queries, classes)
    scores, indices = chances.flatten().topk(min(MAX_DETECTIONS, chances.numel()))
    queries, classes = indices // chances.shape[1], indices % chances.shape[1]
    masks = logits[queries] > 0
    inside = (logits[queries].sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = scores * inside  # an empty mask has none
    keep = torch.argsort(scores, descending=True, stable=True)
    keep = keep[masks[keep].flatten(1).any(dim=1)]
    found = []
    for number in keep.tolist():
        rows, columns = masks[number].any(dim=1).nonzero(), masks[number].any(dim=0).nonzero()
        box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
        found.append(
            Detection(labels[int(classes[number])], tuple(map(float, box)), scores[number].item())  # type: ignore[arg-type]
        )
    return found, masks[keep].cpu().numpy()


def resolve_model(name: str, revision: str | None) -> tuple[Path, str | None]:
    """
    The folder of a model, fetched without pickles if it is a Hub id, and its commit (`None` for a folder).

    Raises:
        OSError: If nothing is found there.
    """
    if Path(name).is_dir():
        return Path(name), None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except OSError as error:  # the Hub's client does not always say which id it misses
        raise OSError(f"{name}: {error}") from error
    return folder, folder.name  # the Hub's cache names snapshots by their commit


def public_name(name: str) -> str:
    """A model's name for others: a Hub id as it is, of a folder its end, since the rest of its path is this machine's."""
    return "/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name


def class_names(id2label: Mapping[int, str]) -> list[str]:
    """
    GenEval's names of a detector's classes, in the detector's order.

    Raises:
        ValueError: If they are not COCO's 80.

    Example:

    ```python
    >>> class_names({i: name for i, name in enumerate(CLASSES)} | {64: "mouse"})[64]
    'computer mouse'
    ```
    """
    names = [ALIASES.get(id2label[i].lower(), id2label[i].lower()) for i in range(len(id2label))]
    missing, others = sorted(set(CLASSES) - set(names)), sorted(set(names) - set(CLASSES))
    if missing or others or len(names) != len(CLASSES):
        raise ValueError(
            f"GenEval's detector must know COCO's 80 classes; of this one's {len(names)}, {len(missing)} are missing"
            f" ({', '.join(missing[:5])}) and {len(others)} are others ({', '.join(others[:5])})."
        )
    return names


def load_picture(file: Path) -> Image.Image:
    """A picture from a file, upright and in RGB."""
    return load_image(file.read_bytes())
