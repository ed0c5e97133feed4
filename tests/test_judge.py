"""The judge: strict parsing, an endpoint that misbehaves, a cache that holds no text and no key."""

import copy
import json
import math
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from icu_nb.errors import InputError
from icu_nb.evals.judge import (
    _INSTRUCTIONS,
    Endpoint,
    LocalJudge,
    _judge_message,
    _JudgeError,
    _parse_score,
    judge_continuations,
)
from icu_nb.models.tiny import tiny_gpt_neo

KEY = "sk-never-to-be-seen"
TEXTS = [["Ann lives in"] * 4, [f"Leeds, number {i}" for i in range(4)], ["York", "Bath", "Hull", "Ripon"]]
LONG = 30.0  # seconds; a test never waits for them


class Server(ThreadingHTTPServer):
    """Answers from a list of scripts, one per request; the last one again and again."""

    daemon_threads = True

    def __init__(self, *scripts):
        self.scripts, self.asked, self.keys, self.released = list(scripts), [], [], threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        server.keys.append(self.headers["Authorization"])
        script = server.scripts.pop(0) if len(server.scripts) > 1 else server.scripts[0]
        if script == "slow":
            server.released.wait(LONG)
            return
        status, kind, body = script
        body = body.replace("<key>", KEY).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After-Ms", "1")  # else the client waits for a second
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def completion(answer, usage=True, **changes):
    content = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        ],
    }
    content |= {"usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}} if usage else {}
    return 200, "application/json", json.dumps(content | changes)


GOOD = completion("It is fluent.\nFinal score: 8")
ERROR = 500, "application/json", json.dumps({"error": {"message": "your key is <key>"}})
REFUSED = (
    401,
    "application/json",
    json.dumps({"error": {"message": "Incorrect API key provided: <key>", "code": "invalid_api_key"}}),
)


@pytest.fixture
def serve(monkeypatch, cache):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(*scripts, **options):
        servers.append(Server(*scripts))
        return servers[-1], Endpoint(
            "stub", servers[-1].url, key="JUDGE_KEY", **{"max_retries": 0, **options}
        )

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


def kept(cache):
    return [path for path in (cache / "cache").rglob("*") if path.is_file()]


# ---- parsing ----


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Final score: 7", 7),
        ("reasons\n\nFinal score: 0\n", 0),
        ("**Final score: 10**", 10),
        ("**Final score:** 3", 3),
        ("final score: 4/10", 4),
        ("Final score: 5 / 10.", 5),
        ("He wrote `Final score: 10`.\nFinal score: 2", 2),
    ],
)
def test_a_score_in_the_right_form(answer, score):
    assert _parse_score(answer) == score


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "7",
        "Score: 7",
        "Finale score: 7",
        "Final score 7",
        "Final score: 11",
        "Final score: -1",
        "Final score: 7.5",
        "Final score: seven",
        "Final score: 7 or 8",
        "Final score: 07",
        "Final score: 7/5",
        "Final score:",
        "Final score: X",
        "Final score: 7\nFinal score: 7",
        "The final score: 7",
    ],
)
def test_anything_else_is_no_score(answer):
    assert _parse_score(answer) is None


def test_the_prompt_asks_for_what_the_parser_reads():
    asked = _INSTRUCTIONS.splitlines()[-1]
    assert _parse_score(asked) is None and _parse_score(asked.replace("X", "7")) == 7


# ---- an endpoint that behaves ----


def test_scores_tokens_and_what_is_sent(serve):
    server, ask = serve(GOOD)
    table = judge_continuations(ask, *TEXTS)
    assert table["score"].tolist() == [8] * 4 and not table["cached"].any()
    assert table["tokens_read"].sum() == 400 and table["tokens_written"].sum() == 28
    first = server.asked[0]
    assert first["model"] == "stub" and first["temperature"] == 0
    assert json.loads(first["messages"][1]["content"]) == {
        "prefix": "Ann lives in",
        "reference": "Leeds, number 0",
        "continuation": "York",
    }
    assert {*server.keys} == {f"Bearer {KEY}"}


def test_nothing_is_asked_twice(serve):
    server, ask = serve(GOOD)
    first, again = judge_continuations(ask, *TEXTS), judge_continuations(ask, *TEXTS)
    assert len(server.asked) == 4
    assert again["score"].equals(first["score"]) and again["cached"].all() and again["tokens_read"].sum() == 0
    assert judge_continuations(ask, *[column * 2 for column in TEXTS])["cached"].all()


@pytest.mark.parametrize(
    "change",
    [lambda t: [["Bob lives in"], *t[1:]], lambda t: [t[0], ["Leeds"], t[2]], lambda t: [*t[:2], ["Hull"]]],
)
def test_another_text_is_another_question(serve, change):
    server, ask = serve(GOOD)
    texts = [column[:1] for column in TEXTS]
    judge_continuations(ask, *texts)
    assert not judge_continuations(ask, *change(texts))["cached"].any() and len(server.asked) == 2


def test_another_judge_is_another_question(serve):
    server, ask = serve(GOOD)
    judge_continuations(ask, *TEXTS)
    for other in (
        Endpoint("larger", server.url, key="JUDGE_KEY"),
        Endpoint("stub", server.url, key="JUDGE_KEY", request={"temperature": 1}),
    ):
        assert not judge_continuations(other, *TEXTS)["cached"].any()


def test_neither_texts_nor_key_are_stored(serve, cache, capfd):
    _, ask = serve(GOOD)
    table = judge_continuations(ask, *TEXTS)
    assert len(kept(cache)) == 4
    everything = (
        "".join(path.name + path.read_text() for path in kept(cache))
        + repr(ask)
        + str(vars(ask))
        + table.to_string()
        + "".join(capfd.readouterr())
    )
    assert not any(word in everything for word in (KEY, "Ann", "Leeds", "York"))


# ---- one that does not ----


@pytest.mark.parametrize(
    "script",
    [
        completion(""),
        completion(None),
        completion("I would say eight."),
        completion("Finale score: 8"),
        completion("x", choices=[]),
        completion("Final score: 8\nFinal score: 9"),
    ],
)
def test_an_answer_without_a_score_is_missing_and_asked_again(serve, cache, script):
    server, ask = serve(script, GOOD)
    texts = [column[:1] for column in TEXTS]
    table = judge_continuations(ask, *texts)
    assert math.isnan(table["score"][0]) and table["tokens_read"][0] == 100 and not kept(cache)
    assert judge_continuations(ask, *texts)["score"].tolist() == [8] and len(server.asked) == 2


def test_usage_may_be_missing(serve):
    assert (
        judge_continuations(serve(completion("Final score: 1", usage=False))[1], *TEXTS)[
            ["score", "tokens_read"]
        ]
        .to_numpy()
        .tolist()
        == [[1, 0]] * 4
    )


@pytest.mark.parametrize(
    "script, problem",
    [
        (ERROR, "InternalServerError 500"),
        (REFUSED, "AuthenticationError 401"),
        ((404, "text/html", "<html><key></html>"), "NotFoundError 404"),
        ((200, "text/html", "<html>Please log in, <key></html>"), "Error"),
        ((200, "application/json", '{"choices": [{"mess'), "Error"),
        ((200, "application/json", "[]"), "Error"),
        ("slow", "APITimeoutError"),
    ],
)
def test_finished_scores_survive_a_failure(serve, cache, script, problem):
    server, ask = serve(GOOD, GOOD, script, timeout=0.3)
    with pytest.raises(
        _JudgeError, match=f"text 2 of 4.*{problem}.*2 scores are in the cache.*again"
    ) as caught:
        judge_continuations(ask, *TEXTS)
    assert len(kept(cache)) == 2
    assert KEY not in "".join(traceback.format_exception(caught.value))
    chain, seen = caught.value, []
    while chain is not None:  # whoever logs the chain finds no key either
        seen, chain = [*seen, str(chain), repr(getattr(chain, "body", ""))], chain.__context__
    assert KEY not in "".join(seen)
    server.scripts[:] = [GOOD]
    table = judge_continuations(ask, *TEXTS)
    assert table["cached"].tolist() == [True, True, False, False] and table["score"].tolist() == [8] * 4


def test_the_client_tries_again_by_itself(serve):
    busy = 429, "application/json", "{}"
    server, ask = serve(ERROR, busy, GOOD, max_retries=2)
    assert (
        judge_continuations(ask, *[column[:1] for column in TEXTS])["score"].tolist() == [8]
        and len(server.asked) == 3
    )


def test_a_slow_answer_is_given_up(serve):
    _, ask = serve("slow", timeout=0.2)
    began = time.perf_counter()
    with pytest.raises(_JudgeError, match="Timeout"):
        judge_continuations(ask, *TEXTS)
    assert time.perf_counter() - began < LONG / 2


def test_nobody_there(serve):
    server, ask = serve(GOOD)
    server.shutdown()
    server.server_close()
    with pytest.raises(_JudgeError, match="0 scores"):
        judge_continuations(ask, *TEXTS)


# ---- bad input ----


def test_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"`key`.*OPENAI_API_KEY"):
        Endpoint("stub")


@pytest.mark.parametrize("texts", [[[], [], []], [["a"], ["b"], []], [["a"], ["b", "c"], ["d"]]])
def test_unequal_or_no_texts(serve, texts):
    with pytest.raises(InputError, match="`continuations`"):
        judge_continuations(serve(GOOD)[1], *texts)


def test_a_function_needs_a_name():
    with pytest.raises(InputError, match=r"`judge`.*name"):
        judge_continuations(lambda instructions, message: ("Final score: 1", 1, 1), *TEXTS)


# ---- a model of one's own ----


def opinionated(tokenizer, prompt, answer):
    """A tiny model that has learned one judgement by heart."""
    model = tiny_gpt_neo(len(tokenizer), max_length=1024, n_layers=2, hidden_size=32, n_heads=2)
    asked, said = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    ids = torch.tensor([asked + said])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(
            model(ids).logits[0, -len(said) - 1 : -1], ids[0, -len(said) :]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    "template, form", [(None, "{}\n\n{}\n\n"), (TEMPLATE, "<system>{}<user>{}<assistant>")]
)
def test_a_local_judge(tiny, cache, template, form):
    tokenizer, texts = copy.deepcopy(tiny.tokenizer), [column[:1] for column in TEXTS]
    tokenizer.chat_template = template
    prompt = form.format(_INSTRUCTIONS, _judge_message(*(column[0] for column in texts)))
    model = opinionated(tokenizer, prompt, "Fine.\nFinal score: 6<|endoftext|>")
    table = judge_continuations(LocalJudge(model, tokenizer, max_tokens=30), *texts)
    assert table["score"].tolist() == [6] and table["tokens_read"].tolist() == [
        len(tokenizer(prompt).input_ids)
    ]
    assert table["tokens_written"].tolist() == [
        len(tokenizer("Fine.\nFinal score: 6").input_ids)
    ]  # it stops where it says so
    assert judge_continuations(LocalJudge(copy.deepcopy(model), tokenizer, max_tokens=30), *texts)[
        "cached"
    ].all()  # the same weights are the same judge


def test_a_local_judge_without_room(tiny):
    with pytest.raises(InputError, match=r"`model`.*context"):
        judge_continuations(LocalJudge(tiny.model, tiny.tokenizer), *TEXTS)
