"""Captions by a vision-language model behind any OpenAI-compatible server, from contact sheets.

Several events of one level and episode go into one question, each as a picture with frames at several times and of all
views, with the task, the events around it and what the motion says in words. Finished answers are kept in a journal by
the content of their question, so a run that was stopped goes on and asks nothing twice. Answers are checked; a wrong
one is asked for again with what is wrong about it, and in the end the event keeps its caption, with low confidence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from wallwm_jax.console import UserError
from wallwm_jax.events.caption import has_duration_clause
from wallwm_jax.events.captioners import Caption, with_captions
from wallwm_jax.events.captioners.contact_sheet import contact_sheet, sheet_frames
from wallwm_jax.events.captioners.templates import describe_motions, motion_of
from wallwm_jax.events.schema import LEVELS, Episode, Span

UNANSWERED = 0.1
"""Confidence of a caption that stayed because the model gave no valid one."""

_LONGEST = 200  # characters of a caption
_LEVELS = {
    "task": "the whole episode as one instruction, for example 'put all blocks into the drawer'",
    "subtask": "an intermediate goal, for example 'put the red block on the left into the drawer'",
    "action": "one primitive motion, for example 'grasp the drawer handle' or 'lift the red block'",
    "segment": "the finest piece of a motion, for example 'close the fingers on the handle' or 'try again to grasp it'",
}
_SYSTEM = """You name what a robot arm does. For each event you get a contact sheet: frames from its beginning to its \
end from left to right with their times in seconds, one row per camera. Say what happens, not what the pictures look \
like: imperative, lower case, in plain words, at most 20 of them, objects with colour and place where they are \
visible, no duration. Give one caption, two or three paraphrases that mean the same, and your confidence from 0 to 1.
Answer with JSON alone:
{"events": [{"event": 1, "caption": "...", "paraphrases": ["...", "..."], "confidence": 0.8}]}"""
_SCHEMA = {
    "type": "object",
    "properties": {
        "events": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "event": {"type": "integer"},
                    "caption": {"type": "string"},
                    "paraphrases": {"type": "array", "items": {"type": "string"}},
                    "confidence": {"type": "number"},
                },
                "required": ["event", "caption", "paraphrases", "confidence"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["events"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class VlmOptions:
    """How to ask.

    Attributes:
      endpoint: address of the server up to and with its version, "http://localhost:8000/v1".
      model: its name there.
      key: sent as bearer token; "" for none. Never logged.
      levels: levels to caption.
      events: in one question, at most.
      columns: moments in a contact sheet. height: pixels of a frame in it.
      concurrency: questions on their way at a time.
      attempts: how often a question is sent before the server counts as gone. backoff_s: before the second attempt,
        then doubled each time; where the server says how long to wait, that.
      corrections: how often a wrong answer is asked for again.
      timeout_s: for one answer.
      answer_tokens: an answer may have per event.
      prices: of a million tokens in and out. max_cost, max_tokens: of all answers in the journal; 0 is no limit.
    """

    endpoint: str
    model: str
    key: str = field(default="", repr=False)
    levels: tuple[str, ...] = ("subtask", "action", "segment")
    events: int = 4
    columns: int = 6
    height: int = 160
    concurrency: int = 8
    attempts: int = 6
    backoff_s: float = 1.0
    corrections: int = 2
    timeout_s: float = 120.0
    answer_tokens: int = 250
    prices: tuple[float, float] = (0.0, 0.0)
    max_cost: float = 0.0
    max_tokens: int = 0


@dataclass
class VlmSummary:
    """What was done. `asked`: requests; `retried`: of them after a fault of the server; `corrected`: after a wrong
    answer. Events: `captioned`, of them `resumed` from the journal; `invalid` had no valid answer; `left` were not
    asked, for the limit. `tokens`: in and out, the journal's included; `cost`: their price."""

    asked: int = 0
    retried: int = 0
    corrected: int = 0
    captioned: int = 0
    resumed: int = 0
    invalid: int = 0
    left: int = 0
    tokens: tuple[int, int] = (0, 0)
    cost: float = 0.0


@dataclass(frozen=True)
class Question:
    """Consecutive events of one level of an episode; `text` is what is said beside the picture of each."""

    episode: Episode
    level: str
    first: int
    spans: tuple[Span, ...]
    intro: str
    texts: tuple[str, ...]

    def key(self, options: VlmOptions) -> str:
        """Changes with anything that the model would see, and with the model."""
        digest = hashlib.sha256(json.dumps([options.model, _SYSTEM, options.height, self.intro, self.texts]).encode())
        for span in self.spans:
            for frame in sheet_frames(self.episode, span, options.columns):
                digest.update(hashlib.sha256(frame).digest())
        return digest.hexdigest()[:32]

    def messages(self, options: VlmOptions) -> list[dict[str, Any]]:
        """As `/chat/completions` takes them, the pictures as data URLs."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.intro}]
        for span, text in zip(self.spans, self.texts):
            sheet = contact_sheet(self.episode, span, columns=options.columns, height=options.height)
            url = f"data:image/jpeg;base64,{base64.b64encode(sheet).decode()}"
            content += [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]

    def tokens(self, options: VlmOptions) -> tuple[int, int]:
        """A generous guess of what the question costs, in and out: 3 characters or 500 pixels a token."""
        height, width = self.episode.size
        pixels = len(self.episode.frames) * options.columns * options.height**2 * width / height
        text = len(_SYSTEM) + len(self.intro) + sum(map(len, self.texts))
        return math.ceil(text / 3 + len(self.spans) * pixels / 500), len(self.spans) * options.answer_tokens


class VlmCaptioner:
    """Asks a server; see `Captioner`. `summary` counts what was done."""

    def __init__(self, options: VlmOptions, journal: str | Path) -> None:
        """Opens the journal, made if absent.

        Raises:
          UserError: no endpoint, no model, or a journal that cannot be read.
        """
        if not options.endpoint.startswith(("http://", "https://")) or not options.model:
            raise UserError("say whom to ask: an endpoint such as http://localhost:8000/v1, and the model's name there")
        self.options, self.summary = options, VlmSummary()
        self._journal = Journal(journal)
        self._ledger = Ledger(options, self._journal.tokens)
        self._counts, self._stop = threading.Lock(), threading.Event()

    def caption(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """See `Captioner`.

        Raises:
          UserError: the server refuses the key, the model or the question, or does not answer any more. What was
            answered is in the journal.
        """
        headers = {"Authorization": f"Bearer {self.options.key}"} if self.options.key else {}
        waiting: deque[tuple[Episode, list[tuple[Question, Future[list[Caption | None] | None]]]]] = deque()
        pool = ThreadPoolExecutor(self.options.concurrency)
        self._stop.clear()
        with httpx.Client(headers=headers, timeout=self.options.timeout_s) as client:
            try:
                for episode in episodes:
                    asked = [(one, pool.submit(self._answer, client, one)) for one in questions(episode, self.options)]
                    waiting.append((episode, asked))
                    while sum(len(row) for _, row in waiting) > 4 * self.options.concurrency:
                        yield self._finished(*waiting.popleft())
                while waiting:
                    yield self._finished(*waiting.popleft())
            finally:
                self._stop.set()
                self._ledger.close()
                pool.shutdown(wait=True, cancel_futures=True)

    def _finished(
        self, episode: Episode, asked: Sequence[tuple[Question, Future[list[Caption | None] | None]]]
    ) -> Episode:
        said: dict[tuple[str, int], Caption] = {}
        for question, answer in asked:
            captions = answer.result()
            if captions is None:
                self.summary.left += len(question.spans)
                continue
            for index, (span, caption) in enumerate(zip(question.spans, captions), question.first):
                self.summary.captioned += caption is not None
                self.summary.invalid += caption is None
                kept = Caption(span.caption, span.paraphrases, UNANSWERED, span.provenance)
                said[question.level, index] = caption or kept
        self.summary.tokens, self.summary.cost = self._ledger.spent, self._ledger.cost(*self._ledger.spent)
        return replace(episode, spans=with_captions(episode.spans, said))

    def _answer(self, client: httpx.Client, question: Question) -> list[Caption | None] | None:
        """A caption per event, None for one without a valid one; None instead of a list where the limit is reached."""
        key = question.key(self.options)
        known = self._journal.find(key)
        if known is not None:
            with self._counts:
                self.summary.resumed += sum(one is not None for one in known)
            return self._captions(known)
        messages = question.messages(self.options)
        found: dict[int, dict[str, Any]] = {}
        guess = question.tokens(self.options)
        for turn in range(1 + self.options.corrections):
            promised = self._ledger.reserve(guess)
            if promised is None:
                return None
            used = None
            try:
                text, used = self._post(client, messages, guess)
            finally:
                self._ledger.settle(promised, guess, used)
            self._journal.spend(key, used)
            valid, faults = check_answer(text, len(question.spans))
            found = {**valid, **found}
            if len(found) == len(question.spans):
                break
            missing = [place + 1 for place in range(len(question.spans)) if place not in found]
            with self._counts:
                self.summary.corrected += turn < self.options.corrections
            messages = [
                *messages,
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"That is not valid: {'; '.join(faults)}. Answer again, events {missing}."},
            ]
        answer = [found.get(place) for place in range(len(question.spans))]
        self._journal.finish(key, answer)
        return self._captions(answer)

    def _captions(self, rows: Sequence[dict[str, Any] | None]) -> list[Caption | None]:
        provenance = f"vlm:{self.options.model}"
        return [
            None
            if row is None
            else Caption(
                row["caption"].strip(),
                tuple(text.strip() for text in row["paraphrases"]),
                float(row["confidence"]),
                provenance,
            )
            for row in rows
        ]

    def _post(
        self, client: httpx.Client, messages: list[dict[str, Any]], guess: tuple[int, int]
    ) -> tuple[str, tuple[int, int]]:
        """The answer's text and its tokens, after as many attempts as it takes."""
        body = {
            "model": self.options.model,
            "messages": messages,
            "max_completion_tokens": guess[1],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "events", "strict": True, "schema": _SCHEMA},
            },
        }
        url, fault = self.options.endpoint.rstrip("/") + "/chat/completions", ""
        for attempt in range(self.options.attempts):
            if self._stop.is_set():
                break
            with self._counts:
                self.summary.asked += 1
                self.summary.retried += attempt > 0
            wait = self.options.backoff_s * 2**attempt * random.uniform(0.75, 1.25)
            try:
                response = client.post(url, json=body)
                if response.status_code == 200:
                    content = response.json()
                    usage = content.get("usage") or {}
                    used = usage.get("prompt_tokens", guess[0]), usage.get("completion_tokens", guess[1])
                    return (content["choices"][0]["message"]["content"] or "").strip(), used
                fault = f"status {response.status_code}: {self._told(response)}"
                if response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                    self._stop.set()
                    raise UserError(f"{url} refuses the question with {fault}")
                wait = _retry_after(response, wait)
            except httpx.TimeoutException:
                fault = f"no answer within {self.options.timeout_s:g} s"
            except httpx.TransportError as error:
                fault = f"no connection ({error})"
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                fault = f"an answer that is none ({error!r})"
            if attempt + 1 < self.options.attempts:
                self._stop.wait(wait)
        self._stop.set()
        raise UserError(
            f"{url} does not answer, after {self.options.attempts} attempts: {fault}; what was answered is in the "
            f"journal {str(self._journal.path)!r}: run again when it does"
        )

    def _told(self, response: httpx.Response) -> str:
        """What the server says, in one line and without the key."""
        text = " ".join(response.text.split())[:300]
        return text.replace(self.options.key, "***") if self.options.key else text


class Ledger:
    """Tokens that were used and are promised; refuses a question that could exceed a limit."""

    def __init__(self, options: VlmOptions, spent: tuple[int, int]) -> None:
        """`spent`: tokens in and out of earlier runs."""
        self._options, self.spent = options, spent
        self._promised: list[tuple[int, int]] = []
        self._scale, self._closed = 1.0, False
        self._changed = threading.Condition()

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """Price of tokens."""
        return (tokens_in * self._options.prices[0] + tokens_out * self._options.prices[1]) / 1e6

    def reserve(self, guess: tuple[int, int]) -> tuple[int, int] | None:
        """Promises the tokens of a question, in and out; None where they could exceed a limit. Waits while earlier
        promises may yet turn out smaller. Where a server counts more tokens than guessed, later promises grow alike.
        """
        with self._changed:
            while not self._closed:
                promise = math.ceil(guess[0] * self._scale), guess[1]
                tokens_in, tokens_out = map(sum, zip(self.spent, promise, *self._promised))
                cost, tokens = self._options.max_cost, self._options.max_tokens
                if not (cost and self.cost(tokens_in, tokens_out) > cost) and not (
                    tokens and tokens_in + tokens_out > tokens
                ):
                    self._promised.append(promise)
                    return promise
                if self._promised:
                    self._changed.wait()
                else:
                    self._closed = True
            return None

    def settle(self, promise: tuple[int, int], guess: tuple[int, int], used: tuple[int, int] | None) -> None:
        """Replaces a promise by what was used; None where nothing was."""
        with self._changed:
            self._promised.remove(promise)
            if used is not None:
                self.spent = self.spent[0] + used[0], self.spent[1] + used[1]
                self._scale = max(self._scale, used[0] / guess[0])
            self._changed.notify_all()

    def close(self) -> None:
        """Refuses from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Journal:
    """Finished answers, a JSON line each: {"key", "answer"}, and {"key", "tokens"} for every reply that was paid."""

    def __init__(self, path: str | Path) -> None:
        """Reads what is there; a last line that was cut off is left out. Raises `UserError` for another file."""
        self.path = Path(path).expanduser()
        self._answers: dict[str, list[dict[str, Any] | None]] = {}
        self.tokens, self._lock = (0, 0), threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.is_file() else ""
        whole, _, cut = text.rpartition("\n")
        if cut:
            with open(self.path, "r+b") as file:
                file.truncate(len(f"{whole}\n".encode()) if whole else 0)
        for number, line in enumerate(whole.split("\n") if whole else [], 1):
            try:
                row = json.loads(line)
                if "answer" in row:
                    self._answers[row["key"]] = row["answer"]
                else:
                    self.tokens = self.tokens[0] + row["tokens"][0], self.tokens[1] + row["tokens"][1]
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"line {number} of {str(self.path)!r} is not of a journal ({error!r})") from None

    def find(self, key: str) -> list[dict[str, Any] | None] | None:
        """The answer to a question, if it is finished."""
        return self._answers.get(key)

    def finish(self, key: str, answer: list[dict[str, Any] | None]) -> None:
        """Keeps an answer."""
        self._answers[key] = answer
        self._write({"key": key, "answer": answer})

    def spend(self, key: str, tokens: tuple[int, int]) -> None:
        """Keeps what a reply cost, valid or not."""
        self._write({"key": key, "tokens": list(tokens)})

    def _write(self, row: dict[str, Any]) -> None:
        with self._lock, open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def questions(episode: Episode, options: VlmOptions) -> Iterator[Question]:
    """The questions about an episode, level by level in time order."""
    for level in (level for level in LEVELS if level in options.levels and level in episode.spans):
        spans = tuple(episode.spans[level])
        for first in range(0, len(spans), options.events):
            chosen = spans[first : first + options.events]
            intro = (
                f"The robot's task: {episode.instruction}\n"
                f"Name {len(chosen)} consecutive event{'s' if len(chosen) > 1 else ''}, each as {_LEVELS[level]}."
            )
            texts = tuple(
                f"Event {number}, {span.length / episode.clock_hz:.1f} s. The hand, measured: "
                f"{describe_motions([motion_of(episode, span)]).caption}."
                for number, span in enumerate(chosen, 1)
            )
            yield Question(episode, level, first, chosen, intro, texts)


def check_answer(text: str, count: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The valid events of an answer by their place, counted from 0, and what is wrong with the rest, in words."""
    stripped = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        events = json.loads(stripped)["events"]
        rows = {row["event"]: row for row in events}
    except (ValueError, LookupError, TypeError) as error:
        return {}, [f"not JSON of the form that was asked for ({error})"]
    valid, faults = {}, []
    for place in range(count):
        fault = _fault(rows.get(place + 1))
        if fault:
            faults.append(f"event {place + 1} {fault}")
        else:
            valid[place] = {name: rows[place + 1][name] for name in ("caption", "paraphrases", "confidence")}
    return valid, faults


def _fault(row: Any) -> str:
    if not isinstance(row, dict):
        return "is missing"
    caption, paraphrases, confidence = (row.get(name) for name in ("caption", "paraphrases", "confidence"))
    if not isinstance(paraphrases, list) or not all(isinstance(text, str) for text in (caption, *paraphrases)):
        return "needs a text as caption and a list of texts as paraphrases"
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        return f"has the confidence {confidence!r}, which is no number from 0 to 1"
    for text in (caption, *paraphrases):
        if not text.strip() or "\n" in text or len(text) > _LONGEST:
            return f"has a caption that is empty, of several lines or longer than {_LONGEST} characters"
        if has_duration_clause(text):
            return "names a duration"
    return ""


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    try:
        return min(60.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return otherwise
