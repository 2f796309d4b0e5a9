"""Chat templates: one date for a whole run, a system text for every tokenizer, and prompts that never change on the way."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import call, lines, make_tokenizer, results, status_of
from transformers import AutoTokenizer

import data
import evaluate
from analysis import audit, table1
from common import template
from common.errors import UserError
from common.files import read_json
from common.hub import load_tokenizer
from experts import answers, asking
from tools import ablate
from training import config, folder, task
from training.records import check_prompts

CHAT = data.chat("Be brief.", "Hi.")
TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
SILENT = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endif %}{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
)
PARTS = "{% for m in messages %}{% for x in m.content %}{{ x.text if x.type == 'text' }}{% endfor %}{% endfor %}"
DATED = "{{ 'It is Monday.' if strftime_now('%d') == '04' else 'The bus is late.' }}"  # pieces of the tests' tokenizer


def tokenizer(chat_template):
    made = make_tokenizer()
    made.chat_template = chat_template
    return made


@pytest.fixture
def zone(monkeypatch):
    """Sets the time zone of this process."""

    def put(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield put
    monkeypatch.undo()
    time.tzset()


def calendar(*days):
    """In place of the module `datetime`: today is one day after the other, then always the last."""
    left = list(days)
    today = lambda: date.fromisoformat(left.pop(0) if len(left) > 1 else left[0])  # noqa: E731
    return SimpleNamespace(date=SimpleNamespace(fromisoformat=date.fromisoformat, today=today), datetime=datetime)


@pytest.fixture
def today(monkeypatch):
    """Sets what day it is."""
    return lambda *days: monkeypatch.setattr(template, "datetime", calendar(*days))


# The date


def test_a_template_is_told_the_date_that_the_caller_keeps(zone):
    """Kiritimati is 25 hours ahead of Pago Pago: never the same day."""
    asks = tokenizer("{{ strftime_now('%d %b %Y') }}{% set f = '%A %H:%M' %} {{ strftime_now(f) }}")
    kept, free = [], []
    for name in ("Pacific/Pago_Pago", "Pacific/Kiritimati"):
        zone(name)
        kept.append(template.written(asks, CHAT, "2026-03-09"))
        free.append(template.written(asks, CHAT))
    assert kept == ["09 Mar 2026 Monday 00:00"] * 2
    assert free[0] != free[1] and template.day() == date.today().isoformat()


@pytest.mark.parametrize("given", ["today", "9.3.2026", "20260309", "2026-3-9", "2026-02-30", "2026-W11-1"])
def test_a_date_is_written_in_one_way(given):
    with pytest.raises(UserError, match=f"--date {re.escape(given)}: give a date as YYYY-MM-DD"):
        template.day(given)


def test_a_prompt_is_what_the_librarys_own_method_writes():
    """Blocks are trimmed, other control tokens and tags of the library are known, and an unknown name is nothing."""
    whole = tokenizer(
        "{{ eos_token }}\n{%- for m in messages %}\n  {% if not m.content %}{% continue %}{% endif %}\n"
        "  {{- m.role }}: {{ m | tojson }}\n{% endfor %}{% generation %}{{ tools is none }}{% endgeneration %}"
        "{% if add_generation_prompt %}[go{{ date_string }}]{% endif %}{% if enable_thinking %}<think>\n{% endif %}"
    )
    text = whole.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert text.count("Be brief.") == 1 and text.endswith("True[go]<think>\n")
    assert template.written(whole, CHAT, "2026-03-09") == text
    assert template.render(whole, CHAT)[1] == "<think>\n"


# The system text


@pytest.mark.parametrize("made", [NO_SYSTEM, SILENT, ALTERNATE])
def test_without_a_system_role_its_text_goes_before_the_users(made):
    assert template.written(tokenizer(made), CHAT) == "[user] Be brief.\n\nHi.\n"
    (note,) = template.remarks(tokenizer(made), "2026-03-09")
    assert "no system role" in note and "\n" not in note


def test_a_system_role_is_used_where_there_is_one():
    assert template.written(tokenizer(TURNS), CHAT) == "[system] Be brief.\n[user] Hi.\n"
    assert template.remarks(tokenizer(TURNS), "2026-03-09") == []


def test_one_sample_never_decides_how_prompts_are_built():
    """A template that knows a system role and fails at one text: a mistake to hear of, not a second kind of prompt."""
    picky = tokenizer("{% if 'Zed' in messages[0].content %}{{ raise_exception('no Zed') }}{% endif %}" + TURNS)
    assert template.written(picky, CHAT).startswith("[system] Be brief.")
    with pytest.raises(UserError, match=r"the chat template fails \(TemplateError no Zed\)"):
        template.written(picky, data.chat("You are Zed.", "Hi."))


BROKEN = {
    "{{ raise_exception('never') }}": "the chat template fails (TemplateError never)",
    "{% for m in": "the chat template fails (TemplateSyntaxError",
    "{{ messages[7].content }}": "the chat template fails (UndefinedError",
    "{{ 1 + messages[0].role }}": "the chat template fails (TypeError",
    PARTS: "the chat template leaves out the text of a message",
}


@pytest.mark.parametrize("made", BROKEN)
def test_a_template_that_fails_at_everything_is_one_line_and_nothing_is_left(place, tmp_path, made):
    shutil.copytree(place.root / "base", tmp_path / "m")
    change_template(tmp_path / "m", lambda old: made)
    status, _, complained = place.run(tmp_path / "run", "--model", tmp_path / "m")
    assert status == 2 and BROKEN[made] in complained and complained.startswith(f"error: {tmp_path / 'm'}: ")
    assert complained.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_model_without_a_system_role_trains_and_says_so_once(place, tmp_path):
    """Its prompts have one turn, the user's, which begins with who one is."""
    shutil.copytree(place.root / "base", tmp_path / "m")
    change_template(tmp_path / "m", lambda old: NO_SYSTEM.partition("{% for")[0] + old)
    status, said, _ = place.run(tmp_path / "run", "--model", tmp_path / "m", "--iterations", 1, "--steps", 1)
    assert status == 0 and said.count("no system role") == 1
    own, shown = load_tokenizer(tmp_path / "run/model"), lines(tmp_path / "run/rollouts/iteration-1.jsonl")
    for record in shown:
        text = own.decode(record["prompt_ids"])
        assert text.startswith("<|im_start|>user\nYou are ") and text.count("<|im_start|>") == 2
    found = audit.audit(tmp_path / "run")
    assert found.problems == () and "not rendered" not in found.summary


# A run


def change_template(model, change):
    """Another chat template in a model folder, made of its own."""
    own = AutoTokenizer.from_pretrained(model)
    own.chat_template = change(own.chat_template)
    own.save_pretrained(model)
    (model / "SHA256SUMS").unlink(missing_ok=True)


def stop_after(monkeypatch, updates):
    inner = folder.Run.count_update

    def count(run):
        inner(run)
        if run.position.updates == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(folder.Run, "count_update", count)


@pytest.fixture(scope="module")
def dated(place, tmp_path_factory):
    """A model whose template says what day it is, and the flags of its runs."""
    model = tmp_path_factory.mktemp("dated") / "m"
    shutil.copytree(place.root / "base", model)
    change_template(model, lambda old: f"<|im_start|>system\n{DATED}<|im_end|>\n{old}")
    return model, ("--model", model, "--max_prompt_tokens", 90)


def run_on(day, place, out, flags, *, stop=None, resume=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "datetime", calendar(day))
        if stop:
            stop_after(patch, stop)
        status, said, _ = place.run(out, *flags, resume=resume)
    assert status == 0
    return said


@pytest.fixture(scope="module")
def begun(place, dated):
    """A run of it that was stopped in the first RL stage, on 4 March."""
    out = dated[0].with_name("run")
    run_on("2026-03-04", place, out, dated[1], stop=6)
    assert lines(out / "rollouts/iteration-1.jsonl") and not (out / "model").exists()
    return out


@pytest.fixture(scope="module")
def gone_on(place, dated, begun):
    """The same run, gone on with to its end on 5 March, and what it said."""
    out = begun.with_name("gone-on")
    shutil.copytree(begun, out)
    return out, run_on("2026-03-05", place, out, dated[1], resume=True)


@pytest.fixture
def stopped(dated, begun, tmp_path):
    """(model, copy of the stopped run, its flags). The model may be changed: it is put back."""
    model, flags = dated
    shutil.copytree(begun, tmp_path / "run")
    shutil.copytree(model, tmp_path / "as it was")
    yield model, tmp_path / "run", flags
    shutil.copytree(tmp_path / "as it was", model, dirs_exist_ok=True)


def test_a_run_that_goes_on_the_next_day_keeps_its_date(place, dated, gone_on, tmp_path):
    """Begun on the 4th, a Monday says the template, and gone on with on the 5th, when it would say something else."""
    out, said = gone_on
    run_on("2026-03-04", place, tmp_path / "whole", dated[1])
    assert said.count("the chat template shows the date: 2026-03-04") == 1
    assert results(out) == results(tmp_path / "whole")
    assert read_json(out / "config.json")["date"] == "2026-03-04"
    own = load_tokenizer(out / "model")
    shown = Counter(own.decode(x["prompt_ids"][:3]) for k in (1, 2) for x in lines(out / f"rollouts/iteration-{k}.jsonl"))
    assert shown == {"<|im_start|>system\nIt is Monday.": 30}
    found = audit.audit(out)
    assert found.problems == () and "not rendered" not in found.summary


def test_the_audit_renders_every_prompt_again(gone_on, tmp_path):
    """With the date of the next day none of the 30 prompts is what was recorded; without a date nobody can say."""
    out = tmp_path / "run"
    shutil.copytree(gone_on[0], out)
    known = read_json(out / "config.json")
    (out / "config.json").write_text(json.dumps({**known, "date": "2026-03-05"}))
    found = [x for x in audit.audit(out).problems if "prompt_ids: " in x]
    assert len(found) == 30 and found[0].startswith("iteration-1.jsonl:1: prompt_ids: ")
    assert "It is Monday." in found[0] and "was recorded, now it is" in found[0] and "The bus is late." in found[0]
    (out / "config.json").write_text(json.dumps({name: x for name, x in known.items() if name != "date"}))
    assert audit.audit(out).summary.endswith("prompts not rendered again (an earlier version kept no date)")
    (out / "config.json").write_text(json.dumps({**known, "data": ["tiny=/nowhere"]}))
    assert "prompts not rendered again (/nowhere" in audit.audit(out).summary


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def refused(place, stopped):
    """What a resume says that is refused: one line, status 2, and nothing has changed."""
    model, out, flags = stopped
    before = content(out)
    status, _, complained = place.run(out, *flags, resume=True)
    assert status == 2 and complained.count("\n") == 1 and content(out) == before
    return complained


def test_a_template_that_changed_stops_the_run(place, stopped):
    model, out, _ = stopped
    change_template(model, lambda old: old.replace("system\n{{", "system\nYou are {{", 1))
    said = refused(place, stopped)
    name = lines(out / "cold_start.jsonl")[0]["sample_id"]
    assert f"the prompt of {name} has changed: '<|im_start|>system\\nIt is Monday.<|im_end|>" in said
    assert "was recorded, now it is '<|im_start|>system\\nYou are It is Monday." in said


def test_a_dialogue_that_changed_stops_the_run(place, stopped, tmp_path):
    """Of train, whose prompts are recorded; and of dev, whose prompts only their SHA-256 knows."""
    model, out, flags = stopped
    root = tmp_path / "world"
    shutil.copytree(place.root / "world", root)
    argv = [*place.argv(out, *flags, "--data", f"tiny={root}"), "--resume"]
    known = read_json(out / "config.json")
    (out / "config.json").write_text(json.dumps({**known, "data": [f"tiny={root}"]}))
    for split, said in (("train", "/d0/0 has changed: "), ("dev", "prompts of dev have changed since the run began")):
        rows = lines(root / f"{split}.jsonl")
        now = [{**row, "turns": [{**turn, "text": "I won the race."} for turn in row["turns"]]} for row in rows]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in now))
        status, _, complained = call(argv)
        assert status == 2 and said in complained and complained.count("\n") == 1
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_another_date_is_another_setting(place, stopped):
    model, out, flags = stopped
    assert "date was '2026-03-04', is '2026-03-05'" in refused(place, (model, out, (*flags, "--date", "2026-03-05")))
    status, _, complained = place.run(out, *flags, "--date", "5 March")
    assert status == 2 and complained == "error: --date 5 March: give a date as YYYY-MM-DD, such as 2026-01-31\n"


def test_a_run_of_an_earlier_version_goes_on_if_its_prompts_are_the_same(place, stopped):
    """It kept neither date nor sums. On the 4th its recorded prompts are rendered as they were, on the 5th they are not."""
    model, out, flags = stopped
    for day, same in (("2026-03-04", True), ("2026-03-05", False)):
        made = task.open_task(config.parse(place.argv(out, *flags, "--date", day)))
        if same:
            check_prompts(made, out, {})
        else:
            with pytest.raises(UserError, match="now it is .*The bus is late"):
                check_prompts(made, out, {})


def test_a_config_without_a_date_takes_that_of_the_command(tmp_path):
    folder.open_run(tmp_path, {"lr": 1}, resume=False, may_differ=frozenset())
    folder.open_run(tmp_path, {"lr": 1, "date": "2026-03-04"}, resume=True, may_differ=frozenset())


def test_the_date_is_that_of_the_flag_or_of_the_run_or_of_today(place, tmp_path, today):
    today("2026-03-05")
    (tmp_path / "config.json").write_text('{"date": "2026-03-04"}')
    given = ((), ("--resume",), ("--resume", "--date", "2026-01-31"))
    found = [task.date_of_run(config.parse([*place.argv(tmp_path), *flags])) for flags in given]
    assert found == ["2026-03-05", "2026-03-04", "2026-01-31"]


def test_all_ranks_have_the_date_of_the_first(place, monkeypatch, today):
    today("2026-03-05")
    monkeypatch.setattr(task, "exchange", lambda value: ["2026-03-04", value])
    assert task.date_of_run(config.parse(place.argv("nowhere"))) == "2026-03-04"


def test_a_date_may_be_given(place, dated, tmp_path, today):
    today("2026-03-05")
    cfg = config.parse(place.argv(tmp_path / "run", *dated[1], "--date", "2026-03-04"))
    made = task.open_task(cfg)
    assert made.tokenizer.decode(made.encode(made.originals[0])[0][2:3]) == "It is Monday."


# Other commands


def score(monkeypatch, capsys, place, *words):
    flags = ("--data", f"tiny={place.root / 'world'}", "--prompts", place.root / "prompts.json", "--max_new_tokens", 3)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "score", *map(str, (*flags, *words))])
    status = status_of(evaluate.main)
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), err


def test_scores_know_the_date_and_two_models_have_one(monkeypatch, capsys, place, dated, tmp_path, today):
    """Midnight passes while the first model is scored. A template that shows no date has none."""
    asked, inner = [], data.encode
    monkeypatch.setattr(table1.data, "encode", lambda *given: asked.append(given[3]) or inner(*given))
    today("2026-03-04", "2026-03-05")
    models = ("--model", dated[0], "--model", dated[0], "--model", place.root / "base")
    status, numbers, err = score(monkeypatch, capsys, place, *models, "--out", tmp_path / "o.jsonl")
    assert status == 2  # no answer of these models is valid
    assert [run["date"] for run in numbers["runs"]] == ["2026-03-04", "2026-03-04", None]
    assert set(asked) == {"2026-03-04"} and err.count("the chat template shows the date: 2026-03-04") == 2
    rows = [[row["date"] for row in lines(tmp_path / f"o-{n}.jsonl")] for n in (2, 3)]
    assert rows == [["2026-03-04"] * 9, [None] * 9]


def test_a_comparison_of_two_dates_says_so(monkeypatch, capsys, place, dated, tmp_path):
    one = ("--model", dated[0], "--limit", 2)
    score(monkeypatch, capsys, place, *one, "--date", "2026-03-04", "--out", tmp_path / "o.jsonl")
    _, numbers, err = score(monkeypatch, capsys, place, *one, "--date", "2026-03-05", "--baseline", tmp_path / "o.jsonl")
    assert numbers["date"] == "2026-03-05"
    assert f"prompts of {tmp_path / 'o.jsonl'} show the date 2026-03-04, those of {dated[0]} 2026-03-05: --date" in err
    _, _, err = score(monkeypatch, capsys, place, *one, "--date", "2026-03-04", "--baseline", tmp_path / "o.jsonl")
    assert "prompts of" not in err


def test_what_a_local_expert_was_asked_is_in_the_key_of_its_answer():
    """The date where its template shows one, and the template itself; an endpoint writes its prompts alone."""
    settings = [asking.Settings(date=day) for day in ("2026-03-04", "2026-03-05")]

    def keys(expert):
        return [asking.cache_key(expert, CHAT, x) for x in settings]

    shows, plain = (asking.Local("m", "/nowhere", tokenizer(made)) for made in (DATED + TURNS, TURNS))
    assert len({*keys(shows)}) == 2 and len({*keys(plain)}) == 1
    assert keys(asking.Local("m", "/nowhere", tokenizer("x" + TURNS)))[0] != keys(plain)[0]
    assert len({*keys(asking.Endpoint("m", "http://h/v1"))}) == 1


def test_a_local_expert_is_asked_with_the_date_of_its_settings(monkeypatch, capsys, today):
    today("2026-03-04", "2026-03-05")
    seen = []
    monkeypatch.setattr(asking, "open_local", lambda *given: lambda encoded, names, settings: seen.extend(encoded) or [])
    expert = asking.Local("m", "/nowhere", tokenizer(DATED))
    expert.answer([CHAT, CHAT], asking.Settings(), lambda i, reply: None)
    assert [expert.tokenizer.decode(ids) for ids, _ in seen] == ["It is Monday."] * 2
    assert capsys.readouterr().err.count("no system role") == 0


def test_a_cold_start_from_an_expert_has_the_date_of_the_run(monkeypatch, tmp_path):
    seen = []

    def asked(experts, chats, settings, cache):
        seen.append(settings.date)
        raise UserError("enough")

    monkeypatch.setattr(answers, "open_experts", lambda *given: [])
    monkeypatch.setattr(answers, "ask_drawn", asked)
    cfg = replace(config.PRESETS["toy"], out=str(tmp_path), date="2026-03-04")
    with pytest.raises(UserError, match="enough"):
        answers.cold_start_answers(SimpleNamespace(cfg=cfg, originals=()))
    assert seen == ["2026-03-04"]


def test_all_rows_of_a_table_have_one_date(tmp_path, today):
    """Of the first run that is there, else of today; --date wins."""
    today("2026-03-05")
    cfg = config.PRESETS["toy"]
    assert ablate.date_of_runs(tmp_path, cfg) == "2026-03-05"
    for name, known in (("a-0", {}), ("b-0", {"date": "2026-03-04"}), ("c-0", {"date": "2026-03-03"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(known))
    assert ablate.date_of_runs(tmp_path, cfg) == "2026-03-04"
    assert ablate.date_of_runs(tmp_path, replace(cfg, date="2026-01-01")) == "2026-01-01"


def test_a_finished_run_of_another_date_is_no_run_of_the_table(place, finished):
    argv = place.argv(finished, "--date", "2000-01-01")
    job = ablate.Job(ablate.Row("full", "SELF-EMO"), 0, Path(finished), tuple(argv), config.parse(argv))
    with pytest.raises(UserError, match="made with other settings .date was .*, is '2000-01-01'"):
        ablate.finished(job)
