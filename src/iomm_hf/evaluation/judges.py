"""Judges that look at pictures and answer in text: any OpenAI-compatible endpoint, vLLM included, or a transformers VLM here.

A judge is named, asked at temperature 0 unless told otherwise, and everything that it says is kept. What is no answer
counts as missing and never as a score: a refusal, an answer cut off at the limit, an empty one, an error after all
retries. Keys come from the environment alone and are sent to the address that was named and to no other; no message,
file or error holds one.
"""

import base64
import io
import ipaddress
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..modeling_iomm import hash_weight_files
from .geneval_models import load_picture, public_name, resolve_model
from .wording import Message


try:
    import openai

    is_openai_available = True
except ImportError:
    is_openai_available = False

MAX_FAILURES = 20  # requests in a row, each after all its retries, before the rest is not even tried


@dataclass(frozen=True)
class Question:
    """
    One request to a judge.

    Args:
        key (`str`): What it is about, under which the answer is kept.
        messages (`list[Message]`): What is said; pictures follow the text of those that have any.
        pictures (`list[Path | PIL.Image.Image]`): Files are sent as they are, other pictures as PNG.
    """

    key: str
    messages: Sequence[Message]
    pictures: Sequence[Path | Image.Image] = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """
    What came back.

    Args:
        key (`str`): The question's.
        status (`str`): "answered", "refused", "cut off" (at the limit of tokens), "empty" or "failed".
        text (`str`): As it was given; the error's for a failed request.
        model (`str`, *optional*): The model that says that it answered.
        usage (`dict`): Tokens read and written.
    """

    key: str
    status: str
    text: str
    model: str | None = None
    usage: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The answer as a line of `details-*.jsonl`."""
        return asdict(self)


class Judge(Protocol):
    """What both kinds of judge can do."""

    about: dict[str, Any]
    device: str | None  # `None` where it runs elsewhere

    def ask(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answers as they come, in any order, one for each question."""


class EndpointJudge:
    """
    A judge behind an OpenAI-compatible address.

    Args:
        model (`str`): The model's name there; name a dated version where there is one.
        base_url (`str`): Such as `https://api.openai.com/v1`, or `http://127.0.0.1:8000/v1` of a local vLLM.
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): The environment variable that holds the key. An address on
            this machine needs none, and one that begins with `http://` goes without.
        max_retries (`int`, *optional*, defaults to 6): For rate limits, server errors and cut connections, with growing pauses.
        timeout (`float`, *optional*, defaults to 120): Seconds for one request.
        max_tokens (`int`, *optional*, defaults to 2000): Of one answer.
        workers (`int`, *optional*, defaults to 8): Requests under way at a time.
        requests_per_minute (`int`, *optional*): No more than these are begun in a minute, those that are asked again
            included.
        seed (`int`, *optional*, defaults to 0): Sent along; not every server minds it.
        revision (`str`, *optional*): Commit of the model that is served there, as you know it: recorded, not checked.
        extra_body (`dict`, *optional*): Further fields of each request, such as vLLM's `chat_template_kwargs`. `None`
            leaves one of ours out: models that refuse `max_tokens` or `temperature` take `None` for these, and
            `max_completion_tokens`.

    Raises:
        ImportError: If openai is not installed.
        ValueError: If the address is none, needs a key that the environment lacks, or would get a key in clear text;
            if `extra_body` names the model, the messages or a stream.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        max_retries: int = 6,
        timeout: float = 120.0,
        max_tokens: int = 2000,
        workers: int = 8,
        requests_per_minute: int | None = None,
        seed: int = 0,
        revision: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ):
        if not is_openai_available:
            raise ImportError("Judging through an endpoint needs openai. Install it with `pip install iomm-hf[eval]`.")
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError(
                f"The judge's address must look like https://host/v1, without user and password, got {base_url!r}."
            )
        key = os.environ.get(key_variable)
        local = is_local(parts.hostname)
        if not key and not local and parts.scheme == "https":
            raise ValueError(
                f"{base_url} needs a key: set the environment variable {key_variable}, or name another one."
            )
        if key and parts.scheme == "http" and not local:
            raise ValueError(f"{base_url} would get the key of {key_variable} in clear text; use https, or unset it.")
        extra = {} if extra_body is None else extra_body
        if not isinstance(extra, Mapping) or {"model", "messages", "stream"} & set(extra):
            raise ValueError(f"extra_body must be fields other than model, messages and stream, got {extra!r}.")
        fields = {"temperature": 0, "seed": seed, "max_tokens": max_tokens, **extra}
        self.model, self.workers = model, workers
        self.max_tokens = fields.get("max_completion_tokens", max_tokens)
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.device: str | None = None
        pace = Pace(requests_per_minute)
        self.client = openai.OpenAI(
            api_key=key or "none",
            base_url=base_url,
            max_retries=max_retries,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [lambda request: pace.wait()]}
            ),  # retries too
        )
        self.about: dict[str, Any] = {
            "kind": "endpoint",
            "judge": model,
            "address": f"{parts.scheme}://{parts.netloc}{parts.path}",
            **{name: fields[name] for name in ("temperature", "seed", "max_tokens")},
            **({"extra_body": dict(extra)} if extra else {}),
            **({"revision_as_given": revision} if revision is not None else {}),
        }

    def ask(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """
        Answers as they come. Only as many questions are taken, and their pictures read, as are under way. What is
        under way when something is raised is answered first.

        Raises:
            ValueError: If the key or the model is refused, or 20 requests in a row fail.
        """
        waiting = iter(questions)
        failures = 0
        wrong: Exception | None = None
        running: set[Future[Answer]] = set()
        with ThreadPoolExecutor(self.workers) as pool:
            while True:
                try:
                    for question in islice(waiting, self.workers - len(running) if wrong is None else 0):
                        running.add(pool.submit(self.ask_one, question))
                except Exception as error:  # a picture that cannot be read; others are being answered
                    wrong = error
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for request in done:
                    try:
                        answer = request.result()
                    except Exception as error:
                        wrong = wrong or error
                        continue
                    yield answer
                    failures = failures + 1 if answer.status == "failed" else 0
                    if failures >= MAX_FAILURES and wrong is None:
                        wrong = ValueError(f"{failures} requests in a row failed; the last: {answer.text}")
        if wrong is not None:
            raise wrong

    def ask_one(self, question: Question) -> Answer:
        """One request with its retries."""
        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=[chat_message(message, question.pictures) for message in question.messages],  # type: ignore[misc]
                extra_body=self.fields,
            )
        except openai.AuthenticationError:
            raise ValueError(f"{self.about['address']} refuses the key that it was given.") from None
        except openai.NotFoundError as error:
            raise ValueError(f"{self.about['address']} knows no model {self.model!r}: {error.message}") from None
        except (openai.APIError, ValueError) as error:  # after all retries; ValueError: a body that is no JSON
            refused = isinstance(error, openai.BadRequestError) and error.code == "content_filter"
            return Answer(question.key, "refused" if refused else "failed", f"{type(error).__name__}: {error}"[:2000])
        return read_reply(question.key, reply)


def read_reply(key: str, reply: Any) -> Answer:
    """An answer out of a chat completion, or out of whatever a server sent in its place."""
    if (
        not isinstance(reply, openai.types.chat.ChatCompletion)
        or not reply.choices
        or reply.choices[0].message is None
    ):
        return Answer(key, "failed", f"no chat completion: {str(reply)[:2000]}")
    choice = reply.choices[0]
    text = choice.message.content or ""
    usage = {"read": reply.usage.prompt_tokens, "written": reply.usage.completion_tokens} if reply.usage else {}
    if choice.message.refusal or choice.finish_reason == "content_filter":
        return Answer(key, "refused", choice.message.refusal or text, reply.model, usage)
    if choice.finish_reason == "length":
        return Answer(key, "cut off", text, reply.model, usage)
    return Answer(key, "answered" if text.strip() else "empty", text, reply.model, usage)


class TransformersJudge:
    """
    A vision-language model that runs here, through transformers, in its own chat template, with greedy decoding.

    Args:
        model (`str`): Folder or Hub id of any model of `AutoModelForImageTextToText`. Code of its repository never runs.
        revision (`str`, *optional*): Commit of a Hub id. It is looked up either way.
        device (`str`, *optional*, defaults to `"cpu"`): Where it runs.
        dtype (`str`, *optional*, defaults to `"auto"`): As its files hold it.
        max_tokens (`int`, *optional*, defaults to 512): Of one answer.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        max_tokens: int = 512,
    ):
        folder, commit = resolve_model(model, revision)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = (
            AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
        )
        self.max_tokens = max_tokens
        self.device: str | None = device
        self.name = public_name(model)
        self.about = {
            "kind": "transformers",
            "judge": public_name(model),
            "revision": commit,
            "weights_sha256": hash_weight_files(folder),
            "class": type(self.model).__name__,
            "dtype": str(self.model.dtype),
            "decoding": "greedy",
            "max_tokens": max_tokens,
        }

    def ask(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """One after the other."""
        return map(self.ask_one, questions)

    @torch.no_grad()
    def ask_one(self, question: Question) -> Answer:
        """One answer."""
        chat = []
        for message in question.messages:
            content: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
            if message.has_pictures:
                content += [{"type": "image", "image": open_picture(picture)} for picture in question.pictures]
            chat.append({"role": message.role, "content": content})
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)
        read = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)[0, read:]
        text = self.processor.decode(output, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ended = len(output) < self.max_tokens or output[-1].item() in (ends if isinstance(ends, list) else [ends])
        status = "cut off" if not ended else "answered" if text.strip() else "empty"
        return Answer(question.key, status, text, self.name, {"read": read, "written": len(output)})


class Pace:
    """
    Lets through no more than a number of requests in any minute, from any thread.

    Example:

    ```python
    >>> Pace(None).wait()  # no limit
    ```
    """

    def __init__(self, per_minute: int | None):
        if per_minute is not None and per_minute < 1:
            raise ValueError(f"requests_per_minute must be at least 1, got {per_minute}.")
        self.interval = 0.0 if per_minute is None else 60 / per_minute
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self):
        """Returns when the next request may begin."""
        with self.lock:
            now = time.monotonic()
            pause = max(self.next - now, 0.0)
            self.next = max(self.next, now) + self.interval
        time.sleep(pause)


def is_local(host: str) -> bool:
    """Whether an address is on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def chat_message(message: Message, pictures: Sequence[Path | Image.Image]) -> dict[str, Any]:
    """A message as the protocol has it, pictures as data addresses after the text."""
    if not message.has_pictures:
        return {"role": message.role, "content": message.text}
    content: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
    for picture in pictures:
        content.append({"type": "image_url", "image_url": {"url": data_address(picture)}})
    return {"role": message.role, "content": content}


def data_address(picture: Path | Image.Image) -> str:
    """A picture as an address that holds it."""
    if isinstance(picture, Path):
        kind = "jpeg" if picture.suffix.lower() in (".jpg", ".jpeg") else picture.suffix.lower().lstrip(".")
        content = picture.read_bytes()
    else:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        kind, content = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def open_picture(picture: Path | Image.Image) -> Image.Image:
    return load_picture(picture) if isinstance(picture, Path) else picture
