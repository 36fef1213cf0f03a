"""The judge's client against a server that speaks the protocol and fails as real ones do."""

import io
import json
import threading
import time

import pytest
from PIL import Image

from iomm_hf.evaluation.judges import EndpointJudge, Question, TransformersJudge
from iomm_hf.evaluation.wording import Message
from iomm_hf.testing.judge_server import LocalJudge


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def questions(count: int) -> list[Question]:
    picture = Image.new("RGB", (8, 8), "red")
    return [Question(str(i), [Message("user", f"question {i}", True)], [picture]) for i in range(count)]


def text_of(request: dict) -> str:
    return request["messages"][-1]["content"][0]["text"]


def test_every_question_is_answered_once_with_what_was_sent():
    with LocalJudge(lambda request: text_of(request).upper()) as server:
        judge = EndpointJudge("local-judge-1", server.address, workers=3)
        answers = {answer.key: answer for answer in judge.ask(iter(questions(7)))}
    assert {key: answer.text for key, answer in answers.items()} == {str(i): f"QUESTION {i}" for i in range(7)}
    assert {answer.status for answer in answers.values()} == {"answered"}
    assert answers["0"].usage == {"read": 10, "written": 5} and len(server.requests) == 7
    sent = server.requests[0]
    assert sent["model"] == "local-judge-1" and sent["temperature"] == 0
    picture = sent["messages"][0]["content"][1]["image_url"]["url"]
    assert picture.startswith("data:image/png;base64,")


@pytest.mark.parametrize("failure", [429, 500, 503, "cut"])
def test_what_passes_is_asked_again(failure):
    with LocalJudge(lambda request: "yes") as server:
        server.fail_next(failure, failure)
        [answer] = EndpointJudge("local-judge-1", server.address).ask(questions(1))
    assert answer.status == "answered" and answer.text == "yes" and len(server.requests) == 3


@pytest.mark.parametrize(
    ("failures", "message"),
    [([500] * 9, "InternalServerError"), (["garbage"], "no chat completion"), (["other"], "no chat completion")],
)
def test_what_stays_wrong_is_a_failure_and_no_answer(failures, message):
    with LocalJudge(lambda request: "yes") as server:
        server.fail_next(*failures)
        [answer] = EndpointJudge("local-judge-1", server.address, max_retries=2).ask(questions(1))
    assert answer.status == "failed" and message in answer.text and answer.model is None


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ({"refusal": "I cannot look at this."}, "refused"),
        ({"content": "", "finish_reason": "content_filter"}, "refused"),
        ({"content": "Consistency: 2", "finish_reason": "length"}, "cut off"),
        ({"content": " "}, "empty"),
        ({"content": None}, "empty"),
    ],
)
def test_what_is_no_answer_is_named(reply, status):
    with LocalJudge(lambda request: reply) as server:
        [answer] = EndpointJudge("local-judge-1", server.address).ask(questions(1))
    assert answer.status == status


def test_a_question_that_the_servers_filter_turns_down_is_refused_and_not_asked_again():
    with LocalJudge(lambda request: "yes") as server:
        server.fail_next("filtered")
        [answer] = EndpointJudge("local-judge-1", server.address).ask(questions(1))
    assert answer.status == "refused" and "the filter has this" in answer.text and len(server.requests) == 1


def test_a_server_that_does_not_answer_in_time_is_a_failure():
    over = threading.Event()
    with LocalJudge(lambda request: "yes" if over.wait(timeout=60) else "") as server:
        [answer] = EndpointJudge("local-judge-1", server.address, timeout=0.05, max_retries=1).ask(questions(1))
        over.set()
    assert answer.status == "failed" and answer.text.startswith("APITimeoutError") and len(server.requests) <= 2


def test_a_broken_server_is_given_up():
    with LocalJudge(lambda request: "yes") as server:
        server.fail_next(*[500] * 500)
        judge = EndpointJudge("local-judge-1", server.address, max_retries=0, workers=2)
        with pytest.raises(ValueError, match="20 requests in a row failed"):
            list(judge.ask(questions(100)))
        assert len(server.requests) < 30


def test_what_was_under_way_is_kept_when_asking_ends():
    unreadable = threading.Event()

    def asked():
        yield from questions(2)
        unreadable.set()
        raise OSError("no picture")

    answers = []
    server = LocalJudge(lambda request: "yes" if unreadable.wait(timeout=30) else "")
    with server, pytest.raises(OSError, match="no picture"):
        for answer in EndpointJudge("local-judge-1", server.address, workers=3).ask(asked()):
            answers.append((answer.key, answer.text))
    assert sorted(answers) == [("0", "yes"), ("1", "yes")]


def test_other_answers_are_kept_when_a_key_is_refused_on_the_way():
    with LocalJudge(lambda request: "yes") as server:
        server.fail_next(401)
        answers = []
        with pytest.raises(ValueError, match="refuses the key"):
            for answer in EndpointJudge("local-judge-1", server.address, workers=4).ask(questions(9)):
                answers.append(answer.status)
        assert answers == ["answered"] * (len(server.requests) - 1)


def test_retries_are_paced_too():
    with LocalJudge(lambda request: "yes") as server:
        server.fail_next(429, 429)
        judge = EndpointJudge("local-judge-1", server.address, requests_per_minute=600)
        began = time.monotonic()
        [answer] = judge.ask(questions(1))
    assert answer.status == "answered" and len(server.requests) == 3 and time.monotonic() - began >= 0.2


def test_further_fields_are_sent_and_told_and_ours_can_be_left_out():
    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 9, "chat_template_kwargs": {"a": False}}
    with LocalJudge(lambda request: "yes") as server:
        judge = EndpointJudge("local-judge-1", server.address, extra_body=extra)
        list(judge.ask(questions(1)))
    [sent] = server.requests
    assert sent["max_completion_tokens"] == 9 and sent["chat_template_kwargs"] == {"a": False} and sent["seed"] == 0
    assert "max_tokens" not in sent and "temperature" not in sent
    assert judge.about["extra_body"] == extra and judge.about["temperature"] is None and judge.max_tokens == 9
    for wrong in ({"model": "x"}, {"stream": True}, "text"):
        with pytest.raises(ValueError, match="extra_body must be fields other than"):
            EndpointJudge("local-judge-1", server.address, extra_body=wrong)


def test_a_server_of_ones_own_on_another_machine_needs_no_key():
    assert EndpointJudge("judge", "http://gpu-node:8000/v1").about["address"] == "http://gpu-node:8000/v1"


def test_wrong_key_and_unknown_model_end_at_once(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-of-mine")
    with LocalJudge(lambda request: "yes", key="another") as server:
        judge = EndpointJudge("local-judge-1", server.address, key_variable="JUDGE_KEY")
        with pytest.raises(ValueError, match="refuses the key") as refused:
            list(judge.ask(questions(3)))
        assert "sk-secret" not in str(refused.value) and "sk-secret" not in json.dumps(judge.about)
        assert server.headers[0]["authorization"] == "Bearer sk-secret-of-mine"
    with LocalJudge(lambda request: "yes") as server, pytest.raises(ValueError, match="knows no model 'gpt'"):
        list(EndpointJudge("gpt", server.address).ask(questions(1)))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://judge.example/v1", "set the environment variable OPENAI_API_KEY"),
        ("judge.example/v1", "must look like https://host/v1"),
        ("https://me:word@judge.example/v1", "without user and password"),
    ],
)
def test_unusable_addresses_are_refused(address, message):
    with pytest.raises(ValueError, match=message):
        EndpointJudge("judge", address)


def test_a_key_is_not_sent_in_clear_text(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(ValueError, match="in clear text") as refused:
        EndpointJudge("judge", "http://judge.example/v1")
    assert "sk-secret" not in str(refused.value)


def test_files_are_sent_as_they_are(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(buffer, "JPEG")
    (tmp_path / "picture.jpg").write_bytes(buffer.getvalue())
    question = Question(
        "a", [Message("system", "You judge."), Message("user", "What?", True)], [tmp_path / "picture.jpg"]
    )
    with LocalJudge(lambda request: "blue") as server:
        list(EndpointJudge("local-judge-1", server.address).ask([question]))
    system, user = server.requests[0]["messages"]
    assert system == {"role": "system", "content": "You judge."}
    assert user["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")


def test_a_model_of_transformers_judges_here(vlm):
    judge = TransformersJudge(str(vlm), max_tokens=4)
    ask = [Message("system", "Judge."), Message("user", "Is it red?", True)]
    pictures = {color: Image.new("RGB", (40, 32), color) for color in ("red", "blue")}
    answers = list(judge.ask(Question(color, ask, [picture, picture]) for color, picture in pictures.items()))
    assert [answer.key for answer in answers] == ["red", "blue"]
    for answer in answers:
        assert answer.status in ("cut off", "answered", "empty") and 0 < answer.usage["written"] <= 4
        assert answer.usage["read"] > 2 * 16  # both pictures were read
    assert answers == list(judge.ask(Question(color, ask, [picture, picture]) for color, picture in pictures.items()))
    assert judge.about["class"] == "LlavaForConditionalGeneration" and judge.about["decoding"] == "greedy"


def test_a_model_from_the_hub_comes_with_its_chat_template(vlm, hub, client, tmp_path):
    files = {file.name: file.read_bytes() for file in vlm.iterdir()}
    assert "chat_template.jinja" in files  # as transformers saves it
    commit = hub.commit_files("user/judge", files | {"tokenizer.model": b"of another kind", "old.bin": b"a pickle"})
    code = """
from pathlib import Path
from PIL import Image
from iomm_hf.evaluation.geneval_models import resolve_model
from iomm_hf.evaluation.judges import Question, TransformersJudge
from iomm_hf.evaluation.wording import Message
ask = [Message("user", "Is it red?", True)]
judge = TransformersJudge("user/judge", max_tokens=2)
[answer] = judge.ask([Question("a", ask, [Image.new("RGB", (32, 32), "red")])])
folder, commit = resolve_model("user/judge", None)
told = {"read": answer.usage["read"], "commit": commit, "about": judge.about, "files": sorted(file.name for file in folder.iterdir())}
Path(sys.argv[1]).write_text(json.dumps(told))
"""
    client(hub.environment(tmp_path / "home"), code, str(tmp_path / "told.json"))
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["commit"] == commit == told["about"]["revision"] and told["read"] > 16
    assert told["files"] == sorted({*files, "tokenizer.model"} - {".gitattributes"})
