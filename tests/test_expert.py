"""The expert: endpoints that behave and that do not, the cache, personas, gold weights, the cold start."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LABELS as EMOTIONS
from conftest import lines, make_tokenizer
from endpoint import completion, model_answer, serving

import data
from common.draws import stable_hash
from common.errors import UserError
from corpora import loading
from corpora.dialogue import SPLITS, Dialogue, Turn
from data import Failure, Responder, Sample
from experts import __main__, answers, asking, contracts
from experts.asking import Reply, Settings, Unanswered
from experts.cache import open_cache
from training import coldstart, config
from training.task import open_task

ROOT = Path(__file__).parent.parent
FAST = Settings(temperature=0.0, max_new_tokens=50, retries=2, timeout=5.0)
NOW = {"retry-after-ms": "1"}
CHAT = data.chat("You answer.", "Hi.")


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between a test and its own server, and no key of whoever runs the tests."""
    monkeypatch.setenv("NO_PROXY", "*")
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


def endpoint(url, key=""):
    pytest.importorskip("openai")
    return asking.Endpoint("m", url, key=key)


def asked(server, chats=(CHAT,), settings=FAST, key=""):
    """What the endpoint's answers are, in order."""
    found = {}
    endpoint(server.url, key).answer(list(chats), settings, found.__setitem__)
    return [found[i] for i in range(len(chats))]


def chats(n):
    return [data.chat("You answer.", f"Question {i}") for i in range(n)]


def echo(body, number):
    return completion(body["messages"][1]["content"])


# An endpoint that behaves


def test_an_endpoint_is_asked_with_model_messages_and_settings_and_the_key_is_in_the_header():
    with serving(echo) as server:
        assert asked(server, key="secret-1") == [Reply("Hi.", True, (7, 3))]
    (seen,) = server.seen
    assert seen["key"] == "Bearer secret-1"
    assert {name: seen[name] for name in ("model", "messages", "temperature", "max_tokens")} == {
        "model": "m", "messages": CHAT, "temperature": 0.0, "max_tokens": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "text", "finished"),
    [
        (completion("{}", reasoning_content="Hm."), "<think>Hm.</think>\n{}", True),
        (completion("{}", reasoning="Hm."), "<think>Hm.</think>\n{}", True),
        (completion("<think>Hm.</think>{}", reasoning_content="Hm."), "<think>Hm.</think>{}", True),
        (completion("{", finish="length"), "{", False),
        (completion(None, finish="content_filter"), "", False),
        (completion("half \ud83d"), "half ?", True),
    ],
)
def test_what_a_completion_says(said, text, finished):
    assert asking.read_completion(json.dumps(said)) == Reply(text, finished, (7, 3))


WHOLE = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "STOP", "", None, "a word of tomorrow")
CUT = ("length", "content_filter", "LENGTH", "max_tokens", "MAX_TOKENS", "model_length", "SAFETY")


@pytest.mark.parametrize(("word", "finished"), [(w, True) for w in WHOLE] + [(w, False) for w in CUT])
def test_an_unknown_word_for_the_end_is_an_end(word, finished):
    assert asking.read_completion(json.dumps(completion("{}", finish=word))) == Reply("{}", finished, (7, 3))


def test_a_response_without_a_word_for_the_end_and_one_with_a_structure():
    found = completion("{}")
    del found["choices"][0]["finish_reason"]
    assert asking.read_completion(json.dumps(found)).finished
    assert not asking.read_completion(json.dumps(completion("{}", finish={"type": "length", "length": 9}))).finished


@pytest.mark.parametrize("word", ["error", "abort", "insufficient_system_resource"])
def test_what_the_server_broke_off_is_no_answer(word):
    said = asking.read_completion(json.dumps(completion("{", finish=word)))
    assert isinstance(said, Unanswered) and word in said.why


def part(kind, **more):
    return {"type": kind, **more}


@pytest.mark.parametrize(
    ("content", "beside", "text"),
    [
        ([part("text", text="{"), part("text", text="}")], {}, "{}"),
        (["{", "}"], {}, "{}"),
        ([{"text": "{}"}], {}, "{}"),
        (part("text", text="{}"), {}, "{}"),
        ([part("output_text", text={"value": "{}", "annotations": []})], {}, "{}"),
        ([part("thinking", thinking="Hm.", signature="s"), part("text", text="{}")], {}, "<think>Hm.</think>\n{}"),
        ([part("thinking", thinking=[part("text", text="Hm.")]), part("text", text="{}")], {}, "<think>Hm.</think>\n{}"),
        ([part("reasoning", summary=[part("summary_text", text="Hm.")]), "{}"], {}, "<think>Hm.</think>\n{}"),
        ([part("redacted_thinking", data="x"), part("text", text="{}")], {}, "{}"),
        ([part("image_url", image_url={"url": "x"}), part("text", text="{}")], {}, "{}"),
        ("{}", {"thinking": "Hm."}, "<think>Hm.</think>\n{}"),
        ("{}", {"reasoning": "Hm.", "reasoning_details": [part("reasoning.text", text="Hm.")]}, "<think>Hm.</think>\n{}"),
        ("{}", {"reasoning_details": [part("reasoning.summary", summary="Hm.")]}, "<think>Hm.</think>\n{}"),
        ("{}", {"reasoning_content": "<think>Hm.</think>"}, "<think>Hm.</think>\n{}"),
        ("{}", {"reasoning_content": "", "reasoning": None, "thinking": " "}, "{}"),
        (None, {"refusal": "I cannot."}, "I cannot."),
        ([part("refusal", refusal="I cannot.")], {}, "I cannot."),
        (None, {"tool_calls": []}, ""),
    ],
)
def test_content_in_parts_and_thoughts_beside_it(content, beside, text):
    assert asking.read_completion(json.dumps(completion(content, **beside))) == Reply(text, True, (7, 3))


@pytest.mark.parametrize("usage", [None, [], "many", {"prompt_tokens": "7"}, {"completion_tokens": 2.5}])
def test_an_answer_is_not_thrown_away_because_nobody_counted_it(usage):
    assert asking.read_completion(json.dumps({**completion("{}"), "usage": usage})) == Reply("{}", True, (0, 0))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (json.dumps({"id": "x" * 99, "choices": [], "note": "the project has ended"}), "the project has ended"),
        (json.dumps({"error": {"message": "x" * 99 + " overload", "code": 502}}), f"(no 'choices'): {'x' * 99} overload"),
        (json.dumps(completion([part("image_url", image_url="x")])), "content of type image_url"),
        ("<html>\n" + "x" * 99 + "\nBad gateway</html>", "Bad gateway"),
    ],
)
def test_why_there_is_no_answer_is_said_whole_and_in_one_line(body, why):
    said = asking.read_completion(body)
    assert said.why.startswith("no chat completion") and why in said.why and "\n" not in said.why


@pytest.mark.parametrize("body", ["", "<html>", "[]", "{}", '{"choices": []}', '{"choices": [{"message": null}]}', "deep"])
def test_what_is_no_completion(body):
    assert isinstance(asking.read_completion("[" * 99_999 if body == "deep" else body), Unanswered)


def test_no_more_requests_are_under_way_than_concurrency_says():
    under_way, most = [], []

    def answer(body, number):
        under_way.append(number)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.remove(number)
        return echo(body, number)

    with serving(answer) as server:
        said = asked(server, chats(9), replace(FAST, concurrency=3))
    assert [x.text for x in said] == [f"Question {i}" for i in range(9)]
    assert max(most) == 3


# One that does not


def test_429_and_500_are_asked_again():
    trouble = [(429, {"error": {"message": "slow down"}}, NOW), (500, b"oops", NOW)]
    with serving(lambda body, number: trouble[number - 1] if number < 3 else echo(body, number)) as server:
        assert asked(server) == [Reply("Hi.", True, (7, 3))]
    assert len(server.seen) == 3


def test_a_cut_connection_is_asked_again():
    with serving(lambda body, number: None if number == 1 else echo(body, number)) as server:
        assert asked(server) == [Reply("Hi.", True, (7, 3))]
    assert len(server.seen) == 2


def test_a_connection_cut_inside_the_answer_is_asked_again():
    half = (200, b'{"choices": [', {"Content-Length": 1000})
    with serving(lambda body, number: half if number == 1 else echo(body, number)) as server:
        assert asked(server) == [Reply("Hi.", True, (7, 3))]


def test_a_hang_is_asked_again_and_given_up_in_the_end():
    with serving(lambda body, number: server.closing.wait(20) and None) as server:
        started = time.monotonic()
        (said,) = asked(server, settings=replace(FAST, timeout=0.5, retries=1))
    assert isinstance(said, Unanswered) and "timed out" in said.why.lower()
    assert len(server.seen) == 2
    assert time.monotonic() - started < 5


def test_a_server_that_drips_is_given_up():
    """A byte every tenth of a second resets a silence limit of .2 s for ever; all tries together have .8 s."""

    def drip(body, number):
        return 200, {}, {"Content-Length": 1000}

    with serving(drip) as server:
        handler = server.RequestHandlerClass

        class Dripping(handler):
            def do_POST(self):
                super().do_POST()
                with contextlib.suppress(OSError):
                    while not server.closing.wait(0.1):
                        self.wfile.write(b" ")

        server.RequestHandlerClass = Dripping
        started = time.monotonic()
        (said,) = asked(server, settings=replace(FAST, timeout=0.2))
    assert isinstance(said, Unanswered) and "in time" in said.why
    assert 0.7 < time.monotonic() - started < 4


def test_invalid_json_and_refusals_are_no_answers_and_the_others_go_on():
    def answer(body, number):
        odd = {"Question 1": b'{"choices": [{"mess', "Question 2": (400, {"error": {"message": "too long"}}, {})}
        return odd.get(body["messages"][1]["content"]) or echo(body, number)

    with serving(answer) as server:
        said = asked(server, chats(4))
    assert [isinstance(x, Unanswered) for x in said] == [False, True, True, False]
    assert "no chat completion" in said[1].why and "400" in said[2].why
    assert len(server.seen) == 4


def test_an_answer_of_10_mb_is_too_long_and_little_of_it_is_kept(tmp_path):
    with serving(lambda body, number: completion("x" * 10_000_000)) as server, open_cache(tmp_path / "c") as cache:
        (said,) = asking.ask(endpoint(server.url), [CHAT], FAST, cache)
    assert (tmp_path / "c").stat().st_size < 70_000
    assert contracts.parse_personas(said, ["Ann"]).reason == "too_long"
    assert data.parse_output(said.text, EMOTIONS).reason == "too_long"


def test_a_response_that_does_not_end_is_left(monkeypatch):
    monkeypatch.setattr(asking, "MAX_BODY", 100_000)
    with serving(lambda body, number: completion("x" * 200_000)) as server:
        (said,) = asked(server)
    assert isinstance(said, Unanswered) and "100000 bytes" in said.why


def test_a_wrong_key_stops_the_job_at_once_and_is_told_without_the_key():
    refused = (401, {"error": {"message": "no such key: secret-1"}}, {})
    with serving(lambda body, number: refused) as server, pytest.raises(UserError, match="check the key") as caught:
        asked(server, chats(50), replace(FAST, concurrency=1), key="secret-1")
    assert "secret-1" not in str(caught.value) and "***" in str(caught.value)
    assert len(server.seen) == 1


def test_a_dead_endpoint_is_given_up_after_eight_requests():
    refused = (500, b"", {"x-should-retry": "false"})
    with serving(lambda body, number: refused) as server, pytest.raises(UserError, match="8 times in a row"):
        asked(server, chats(50), replace(FAST, concurrency=1))
    assert len(server.seen) == 8


def test_the_key_is_in_no_message():
    assert "secret" not in repr(asking.Endpoint("m", "http://x/v1", key="secret"))


# What it refuses


OTHER = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


def newer(body, number):
    """An endpoint that knows max_tokens by its other name alone."""
    if "max_tokens" in body:
        return 400, {"error": {"message": OTHER, "param": "max_tokens", "code": "unsupported_parameter"}}, {}
    return echo(body, number)


def test_the_other_name_of_max_tokens_is_learnt_once():
    """Four chats one by one: one refusal and five requests; the next four need no refusal."""
    with serving(newer) as server:
        who = endpoint(server.url)
        for requests in (5, 9):
            found = {}
            who.answer(chats(4), replace(FAST, concurrency=1), found.__setitem__)
            assert [found[i].text for i in range(4)] == [f"Question {i}" for i in range(4)]
            assert len(server.seen) == requests
    assert [seen.get("max_completion_tokens") for seen in server.seen] == [None] + [50] * 8
    assert not any("max_tokens" in seen for seen in server.seen[1:])


def refusing(status, message, **more):
    return lambda body, number: (status, {"error": {"message": message, **more}}, {})


@pytest.mark.parametrize(
    ("status", "message", "more", "mend"),
    [
        (400, "'temperature' does not support 0.0, only the default (1)", {"param": "temperature"}, "take temperature 0"),
        (422, "Input validation error: `temperature` must be strictly positive", {}, "give another --temperature"),
        (400, "'messages[0].role' does not support 'system'", {"code": "unsupported_value"}, "take another one"),
        (402, "pay", {}, "the account is empty"),
        (405, "no", {}, "check the URL"),
        (410, "no", {}, "the model is gone"),
        (429, "You exceeded your current quota", {"code": "insufficient_quota"}, "the account is empty"),
    ],
)
def test_what_every_request_would_get_ends_the_job_at_once(status, message, more, mend):
    with serving(refusing(status, message, **more)) as server, pytest.raises(UserError) as caught:
        asked(server, chats(50), replace(FAST, concurrency=1))
    told = str(caught.value)
    assert mend in told and f"HTTP {status}: {message}" in told and "later" not in told
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_nothing_is_to_be_tried_later_that_lasts(status):
    with serving(refusing(status, "odd prompt")) as server, pytest.raises(UserError, match="8 times in a row") as caught:
        asked(server, chats(50), replace(FAST, concurrency=1))
    assert "mend what it names" in str(caught.value) and "later" not in str(caught.value)
    assert len(server.seen) == 8  # none of them twice


@pytest.mark.parametrize("status", [408, 409, 425, 429, 503])
def test_what_passes_is_asked_again(status):
    with serving(lambda body, number: (status, b"", NOW) if number < 3 else echo(body, number)) as server:
        assert asked(server) == [Reply("Hi.", True, (7, 3))]
    assert len(server.seen) == 3


def test_a_reason_that_is_no_message_is_told_and_the_key_is_not():
    """FastAPI has a list under `detail`; the key stands where a long text is cut."""
    detail = {"detail": [{"loc": ["body", "model"], "msg": "unknown model m"}], "sent": "x" * 300 + "secret-1" * 9}
    with serving(lambda body, number: (422, detail, {})) as server:
        (said,) = asked(server, key="secret-1")
    assert said.lasting and "unknown model m" in said.why and "secret" not in said.why and len(said.why) <= 400


# Which experts


def test_experts_of_the_flags(place, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_API_KEY_3", "k3")
    places = ["http://a/v1", str(place.root / "base"), "https://b/v1"]
    first, local, third = asking.open_experts(places, ["m1", "m2"], ["1,2", "0,0", "3,4.5"])
    assert (first.name, first.url, first.key, first.price) == ("m1", "http://a/v1", "k", (1.0, 2.0))
    assert (local.name, local.folder) == ("base", str(place.root / "base"))
    assert (third.name, third.key, third.price) == ("m2", "k3", (3.0, 4.5))


@pytest.mark.parametrize(
    ("places", "models", "prices", "said"),
    [
        ([], [], [], "0 --expert"),
        (["http://a/v1"], [], [], "one per URL"),
        (["http://user:pass@a/v1"], ["m"], [], "OPENAI_API_KEY"),
        (["http://a/v1?key=1"], ["m"], [], "OPENAI_API_KEY"),
        (["http://a/v1", "http://b/v1"], ["m", "m"], [], "called the same"),
        (["http://a/v1"], ["m"], ["1"], "PROMPT,ANSWER"),
        (["http://a/v1"], ["m"], ["1,2", "3,4"], "one each"),
        (["/nowhere/at/all"], [], [], "/nowhere/at/all"),
    ],
)
def test_experts_that_cannot_be(places, models, prices, said):
    pytest.importorskip("openai")
    with pytest.raises(UserError, match=said) as caught:
        asking.open_experts(places, models, prices)
    assert "user:pass" not in str(caught.value)


def test_without_the_openai_package_a_url_is_a_users_mistake(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="requirements-extra"):
        asking.open_experts(["http://a/v1"], ["m"])


def test_an_endpoint_and_a_local_folder_say_the_same(place, tmp_path):
    """The same tiny model behind real HTTP and through rollout.generate, greedy, on the prompts of the tiny world."""
    w = open_task(config.parse(place.argv(tmp_path / "unused")))
    asked_for = [data.messages(s, w.prompts) for s in w.originals[:6]]
    (local,) = asking.open_experts([str(place.root / "base")])
    found = {}
    local.answer(asked_for, FAST, found.__setitem__)
    with serving(model_answer(str(place.root / "base"))) as server:
        assert asked(server, asked_for) == [found[i] for i in range(6)]
    assert sum(isinstance(data.parse_output(found[i].text, EMOTIONS), data.Output) for i in range(6)) >= 3


def test_a_local_expert_that_was_trained_again_is_another_one(place, tmp_path):
    weights = tmp_path / "base/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    os.utime(weights, ns=(1, 1))
    old = asking.Local("base", str(tmp_path / "base"), make_tokenizer())
    before = asking.cache_key(old, CHAT, FAST)
    os.utime(weights, ns=(2, 2))
    assert asking.cache_key(old, CHAT, FAST) != before


# The cache


def test_nothing_is_asked_twice_and_equal_prompts_once(tmp_path, capsys):
    with serving(echo) as server:
        priced = replace(endpoint(server.url), price=(2.0, 10.0))
        with open_cache(tmp_path / "c") as cache:
            first = asking.ask(priced, [*chats(3), chats(3)[1]], FAST, cache)
        with open_cache(tmp_path / "c") as cache:
            again = asking.ask(priced, chats(4), FAST, cache)
    assert [x.text for x in first] == ["Question 0", "Question 1", "Question 2", "Question 1"]
    assert again[:3] == first[:3]
    assert len(server.seen) == 4
    told = capsys.readouterr().out.splitlines()
    assert told[0] == (
        "expert m: 3 new answers, 0 from the cache, 0 prompts without an answer; "
        "prompt + answer: 21 + 9 tokens (0.0001) now, 21 + 9 tokens (0.0001) in all"
    )
    assert "1 new answers, 3 from the cache" in told[1] and "7 + 3 tokens (0.0000) now, 28 + 12 tokens" in told[1]


def test_other_model_prompt_or_settings_are_another_key():
    base = asking.Endpoint("m", "http://a/v1")
    keys = {
        asking.cache_key(who, chat, how)
        for who in (base, asking.Endpoint("n", "http://a/v1"))
        for chat in (CHAT, chats(1)[0])
        for how in (FAST, replace(FAST, temperature=1.0), replace(FAST, max_new_tokens=9), replace(FAST, seed=1))
    }
    assert len(keys) == 16
    moved = asking.Endpoint("m", "http://b/v1", key="other")
    assert asking.cache_key(moved, CHAT, replace(FAST, timeout=1, retries=0)) == asking.cache_key(base, CHAT, FAST)


def test_a_half_written_last_line_is_cut_and_its_prompt_asked_again(tmp_path):
    with serving(echo) as server:
        who = endpoint(server.url)
        with open_cache(tmp_path / "c") as cache:
            asking.ask(who, chats(2), FAST, cache)
        whole = (tmp_path / "c").read_bytes()
        (tmp_path / "c").write_bytes(whole[:-9])
        with open_cache(tmp_path / "c") as cache:
            assert len(cache.known) == 1
            asking.ask(who, chats(2), FAST, cache)
    assert len(server.seen) == 3
    assert sorted((tmp_path / "c").read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("broken", ["{", "[]", '{"key": "a"}', '{"key": "a", "text": "", "finished": true, "tokens": [1]}'])
def test_another_broken_line_is_named(tmp_path, broken):
    (tmp_path / "c").write_text(f"{broken}\n{{}}\n")
    with pytest.raises(UserError, match="c:1: "), open_cache(tmp_path / "c"):
        pass


@pytest.mark.parametrize("finish", ["eos_token", "length"])
def test_the_cache_keeps_the_response_and_not_what_was_made_of_it(tmp_path, finish):
    """What was paid for is read again: with the words, the parts and the thoughts that the server sent."""
    content = [part("thinking", thinking="Hm."), part("text", text="{}")]
    sent = completion(content, finish=finish)
    with serving(lambda body, number: sent) as server, open_cache(tmp_path / "c") as cache:
        (first,) = asking.ask(endpoint(server.url), [CHAT], FAST, cache)
    (row,) = lines(tmp_path / "c")
    assert row["response"]["choices"][0] == {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    with open_cache(tmp_path / "c") as cache:
        assert list(cache.known.values()) == [first] == [Reply("<think>Hm.</think>\n{}", finish != "length", (7, 3))]


def test_what_was_broken_off_is_not_in_the_cache(tmp_path):
    with serving(lambda body, number: completion("{", finish="abort")) as server, open_cache(tmp_path / "c") as cache:
        assert isinstance(asking.ask(endpoint(server.url), [CHAT], FAST, cache)[0], Unanswered)
    assert not (tmp_path / "c").exists()  # a cache in which nothing was answered is not left


def test_of_an_earlier_version_only_whole_answers_are_taken(tmp_path):
    """It took every word but `stop` for a cut, so those answers are asked for again, once."""
    with serving(lambda body, number: completion("new", finish="eos_token")) as server:
        who = endpoint(server.url)
        keys = [asking.cache_key(who, chat, FAST) for chat in chats(2)]
        ends = zip(keys, (True, False), strict=True)
        old = [{"key": key, "expert": "m", "text": "old", "finished": whole, "tokens": [7, 3]} for key, whole in ends]
        (tmp_path / "c").write_text("".join(json.dumps(row) + "\n" for row in old))
        for _ in range(2):
            with open_cache(tmp_path / "c") as cache:
                assert [x.text for x in asking.ask(who, chats(2), FAST, cache)] == ["old", "new"]
        assert len(server.seen) == 1


def test_a_cache_serves_one_job_at_a_time(tmp_path):
    with open_cache(tmp_path / "c"), pytest.raises(UserError, match="in use"), open_cache(tmp_path / "c"):
        pass


def test_answers_before_the_end_of_a_failed_job_are_kept(tmp_path):
    def answer(body, number):
        return echo(body, number) if number <= 5 else (401, {"error": {"message": "no"}}, {})

    with serving(answer) as server, open_cache(tmp_path / "c") as cache, pytest.raises(UserError):
        asking.ask(endpoint(server.url), chats(20), replace(FAST, concurrency=1), cache)
    assert len((tmp_path / "c").read_bytes().splitlines()) == 5


def write_talks(root, n=12):
    """One dialogue per line, three speakers of whom one is a group, in train, dev and test."""
    root.mkdir(exist_ok=True)
    turns = [
        {"speaker": "Ann", "text": "I won the race.", "label": "joy"},
        {"speaker": "Bo", "text": "He lied to us again!", "label": "anger"},
        {"speaker": "All", "text": "What a lovely day.", "label": "joy"},
    ]
    for split in SPLITS:
        rows = [{"id": f"d{i}", "turns": [{**t, "text": f"{t['text']} {i}"} for t in turns]} for i in range(n)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "labels.json").write_text(json.dumps(EMOTIONS))


def describe(names, theme="They argue over a race."):
    inside = {**{name: f"{name} is a person of few words" for name in names}, "Theme": theme}
    return f"They talk.\n```python\n{inside!r}\n```"


def describer(body, number):
    """Describes whoever the prompt lists."""
    listed = re.search(r"Who are these speakers: (.*?)\?", body["messages"][1]["content"])[1]
    return completion(describe(listed.split(", ")))


def command(*argv):
    """(exit status, stdout, stderr) of `python -m experts`."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experts", *map(str, argv)])
        status = __main__.main()
    return status, said.getvalue(), complained.getvalue()


def test_a_job_killed_midway_goes_on_and_pays_for_no_answer_twice(tmp_path):
    """kill -9 after five answers of twelve; what is repeated is at most the one request that was under way."""
    endpoint("")
    write_talks(tmp_path / "world")

    def slow(body, number):
        time.sleep(0.05)
        return describer(body, number)

    with serving(slow) as server:
        flags = ["--data", f"tiny={tmp_path / 'world'}", "--expert", server.url, "--expert_model", "m"]
        argv = ["personas", *flags, "--out", str(tmp_path / "p.jsonl"), "--concurrency", "1"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        job = subprocess.Popen([sys.executable, "-m", "experts", *argv], cwd=ROOT, **quiet)
        cache = tmp_path / "p.jsonl.cache"
        end = time.monotonic() + 120
        while time.monotonic() < end and not (cache.exists() and cache.read_bytes().count(b"\n") >= 5):
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
        job.wait()
        before = cache.read_bytes()
        assert 5 <= before.count(b"\n") < 12 and not (tmp_path / "p.jsonl").exists()
        assert command(*argv)[0] == 0
        requests = len(server.seen)
        assert command(*argv)[0] == 0
    assert cache.read_bytes().startswith(before) and cache.read_bytes().count(b"\n") == 12
    assert 12 <= requests <= 13 and len(server.seen) == requests
    assert len(lines(tmp_path / "p.jsonl")) == 24


# Personas


GOOD = """<think>Who are they?</think>Ann is up, Bo is down.
```python
{"Ann": "A winner who shares her joy at once.",
 'Bo': 'Quick to feel cheated, and loud about it.', "Theme": "Joy meets distrust."}
```
"""


def said(text, finished=True):
    return Reply(text, finished, (1, 1))


def test_personas_are_read():
    found = contracts.parse_personas(said(GOOD), ["Bo", "Ann"])
    assert found == contracts.Portrait(
        {"Bo": "Quick to feel cheated, and loud about it.", "Ann": "A winner who shares her joy at once."},
        "Joy meets distrust.",
    )
    assert list(found.personas) == ["Bo", "Ann"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("```\n", "```\nThat is all.", "block"),
        ("```python", "", "block"),
        ("```python", "```sql", "block"),
        ('"Joy meets distrust."}', '"Joy meets distrust."', "dictionary"),
        ('distrust."}', 'distrust."} # done', "trailing"),
        ("'Bo'", "'Bob'", "names"),
        ("'Bo'", "'bo'", "names"),
        ("'Bo'", "'Ann'", "duplicate"),
        ("'Quick to feel cheated, and loud about it.'", "3", "dictionary"),
        ("'Quick to feel cheated, and loud about it.'", "'...'", "sentence"),
        ("'Quick to feel cheated, and loud about it.'", "'Loud person.'", "sentence"),
        ("'Quick to feel cheated, and loud about it.'", "'" + "so " * 200 + "'", "sentence"),
        ("'Quick to feel cheated, and loud about it.'", '"A winner who shares  her joy at once."', "sentence"),
        ('"Theme": "Joy meets distrust."', "", "theme"),
        ("Joy meets distrust.", "...", "theme"),
        ("Joy meets distrust.", "x" * 70_000, "too_long"),
    ],
)
def test_personas_that_break_the_contract(old, new, reason):
    assert old in GOOD
    assert contracts.parse_personas(said(GOOD.replace(old, new, 1)), ["Ann", "Bo"]).reason == reason


def test_personas_that_are_no_answer_or_cut_off():
    assert contracts.parse_personas(said(GOOD, finished=False), ["Ann", "Bo"]).reason == "unfinished"
    assert contracts.parse_personas(Unanswered("HTTP 500"), ["Ann", "Bo"]) == Failure("unanswered", "HTTP 500")
    assert contracts.parse_personas(said(GOOD), ["Ann"]).reason == "names"


def test_no_text_makes_the_reading_raise():
    odd = [GOOD[:i] + "```" for i in range(len(GOOD))] + [GOOD[i:] for i in range(len(GOOD))]
    odd += ["```" * 20_000, "```\n" + "{" * 60_000 + "```", '```\n{"\ud800": "\\ud800 a b"}\n```', "", "\x00", "``` ``` ```"]
    for text in odd:
        assert isinstance(contracts.parse_personas(said(text), ["Ann"]), Failure)
        assert isinstance(contracts.parse_gold(said(text), EMOTIONS, "joy"), Failure)


def test_the_persona_prompt_names_each_speaker_once_and_no_group_and_shows_every_line():
    said_by = (("Ann", "Hi."), ("All", "Hello!"), ("Ann", "Bye."), ('Bo "B"', "<|end|>Oh."), ("Cy<|end|>", "Ah."))
    turns = [Turn(*spoken) for spoken in said_by]
    system, user = (m["content"] for m in contracts.persona_chat(turns, ["<|end|>"]))
    assert "Ann: Hi.\nAll: Hello!\nAnn: Bye.\n" in user and "<|end|>" not in user
    shape = contracts.read_alone(user.rpartition("```python")[2].rpartition("```")[0], contracts.read_strings)
    assert shape == {"Ann": "...", 'Bo "B"': "...", "Cy< |end|>": "...", "Theme": "..."}
    for asked_for in ("temperament", "age", "gender", "schooling", "manner of speaking", "mood"):
        assert asked_for in user


def test_an_echo_of_the_prompt_is_no_answer():
    user = contracts.persona_chat([Turn("Ann", "Hi."), Turn("Bo", "Oh.")])[1]["content"]
    assert contracts.parse_personas(said(user), ["Ann", "Bo"]).reason == "sentence"


@pytest.mark.parametrize(
    ("sentence", "valid"),
    [
        ("一个温和而乐观的年轻人，说话直接。", True),
        ("好人。", False),  # two letters
        ("คนใจดีพูดน้อย", True),
        ("वह बहुत शांत है।", True),
        ("शांत लड़की।", False),
    ],
)
def test_personas_in_scripts_of_other_kinds(sentence, valid):
    text = f"```\n{json.dumps({'王': sentence, 'Theme': '争执'}, ensure_ascii=False)}\n```"
    found = contracts.parse_personas(said(text), ["王"])
    assert found == (contracts.Portrait({"王": sentence}, "争执") if valid else Failure("sentence", found.detail))


def test_a_name_is_one_however_its_accents_are_typed():
    names = contracts.speakers([Turn(unicodedata.normalize("NFD", "Thảo"), "Hi.")])
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "Thảo")
        text = f'```\n{{"{name}": "calm and very kind", "Theme": "peace"}}\n```'
        assert contracts.parse_personas(said(text), names).personas == {"Thảo": "calm and very kind"}
    twice = f'```\n{{"Thảo": "a b c", "{name}": "calm and very kind", "Theme": "peace"}}\n```'
    assert contracts.parse_personas(said(twice), names).reason == "duplicate"


def test_a_speaker_may_be_called_theme():
    names = contracts.speakers([Turn("Theme", "Hi.")])
    text = '```\n{"Theme": "A greeter in good spirits.", "Theme of all": "Greetings."}\n```'
    assert contracts.parse_personas(said(text), names).personas == {"Theme": "A greeter in good spirits."}


def test_personas_of_train_dialogues_in_the_format_that_a_run_reads(tmp_path):
    write_talks(tmp_path / "world", 3)

    def answer(body, number):
        wrong = "lovely day. 1" in body["messages"][1]["content"]
        return completion(describe(["Ann", "Bob"])) if wrong else describer(body, number)

    out = tmp_path / "p.jsonl"
    with serving(answer) as server:
        endpoint(server.url)
        flags = ("--expert", server.url, "--expert_model", "m", "--expert", server.url, "--expert_model", "n")
        status, told, complained = command("personas", "--data", f"tiny={tmp_path / 'world'}", *flags, "--out", out)
    assert (status, complained) == (0, "")
    assert "4 of 6 answers valid (66.7%), 8 personas" in told and "invalid: names 2" in told
    assert lines(out)[0] == {
        "dialogue": "tiny/train/d0", "expert": "m", "speaker": "Ann", "persona": "Ann is a person of few words",
        "theme": "They argue over a race.",
    }  # fmt: skip
    assert [(x["dialogue"], x["expert"], x["reason"]) for x in lines(tmp_path / "p.jsonl.failed")] == [
        ("tiny/train/d1", "m", "names"), ("tiny/train/d1", "n", "names"),
    ]  # fmt: skip
    filed = loading.read_personas(out)
    assert set(filed) == {"tiny/train/d0", "tiny/train/d2"}
    assert filed["tiny/train/d0"] == {name: (f"{name} is a person of few words",) * 2 for name in ("Ann", "Bo")}


def test_d28_personas_from_the_context_alone_serve_dev_and_test(place, tmp_path):
    """Of d0's three turns the first knows Ann alone, so Bo, who answers it, has no persona yet."""
    write_talks(tmp_path / "world", 2)
    out = tmp_path / "p.jsonl"
    with serving(describer) as server:
        endpoint(server.url)
        flags = ("--expert", server.url, "--expert_model", "m", "--scope", "context", "--out", out)
        assert command("personas", "--data", f"tiny={tmp_path / 'world'}", *flags)[0] == 0
    prompts = [seen["messages"][1]["content"] for seen in server.seen]
    assert sum("lovely day" not in prompt for prompt in prompts) == 4  # dev and test are equal, so each is asked once
    filed = loading.read_personas(out)
    assert set(filed["tiny/dev/d0/0"]) == {"Ann"} and set(filed["tiny/dev/d0/1"]) == {"Ann", "Bo"}
    assert "tiny/dev/d0" not in filed and "tiny/train/d0" in filed
    flags = ("--data", f"tiny={tmp_path / 'world'}", "--personas", out, "--persona_scope", "context", "--eval_limit", 0)
    w = open_task(config.parse(place.argv(tmp_path / "run", *flags)))
    shown = {s.id: (s.responder.name, s.responder.persona) for s in (*w.originals, *w.dev)}
    assert shown["tiny/dev/d0/0"] == ("Bo", None)
    assert shown["tiny/dev/d0/1"] == ("Ann", "Ann is a person of few words")
    assert shown["tiny/train/d0/0"] == ("Bo", "Bo is a person of few words")


def test_personas_of_whole_dev_and_test_dialogues_only_when_asked_for(tmp_path):
    write_talks(tmp_path / "world", 2)
    base = {"data": (f"tiny={tmp_path / 'world'}",), "expert": ("x",), "out": tmp_path / "p"}
    keys = {scope: [k for k, _ in __main__.person_questions(__main__.PersonasCommand(**base, scope=scope))] for scope in (
        "none", "context", "dialogue",
    )}  # fmt: skip
    assert keys["none"] == ["tiny/train/d0", "tiny/train/d1"]
    assert keys["dialogue"] == [f"tiny/{split}/d{i}" for split in SPLITS for i in (0, 1)]
    assert len(keys["context"]) == 2 + 2 * 6 and "tiny/dev/d0/2" in keys["context"]


def test_a_run_without_personas_says_so_once(place, tmp_path, capsys):
    write_talks(tmp_path / "world", 2)
    open_task(config.parse(place.argv(tmp_path / "run", "--data", f"tiny={tmp_path / 'world'}")))
    assert capsys.readouterr().out.count("no personas given") == 1
    open_task(config.parse(place.argv(tmp_path / "run")))  # these dialogues have character sheets
    assert "no personas" not in capsys.readouterr().out


def test_no_valid_answer_at_all_is_said_and_the_failures_are_there(tmp_path):
    write_talks(tmp_path / "world", 1)
    with serving(echo) as server:
        endpoint(server.url)
        flags = ("--expert", server.url, "--expert_model", "m", "--out", tmp_path / "p.jsonl")
        status, told, complained = command("personas", "--data", f"tiny={tmp_path / 'world'}", *flags)
    assert status == 2 and "0 of 1 answers valid" in told
    assert complained.startswith("error: no answer is valid (sentence 1; the first: that of 'Ann'")
    assert complained.count("\n") == 1
    assert lines(tmp_path / "p.jsonl.failed")[0]["reason"] == "sentence"


@pytest.mark.parametrize(("flag", "value"), [("--concurrency", 0), ("--temperature", -1), ("--timeout", 0), ("--limit", -1)])
def test_settings_that_cannot_be(tmp_path, flag, value):
    flags = ("--data", "tiny=x", "--expert", "http://127.0.0.1:1/v1", "--expert_model", "m", "--out", tmp_path / "p")
    status, _, complained = command("personas", *flags, flag, value)
    assert status == 2 and complained.count("\n") == 1 and "at least" in complained
    status, _, complained = command("gold", *flags[2:])
    assert status == 2 and complained == "error: no data: give --data NAME=DIR, for example --data meld=data/meld\n"


# Gold


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        ('{"joy": 0.85, "neutral": 0.45}', {"joy": 0.85, "neutral": 0.45}),
        ("{'Joy': 1}", {"joy": 1.0}),
        ('{"neutral": 0.85, "joy": 0.45}', "own_label"),
        ('{"joy": 0.5, "neutral": 0.5}', "own_label"),
        ('{"neutral": 0.5}', "own_label"),
        ('{"joy": 0.9, "pride": 0.5}', "label"),
        ('{"joy": 0.9, "anger": 0.05}', "weight"),
        ('{"joy": 1.1}', "weight"),
        ('{"joy": true}', "weight"),
        ("{}", "last_emotions"),
        ('{"joy": 0.9} {}', "trailing"),
        ("0.9", "last_emotions"),
    ],
)
def test_gold_around_the_label_of_the_dataset(inside, found):
    read = contracts.parse_gold(said(f"It shows.\n```python\n{inside}\n```"), EMOTIONS, "joy")
    assert (read.reason if isinstance(read, Failure) else read) == found


def test_at_most_three_labels():
    four = '```\n{"a": 0.9, "b": 0.2, "c": 0.2, "d": 0.2}\n```'
    assert isinstance(contracts.parse_gold(said(four), ("a", "b", "c", "d"), "a"), Failure)


def test_gold_is_written_in_the_format_that_a_run_reads_and_invalid_rows_keep_the_label(place, tmp_path):
    write_talks(tmp_path / "world", 2)

    def weigh(body, number):
        label = re.search(r"Annotators heard '(\w+)'", body["messages"][1]["content"])[1]
        weights = {label: 0.8, "neutral": 0.3} if label == "joy" else {label: 0.3, "neutral": 0.8}
        return completion(f"```\n{json.dumps(weights)}\n```")

    out = tmp_path / "g.jsonl"
    with serving(weigh) as server:
        endpoint(server.url)
        flags = ("--expert", server.url, "--expert_model", "m", "--out", out)
        status, told, _ = command("gold", "--data", f"tiny={tmp_path / 'world'}", *flags)
    assert status == 0 and "4 of 6 answers valid" in told and "invalid: own_label 2" in told
    assert lines(out)[0] == {"id": "tiny/train/d0/0", "weights": {"joy": 0.8, "neutral": 0.3}}
    w = open_task(config.parse(place.argv(tmp_path / "run", "--data", f"tiny={tmp_path / 'world'}", "--gold", out)))
    gold = {s.id: s.gold for s in w.originals}
    assert gold["tiny/train/d1/2"] == {"joy": 0.8, "neutral": 0.3} and gold["tiny/train/d1/1"] == {"anger": 1.0}


def test_gold_that_is_soft_already_needs_no_expert(place):
    """The tiny world has votes in two minds at turn 2 of most dialogues."""
    base = {"data": (f"tiny={place.root / 'world'}",), "expert": ("x",), "out": Path("g")}
    questions = __main__.gold_questions(__main__.GoldCommand(**base))
    assert 16 <= len(questions) < 24 and all(len(s.gold) == 1 for s in questions)
    assert len(__main__.gold_questions(__main__.GoldCommand(**base, limit=5))) == 5


def test_the_gold_prompt_ends_with_the_line_and_names_label_and_set():
    turns = (Turn("Ann", "Hi."), Turn("Bo", "I won."))
    sample = Sample("a", "tiny", turns, Responder("Ann", None, "prev"), EMOTIONS, {"joy": 1.0})
    user = contracts.gold_chat(sample)[1]["content"]
    assert user.startswith("Ann: Hi.\nBo: I won.\n\n") and "'joy'" in user and "joy, anger, neutral" in user


# Cold start


def expert_flags(*places, models=()):
    return [x for place in places for x in ("--expert", str(place))] + [x for m in models for x in ("--expert_model", m)]


def cold_world(place, out, *more):
    return open_task(config.parse([*place.argv(out, "--cold_start", "expert"), *more]))


def test_d17_the_expert_answers_the_training_prompts_and_resume_pays_nothing_twice(place, tmp_path, capsys):
    """The base model stands for the expert, behind an endpoint: about nine of ten answers keep the rule."""
    pytest.importorskip("openai")
    with serving(model_answer(str(place.root / "base"))) as server:
        w = cold_world(place, tmp_path / "run", *expert_flags(server.url, models=["m"]))
        examples = coldstart.expert_answers(w, None)
        first = len(server.seen)
        assert coldstart.expert_answers(w, None) == examples
    assert first == len(server.seen) <= len(w.originals) == 24
    assert all(any(x["messages"] == data.messages(s, w.prompts) for x in server.seen) for s in w.originals)
    assert server.seen[0]["temperature"] == 1.0 and server.seen[0]["max_tokens"] == 24
    assert 10 < len(examples) < 24
    told = capsys.readouterr().out
    assert f"{len(examples)} of 24 answers keep the rule; dropped: " in told
    for x in examples:
        text = data.answer_text(w.tokenizer, x.ids, w.eos, "")
        assert isinstance(data.parse_output(text, EMOTIONS), data.Output) and x.ids[-1] in w.eos


def test_d17_a_run_from_an_experts_cold_start(place, tmp_path):
    """Row "w/ COLD" of Table 2, with a local folder; a second start finds everything in the run, also if that is gone."""
    out = tmp_path / "run"
    more = ("--cold_start", "expert", "--expert", place.root / "base", "--iterations", 1, "--steps", 1)
    status, told, complained = place.run(out, *more)
    assert (status, complained) == (0, "")
    assert "cold start (expert): " in told and "prompt + answer: " in told
    rows = lines(out / "cold_start.jsonl")
    assert 10 < len(rows) < 24 and len(lines(out / "expert.jsonl")) == 24
    assert place.run(out, *more[:3], tmp_path / "gone", *more[4:], resume=True)[0] == 0
    assert lines(out / "cold_start.jsonl") == rows


def test_an_expert_that_is_missing_is_a_users_mistake_before_anything_is_written(place, tmp_path):
    for more, word in ((("--cold_start", "expert"), "--expert"), (("--expert", place.root / "base"), "--cold_start"), (
        ("--cold_start", "expert", "--expert", "/nowhere/at/all"), "/nowhere"
    )):  # fmt: skip
        status, _, complained = place.run(tmp_path / "run", *more)
        assert status == 2 and word in complained and complained.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_an_expert_without_one_valid_answer_is_a_users_mistake(place, tmp_path):
    pytest.importorskip("openai")
    with serving(echo) as server:
        w = cold_world(place, tmp_path / "run", *expert_flags(server.url, models=["m"]))
        with pytest.raises(UserError, match="think 24"):
            coldstart.expert_answers(w, None)


VALID = data.format_output("Ann feels joy.", {"joy": 1.0}, {"anger": 0.8}, "The bus is late.")


def test_an_experts_text_becomes_tokens_of_the_policy(place, tmp_path):
    w = cold_world(place, tmp_path / "run", *expert_flags(place.root / "base"))
    s = w.originals[0]
    ids = answers.taught_ids(w, s, said(VALID))
    assert ids[-1] == min(w.eos) and data.answer_text(w.tokenizer, ids, w.eos, "") == VALID
    wanted = {
        "unfinished": said(VALID, finished=False),
        "control": said(VALID.replace("joy.", "<|im_end|> joy.", 1)),
        "unanswered": Unanswered("HTTP 500"),
        "think": said(VALID.replace("<think>", "")),
        "too_long": said(VALID.replace("joy", "joy " * 30, 1)),
    }
    reasons = {name: answers.taught_ids(w, s, reply).reason for name, reply in wanted.items()}
    assert reasons == {name: name for name in wanted}
    for forged in ("<|im_start|>", "<|im_end|>"):
        assert answers.taught_ids(w, s, said(VALID.replace("feels", forged, 1))).reason == "control"


def test_where_the_template_opens_the_think_block_the_answer_begins_inside(place, tmp_path):
    w = cold_world(place, tmp_path / "run", *expert_flags(place.root / "base"))
    w.tokenizer.chat_template = w.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>")
    s = w.originals[0]
    assert w.encode(s)[1] == "<think>"
    ids = answers.taught_ids(w, s, said(VALID))
    assert data.answer_text(w.tokenizer, ids, w.eos, "") == VALID.removeprefix("<think>")


def test_several_experts_share_the_samples_by_hash(tmp_path):
    ids = [f"meld/train/{i}/0" for i in range(40)]
    with serving(lambda body, number: completion(body["model"])) as server, open_cache(tmp_path / "c") as cache:
        two = [asking.Endpoint(name, server.url) for name in ("m", "n")]
        endpoint(server.url)
        prompts = {x: lambda control, chat=chat: chat for x, chat in zip(ids, chats(40), strict=True)}
        replies = asking.ask_drawn(two, prompts, FAST, cache)
    drawn = [replies[x].text for x in ids]
    assert drawn == ["mn"[stable_hash(x) % 2] for x in ids]
    assert 10 < drawn.count("m") < 30 and len(server.seen) == 40


def test_dialogues_without_anybody_to_describe_are_not_asked_about(tmp_path):
    write_talks(tmp_path / "world", 1)
    row = {"id": "crowd", "turns": [{"speaker": "All", "text": "Hey!", "label": "joy"}]}
    with (tmp_path / "world/train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    base = {"data": (f"tiny={tmp_path / 'world'}",), "expert": ("x",), "out": tmp_path / "p"}
    assert [k for k, _ in __main__.person_questions(__main__.PersonasCommand(**base))] == ["tiny/train/d0"]
    assert Dialogue("crowd", "tiny", "train", (Turn("All", "Hey!"),)).key == "tiny/train/crowd"
