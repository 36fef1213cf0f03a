"""Benchmarks that a judge scores: which questions it is asked about which pictures, and what its answers add up to.

One small description a benchmark ([`Judged`]), and one loop for all of them ([`ask_all`]), which goes on where it was stopped:
answered questions are kept, the others are asked again.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..integrity import sha256
from . import dpg, imgedit, wise
from .benchmarks import Benchmark
from .geneval_models import load_picture
from .judges import Judge, Question
from .results import Details, Incomplete, record_software
from .wording import Message, fill_in, read_wording


CHARACTERS_PER_TOKEN = 4
TOKENS_PER_PICTURE = 1_000  # a round figure between what servers count for 512 and for 1024 px
STATUSES = ("answered", "unreadable", "refused", "cut off", "empty", "failed")
DPG_ANSWER = "Answer with yes or no."  # added to each question: chat models explain themselves otherwise


@dataclass(frozen=True)
class Judged:
    """
    How a judge scores a benchmark.

    Args:
        read (`Callable[[str], Any | None]`): What an answer says; `None` where it does not parse.
        lowest: What an unreadable answer counts as, if the user so wishes.
        keys (`list[str]`): One for each question.
        question (`Callable[[str], Question]`): Builds a question when it is about to be asked, so that pictures are read then.
        summarize (`Callable[[Mapping[str, Any]], dict]`): Scores out of all answers by key.
        wording (`dict`): What a result says of the question's wording.
        characters (`int`): Length of all questions' texts, for an estimate of what asking costs.
        pictures_each (`int`): Pictures that go with a question.
        about (`Callable[[str], dict]`, *optional*): What a line of details says of its question besides the answer.
    """

    read: Callable[[str], Any]
    lowest: Any
    keys: list[str]
    question: Callable[[str], Question]
    summarize: Callable[[Mapping[str, Any]], dict[str, Any]]
    wording: dict[str, Any]
    characters: int
    pictures_each: int = 1
    about: Callable[[str], dict[str, Any]] = lambda key: {}

    def value(self, line: Mapping[str, Any] | None) -> Any:
        """What a line of details says, read anew from the raw answer; `None` where there is none, or it does not parse."""
        if line is None or line["status"] not in ("answered", "unreadable"):
            return None
        return self.read(without_thoughts(line["text"]))

    def unanswered(self, lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Keys of the questions that have no readable answer among lines of details."""
        return [key for key in self.keys if self.value(lines.get(key)) is None]

    def cost(self, answered: int = 0, max_tokens: int = 0, prices: tuple[float, float] | None = None) -> str:
        """
        What is about to be asked, in a sentence: requests, tokens by rule of thumb, and money where prices are known.

        Args:
            answered (`int`, *optional*, defaults to 0): Questions that have an answer already.
            max_tokens (`int`, *optional*, defaults to 0): That an answer may have.
            prices (`tuple[float, float]`, *optional*): For a million tokens read, and written.
        """
        requests = len(self.keys) - answered
        share = requests / len(self.keys)
        read = share * self.characters / CHARACTERS_PER_TOKEN + requests * self.pictures_each * TOKENS_PER_PICTURE
        written = requests * max_tokens
        text = (
            f"{requests:,} requests with {requests * self.pictures_each:,} pictures: about {read:,.0f} tokens to read (at"
            f" {CHARACTERS_PER_TOKEN} characters a token and {TOKENS_PER_PICTURE:,} tokens a picture, which servers count"
            f" otherwise), at most {written:,} to write."
        )
        if prices is None:
            return text + " What that costs is the server's to say; --price-in and --price-out turn it into money."
        most = (read * prices[0] + written * prices[1]) / 1e6
        return (
            text
            + f" At {prices[0]:g} and {prices[1]:g} a million, about {read * prices[0] / 1e6:,.2f} and at most {most:,.2f}."
        )


def judged(benchmark: Benchmark, pictures: Mapping[str, Path], wording: Path | None = None) -> Judged:
    """
    The questions of a benchmark about pictures.

    Args:
        benchmark ([`Benchmark`]): dpg, wise, wise-verified or imgedit.
        pictures (`dict[str, Path]`): As [`~iomm_hf.evaluation.results.find_pictures`] found them; they need not be there yet.
        wording (`Path`, *optional*): A file with the judge's wording, in place of the authors'.

    Raises:
        ValueError: If the authors' files cannot be used.
        OSError: If they cannot be found.
    """
    assert benchmark.data is not None
    if benchmark.name == "dpg":
        return _dpg(benchmark, pictures)
    file = wording or benchmark.data.wording
    if benchmark.name == "imgedit":
        return _imgedit(benchmark, pictures, file)
    return _wise(benchmark, pictures, file)


def _dpg(benchmark: Benchmark, pictures: Mapping[str, Path]) -> Judged:
    assert benchmark.data is not None
    questions = dpg.read_questions(benchmark.data.wording)
    missing = [item for item in benchmark.metadata if item not in questions]
    if missing:
        raise ValueError(f"The question file asks nothing about {len(missing)} items: {', '.join(missing[:5])}.")
    asked: dict[str, tuple[str, int, dpg.Question]] = {
        f"{item}.png#{number}/{question.number}": (item, number, question)
        for item in benchmark.metadata
        for number in range(len(dpg.GRID))
        for question in questions[item]
    }

    def build(key: str) -> Question:
        item, number, question = asked[key]
        cut = dpg.cut_grid(load_picture(pictures[f"{item}.png"]))[number]
        return Question(key, [Message("user", f"{question.text} {DPG_ANSWER}", True)], [cut])

    def summarize(answers: Mapping[str, bool]) -> dict[str, Any]:
        scores: dict[str, list[float]] = {}
        for item in benchmark.metadata:
            for number in range(len(dpg.GRID)):
                own = {q.number: answers[f"{item}.png#{number}/{q.number}"] for q in questions[item]}
                scores.setdefault(item, []).append(dpg.score_picture(questions[item], own))
        return dpg.summarize(scores, len(benchmark.metadata))

    characters = sum(len(question.text) + 1 + len(DPG_ANSWER) for _, _, question in asked.values())

    def about(key: str) -> dict[str, Any]:
        _, number, question = asked[key]
        return {"question": question.text, "quarter": number}

    wording = {"added": DPG_ANSWER}
    return Judged(dpg.read_answer, False, list(asked), build, summarize, wording, characters, about=about)


def _wise(benchmark: Benchmark, pictures: Mapping[str, Path], file: Path) -> Judged:
    version = benchmark.name
    messages = read_wording(file)

    def build(key: str) -> Question:
        item = key.removesuffix(".png")
        return Question(key, fill_in(messages, benchmark.metadata[item]), [pictures[key]])

    def summarize(answers: Mapping[str, dict[str, int]]) -> dict[str, Any]:
        return wise.summarize(version, {int(key.removesuffix(".png")): wise.wiscore(a) for key, a in answers.items()})

    lowest = dict.fromkeys(wise.ASPECTS, 0) if version == "wise" else {"score": 0}
    keys = [drawing.path for drawing in benchmark.drawings]
    filled = [fill_in(messages, row) for row in benchmark.metadata.values()]
    characters = sum(len(message.text) for item in filled for message in item)
    return Judged(
        lambda text: wise.read_answer(version, text), lowest, keys, build, summarize, about_wording(file), characters
    )


def _imgedit(benchmark: Benchmark, pictures: Mapping[str, Path], file: Path) -> Judged:
    data = benchmark.data
    assert data is not None
    wordings = imgedit.read_wordings(file, {row["edit_type"] for row in benchmark.metadata.values()})

    def build(key: str) -> Question:
        row = benchmark.metadata[key.removesuffix(".png")]
        text = wordings[row["edit_type"]].replace(imgedit.PLACE_OF_PROMPT, row["prompt"])
        return Question(key, [Message("user", text, True)], [data.picture(row["id"]), pictures[key]])

    [items] = data.prompt_files
    # Of the whole benchmark, also where a part of it is judged: what leaves a type out has no overall score.
    types = {item: row["edit_type"] for item, row in json.loads(data.path(items).read_text(encoding="utf-8")).items()}

    def summarize(answers: Mapping[str, list[int]]) -> dict[str, Any]:
        return imgedit.summarize({key.removesuffix(".png"): value for key, value in answers.items()}, types)

    for row in benchmark.metadata.values():
        data.picture(row["id"])  # found, and hashed, before anything is asked or drawn
    keys = [drawing.path for drawing in benchmark.drawings]
    characters = sum(len(wordings[row["edit_type"]]) + len(row["prompt"]) for row in benchmark.metadata.values())
    lowest = [1] * imgedit.SCORES

    def about(key: str) -> dict[str, Any]:
        return {"source_picture": benchmark.metadata[key.removesuffix(".png")]["id"]}

    return Judged(imgedit.read_answer, lowest, keys, build, summarize, about_wording(file), characters, 2, about)


def about_wording(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": sha256(file)}


def ask_all(task: Judged, judge: Judge, details: Details, *, rank: int = 0, num_ranks: int = 1):
    """
    Asks this rank's share of the questions that have no readable answer yet, and keeps every answer.

    Args:
        task ([`Judged`]): The questions.
        judge ([`Judge`]): Who answers.
        details ([`Details`]): Where answers are kept.
        rank, num_ranks (`int`, *optional*, defaults to 0 and 1): Which share.

    Raises:
        ValueError: If the judge refuses to be asked at all.
    """
    missing = set(task.unanswered(details.read()))
    waiting = [
        key for key in task.keys[rank::num_ranks] if key in missing
    ]  # shares of all: others may be writing already
    if waiting:
        record_software(details.folder, judge.device)
    answers = judge.ask(map(task.question, waiting))
    for answer in tqdm(
        answers, total=len(waiting), desc="Judging", unit="answer", disable=None if rank == 0 else True
    ):
        line = answer.to_dict()
        value = task.value(line)
        unreadable = answer.status == "answered" and value is None
        details.add(line | ({"status": "unreadable"} if unreadable else {}) | task.about(answer.key) | {"read": value})


def add_up(task: Judged, details: Details, unreadable: str = "error") -> tuple[dict[str, Any], dict[str, int]]:
    """
    Scores out of all answers.

    Args:
        task ([`Judged`]): The questions.
        details ([`Details`]): The answers.
        unreadable (`str`, *optional*, defaults to `"error"`): "error", or "lowest": answers that cannot be read,
            refusals among them, count as the lowest score. The result says how many. What failed or was never asked
            has no answer and stays missing.

    Returns:
        The scores, and counts of questions: `questions`, `answered`, `unreadable`, `refused`, `cut off`, `empty`, `failed`.

    Raises:
        Incomplete: If a question has no answer, or none that can be read and `unreadable` is "error"; asking again is
            the same call again.
    """
    lines = details.read()
    values = {key: task.value(lines.get(key)) for key in task.keys}
    found = {
        key: "answered" if value is not None else lines[key]["status"] if key in lines else "failed"
        for key, value in values.items()
    }
    statuses = Counter(found.values())
    bearable = {"answered"} if unreadable == "error" else set(STATUSES) - {"failed"}
    lacking = sum(status not in bearable for status in found.values())
    counts = {"questions": len(task.keys)} | {status: statuses[status] for status in STATUSES}
    if lacking:
        told = ", ".join(f"{number} {status}" for status, number in statuses.items() if status != "answered")
        raise Incomplete(
            f"{lacking} of {len(task.keys)} questions have no readable answer ({told}), so there is no score. All answers"
            f" are in {details.folder}. The same command asks these again; --unreadable lowest counts answers that cannot"
            " be read as the lowest score and says so, but not requests that failed."
        )
    return task.summarize({key: task.lowest if value is None else value for key, value in values.items()}), counts


def without_thoughts(text: str) -> str:
    """An answer without the thoughts that some models think aloud before it."""
    return text.rpartition("</think>")[2]
