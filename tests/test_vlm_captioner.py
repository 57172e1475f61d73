"""The captioner that asks a vision-language model, against a server on this machine that misbehaves as asked."""

import base64
import contextlib
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.events.captioners.contact_sheet import contact_sheet, moments
from wallwm_jax.events.captioners.vlm import UNANSWERED, VlmCaptioner, VlmOptions, questions

EPISODES = [synthetic_episode(seed, steps=40, size=32) for seed in range(2)]
USED = {"prompt_tokens": 900, "completion_tokens": 100}


def good(count):
    rows = [
        {"event": n + 1, "caption": f"event {n}", "paraphrases": [f"number {n}"], "confidence": 0.75}
        for n in range(count)
    ]
    return json.dumps({"events": rows})


class StandIn:
    """A chat server. `behave(number, body)` says what request `number` gets: text of the answer, (status, headers) or
    seconds to sleep."""

    def __init__(self, behave):
        self.bodies, self.headers, self.most, self._now, self._lock = [], [], 0, 0, threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stand_in._lock:
                    number = len(stand_in.bodies)
                    stand_in.bodies.append(body)
                    stand_in.headers.append(dict(self.headers))
                    stand_in._now += 1
                    stand_in.most = max(stand_in.most, stand_in._now)
                done = behave(number, body)
                if isinstance(done, float):
                    time.sleep(done)
                    done = good(events(body))
                with stand_in._lock:
                    stand_in._now -= 1
                status, headers = done if isinstance(done, tuple) else (200, {})
                reply = json.dumps({"choices": [{"message": {"content": done}}], "usage": USED}).encode()
                if status != 200:
                    reply = f"no: {self.headers.get('authorization')}".encode()
                with contextlib.suppress(OSError):  # the client may have hung up
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def events(body):
    """How many events a request asks for."""
    return sum(part["type"] == "image_url" for part in body["messages"][1]["content"])


def answering(_, body):
    return good(events(body))


def ask(server, tmp_path, episodes=EPISODES, **options):
    small = {"columns": 2, "height": 16}  # pictures, so that drawing them takes no time
    options = {
        "levels": ("subtask", "action"),
        **small,
        "backoff_s": 0.001,
        "timeout_s": 10.0,
        "concurrency": 4,
    } | options
    captioner = VlmCaptioner(VlmOptions(server.endpoint, "tiny", "secret-key", **options), tmp_path / "journal.jsonl")
    return list(captioner.caption(episodes)), captioner.summary


def shape(episode):
    return {level: [(s.start, s.end, s.parent, s.verb) for s in episode.spans[level]] for level in episode.spans}


def count(episodes, levels=("subtask", "action")):
    return sum(len(episode.spans[level]) for episode in episodes for level in levels)


def test_every_event_is_named_once_and_no_span_moves(tmp_path):
    with StandIn(answering) as server:
        said, summary = ask(server, tmp_path)
    assert [shape(episode) for episode in said] == [shape(episode) for episode in EPISODES]
    for new, old in zip(said, EPISODES):
        for level in ("subtask", "action"):
            for index, span in enumerate(new.spans[level]):
                assert (span.caption, span.paraphrases) == (f"event {index % 4}", (f"number {index % 4}",))
                assert (span.confidence, span.provenance) == (0.75, "vlm:tiny")
        assert new.spans["segment"] == tuple(old.spans["segment"])
    asked = [
        one
        for episode in EPISODES
        for one in questions(episode, VlmOptions("http://x", "m", levels=("subtask", "action")))
    ]
    assert summary.asked == len(server.bodies) == len(asked) < count(EPISODES)  # several events in one question
    assert summary.captioned == count(EPISODES) and summary.invalid == summary.left == 0
    assert summary.tokens == (900 * len(asked), 100 * len(asked))


def test_a_question_holds_the_task_the_motion_and_a_picture_per_event(tmp_path):
    with StandIn(answering) as server:
        ask(server, tmp_path, EPISODES[:1], levels=("action",), concurrency=1, events=3, columns=6, height=160)
    body = server.bodies[0]
    assert body["model"] == "tiny" and body["response_format"]["type"] == "json_schema"
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    _, user = body["messages"]
    texts = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert "task: sort the squares by colour" in texts[0] and "3 consecutive events" in texts[0]
    assert [text.split(",")[0] for text in texts[1:]] == ["Event 1", "Event 2", "Event 3"]
    assert re.search(r"The hand, measured: (move|lower|raise|close|hold|grasp)", texts[1])
    head, _, data = user["content"][2]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    columns = len(moments(EPISODES[0], EPISODES[0].spans["action"][0], 6))
    assert picture.size == (163 * columns - 3, 20 + 2 * (16 + 160 + 3))


def test_questions_run_side_by_side_within_the_limit(tmp_path):
    with StandIn(lambda *_: 0.05) as server:
        ask(server, tmp_path, events=1, concurrency=4)
    assert server.most == 4


def test_a_busy_or_broken_server_is_asked_again(tmp_path):
    faults = {0: (429, {"retry-after": "0.01"}), 1: (500, {}), 2: (503, {}), 4: None, 6: ["not text"]}
    with StandIn(lambda number, body: faults[number] if faults.get(number) else answering(number, body)) as server:
        said, summary = ask(server, tmp_path, concurrency=1, attempts=4)
    assert summary.captioned == count(EPISODES) and summary.invalid == 0
    assert summary.retried == 4 and summary.asked == len(server.bodies)
    assert {span.provenance for span in said[0].spans["action"]} == {"vlm:tiny"}


def test_a_server_that_hangs_is_asked_again_after_the_timeout(tmp_path):
    with StandIn(lambda number, body: 0.6 if number == 0 else answering(number, body)) as server:
        _, summary = ask(server, tmp_path, EPISODES[:1], timeout_s=0.2, concurrency=1)
    assert summary.retried == 1 and summary.captioned == count(EPISODES[:1])


def test_a_server_that_is_gone_is_an_error_and_the_key_is_never_shown(tmp_path):
    with (
        StandIn(lambda *_: (500, {})) as server,
        pytest.raises(UserError, match="does not answer, after 2 attempts: status 500") as gone,
    ):
        ask(server, tmp_path, attempts=2)
    with (
        StandIn(lambda *_: (401, {})) as server,
        pytest.raises(UserError, match="refuses the question with status 401") as refused,
    ):
        ask(server, tmp_path)
    assert len(server.bodies) <= 4  # a refusal is not tried again, and what waits is not sent
    for error in (gone, refused):
        assert "secret-key" not in str(error.value) and "Bearer ***" in str(error.value)
    with pytest.raises(UserError, match="no connection"):
        ask(server, tmp_path, attempts=2)
    assert "secret-key" not in repr(VlmOptions("http://x", "m", "secret-key"))


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("I see a robot.", "not JSON"),
        ('{"events": [{"event": 1}]}', "needs a text as caption"),
        (good(4).replace("0.75", "75"), "confidence 75"),
        (good(4).replace("event 0", "lift it, takes 2.0 s"), "event 1 names a duration"),
        (good(4).replace("number 0", " "), "event 1 has a caption that is empty"),
        (good(3), "event 4 is missing"),
    ],
)
def test_a_wrong_answer_is_asked_for_again_with_what_is_wrong(tmp_path, wrong, fault):
    episode = EPISODES[0]
    with StandIn(lambda number, body: wrong if number == 0 else answering(number, body)) as server:
        (said,), summary = ask(server, tmp_path, [episode], levels=("action",), concurrency=1)
    first, again = server.bodies[0]["messages"], server.bodies[1]["messages"]
    assert again[:2] == first and again[2] == {"role": "assistant", "content": wrong}
    assert fault in again[3]["content"]
    assert (summary.corrected, summary.invalid) == (1, 0)
    assert {span.provenance for span in said.spans["action"]} == {"vlm:tiny"}


def test_what_is_never_valid_keeps_its_caption_with_low_confidence(tmp_path):
    episode = EPISODES[0]

    def behave(_, body):
        return good(events(body)).replace('"event": 2', '"event": 99')

    with StandIn(behave) as server:
        (said,), summary = ask(server, tmp_path, [episode], levels=("action",), events=4, corrections=2)
    actions, before = said.spans["action"], episode.spans["action"]
    kept = [index for index in range(len(actions)) if index % 4 == 1]
    assert summary.invalid == len(kept) and summary.captioned == len(actions) - len(kept)
    for index in kept:
        assert (actions[index].caption, actions[index].confidence) == (before[index].caption, UNANSWERED)
        assert actions[index].provenance == ""
    assert all(actions[index].provenance == "vlm:tiny" for index in range(len(actions)) if index not in kept)
    assert summary.asked == 3 * len(server.bodies) / 3 and len(server.bodies) == 3 * -(-len(actions) // 4)


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path):
    def dying(number, body):
        return answering(number, body) if number < 3 else (403, {})

    with StandIn(dying) as server, pytest.raises(UserError, match="403"):
        ask(server, tmp_path, concurrency=1)
    journal = tmp_path / "journal.jsonl"
    with open(journal, "a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    with StandIn(answering) as server:
        said, summary = ask(server, tmp_path, concurrency=1)
        again, rerun = ask(server, tmp_path)
    options = VlmOptions("http://x", "tiny", levels=("subtask", "action"))
    total = sum(len(list(questions(episode, options))) for episode in EPISODES)
    assert len(server.bodies) == total - 3 and rerun.asked == 0
    assert rerun.resumed == rerun.captioned == summary.captioned == count(EPISODES) > summary.resumed > 0
    assert [episode.spans for episode in said] == [episode.spans for episode in again]
    assert rerun.tokens == summary.tokens == (900 * total, 100 * total)  # the journal knows what was paid before


def test_another_picture_or_model_is_another_question():
    options = VlmOptions("http://x", "tiny")
    one, other = (next(iter(questions(episode, options))) for episode in EPISODES)
    assert one.key(options) == next(iter(questions(EPISODES[0], options))).key(options)
    assert len({one.key(options), other.key(options), one.key(VlmOptions("http://x", "big"))}) == 3


@pytest.mark.parametrize("limit", [{"max_cost": 0.012}, {"max_tokens": 6000}])
def test_the_limit_is_never_exceeded_and_what_is_left_is_said(tmp_path, limit):
    options = {"prices": (2.0, 2.0), "answer_tokens": 100, "events": 1, **limit}
    with StandIn(answering) as server:
        said, summary = ask(server, tmp_path, **options)
        asked = len(server.bodies)
        assert asked >= 2 and 1000 * asked <= 6000  # a thousand tokens a reply
        assert summary.left == count(EPISODES) - asked > 0 and summary.captioned == asked
        assert summary.cost == pytest.approx(0.002 * asked)
        unasked = [
            s for episode in said for level in ("subtask", "action") for s in episode.spans[level] if not s.provenance
        ]
        assert len(unasked) == summary.left and {span.confidence for span in unasked} == {None}
        _, more = ask(server, tmp_path, **options | {name: 3 * value for name, value in limit.items()})
        assert more.captioned > summary.captioned == more.resumed and len(server.bodies) <= 18


def test_a_journal_of_something_else_is_refused(tmp_path):
    (tmp_path / "journal.jsonl").write_text("hello\n")
    with pytest.raises(UserError, match=r"line 1 of .*journal.jsonl' is not of a journal"):
        VlmCaptioner(VlmOptions("http://x", "m"), tmp_path / "journal.jsonl")
    with pytest.raises(UserError, match="say whom to ask"):
        VlmCaptioner(VlmOptions("localhost:80", "m"), tmp_path / "other.jsonl")


def test_a_contact_sheet_shows_all_views_from_the_first_moment_to_the_last():
    episode = EPISODES[0]
    span = episode.spans["subtask"][1]
    chosen = moments(episode, span, 6)
    assert (chosen[0], chosen[-1]) == (span.start // 2, span.end // 2) and len(chosen) == 6
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(episode, span, height=64))))
    for row, view in enumerate(episode.frames):
        for column in (0, 5):
            top, left = 20 + row * 83 + 16, column * 67
            jpeg = episode.frames[view][chosen[column]]
            frame = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
            shown = sheet[top : top + 64, left : left + 64]
            assert np.abs(shown.astype(int) - frame).mean() < 6
