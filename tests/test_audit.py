"""A small run folder made with the functions of training; then everything that can be wrong with it, one thing at a time."""

import copy
import json
import sys

import pytest
from conftest import status_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import evaluate
from analysis import audit
from common.errors import UserError
from common.files import jsonl
from corpora.dialogue import Turn
from data import Completion, Responder, Sample, parse_output, select
from grpo import advantages, consistency, core_emotions, reward
from training import records
from training.records import ScoredGroup, digest, group_record, sample_record

LABELS = ("neutral", "joy", "fear", "anger")
THINK = "<think> because </think>"
GOOD = (
    THINK + " {'last_emotions': {'joy': 0.9, 'fear': 0.3}, "
    "'my_emotions': {'joy': 0.8, 'hope': 0.4}, 'my_output': 'How nice of you.'}"
)
PLAIN = THINK + " {'last_emotions': {'joy': 1.0}, 'my_emotions': {'joy': 0.5}, 'my_output': 'Oh.'}"
WRONG = THINK + " {'last_emotions': {'anger': 0.5}, 'my_emotions': {'hope': 0.5}, 'my_output': 'Oh.'}"
MUTE = PLAIN.removeprefix(THINK + " ")
CUT = "<think>" + " because" * 19
CONFIG = {
    "n": 4, "batch_prompts": 2, "S": 1, "T": 2, "keep_reward": 0.6, "self_grpo": True, "self_play": True,
    "retrain_from": "current", "max_prompt_tokens": 8, "max_new_tokens": 20,
}  # fmt: skip
WORDS = ["<end>", *sorted({word for text in (GOOD, PLAIN, WRONG, MUTE, CUT) for word in text.split(" ")})]


def original(name, gold, responder="Ann"):
    context = (Turn("Ann", "I won."), Turn("Bo", "And now?"))
    return Sample(f"world/train/{name}/1", "world", context, Responder(responder, "a calm one", "next"), LABELS, gold)


def answered(text):
    finished = text != CUT
    ids = (*map(WORDS.index, text.split(" ")), *((0,) if finished else ()))
    return Completion(ids, (-0.25,) * len(ids), finished, text, parse_output(text, LABELS, finished=finished))


def group(of, texts, step, *, weight, fits=True, off=False):
    """The record of one group, and the sample that its best answer makes."""
    answers = tuple(map(answered, texts))
    predictions = [getattr(answer.parse, "last_emotions", None) for answer in answers]
    rewards, r2 = [reward(p, of.gold) for p in predictions], consistency(predictions)
    A = advantages([rewards], [r2], weight)[0].tolist()
    chosen = select(of, [a.parse for a in answers], rewards, step + 1, keep_reward=2.0 if off else 0.6, fits=lambda _: fits)
    scored = ScoredGroup(of, (3, 1, 2), answers, tuple(rewards), core_emotions(predictions), tuple(r2), tuple(A))
    record = group_record(scored, chosen, step=step, iteration=step + 1, lam=weight, version=7 * step)
    return chosen.child, rehashed({**record, "why": "off"}) if off else record


def rehashed(record):
    return {**record, "sha256": digest(record)}


def kept_row(record, child):
    ids = record["answers"][record["selected"]]["ids"]
    own = {name: record[name] for name in ("iteration", "sample_id", "prompt_ids")}
    return {**own, "ids": ids, "child": sample_record(child)}


def fabricate():
    """Two iterations of one step of two prompts: kept and rule; the kept one's child (reward) and label."""
    child, kept = group(original("a", {"joy": 0.65, "fear": 0.35}), [PLAIN, GOOD, MUTE, CUT], 0, weight=0.0)
    _, rule = group(original("b", {"joy": 1.0}), [MUTE, MUTE, CUT, MUTE], 0, weight=0.0)
    _, low = group(child, [WRONG, WRONG, MUTE, WRONG], 1, weight=0.5)
    _, label = group(original("c", {"anger": 1.0}), [PLAIN, WRONG, GOOD, GOOD], 1, weight=0.5)
    return [[kept, rule], [low, label]], [kept_row(kept, child)]


def write(run, iterations, buffer, config=CONFIG):
    (run / "rollouts").mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (run / "buffer.jsonl").write_text(jsonl(buffer), encoding="utf-8")
    for k, found in enumerate(iterations, 1):
        (run / "rollouts" / f"iteration-{k}.jsonl").write_text(jsonl(found), encoding="utf-8")


def problems(run, iterations, buffer, config=CONFIG):
    write(run, iterations, buffer, config)
    return audit.audit(run).problems


def write_tokenizer(run):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    core.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    made.chat_template = "{{ messages }}"
    made.save_pretrained(str(run / "model"))
    (run / "model" / "config.json").write_text('{"model_type": "qwen3", "eos_token_id": 0}', encoding="utf-8")


RUN, BUFFER = json.loads(json.dumps(fabricate()))


def test_the_fabricated_run_is_what_it_should_be():
    """Two kinds of origin, four reasons; GOOD beats PLAIN on soft gold: shares .75 .25, IOU .9/1.1, reward .918182."""
    records = [record for records in RUN for record in records]
    assert [(r["origin"], r["why"], r["selected"]) for r in records] == [
        ("original", "kept", 1), ("original", "rule", None), ("synthetic", "reward", None), ("original", "label", None),
    ]  # fmt: skip
    assert records[0]["answers"][1]["reward"] == pytest.approx(0.918182, abs=1e-6)
    assert records[2]["sample_id"] == "world/train/a/1+1" and records[2]["gold"] == {"joy": 0.8}
    assert [a["parse"]["reason"] for a in records[1]["answers"]] == ["think", "think", "unfinished", "think"]


@pytest.mark.parametrize("tokenizer", [False, True])
def test_an_honest_run_passes(tmp_path, tokenizer):
    if tokenizer:
        write_tokenizer(tmp_path)
    write(tmp_path, RUN, BUFFER)
    findings = audit.audit(tmp_path)
    assert findings.problems == ()
    assert findings.summary.startswith("4 groups of 4 answers, 1 kept: 0 differences")
    assert ("not decoded" in findings.summary) is not tokenizer


def test_a_real_run_passes(finished):
    findings = audit.audit(finished)
    assert findings.problems == () and "not decoded" not in findings.summary


# One leaf after another


def leaves(value, path=()):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return [path]


def changed(record, path):
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int) else old + "x" if isinstance(old, str) else 3
    holder[path[-1]] = old * 1.25 + 2.0**-40 if isinstance(old, float) else new
    return record


# What nothing else in a run determines: its inputs, sampled numbers, and the name of an original sample that is not kept.
FREE = {"prompt_ids", "responder", "labels", "logprobs", "weights_version", "sample_id", "gold", "sha256"}
LEAVES = [[leaves(record) for record in records] for records in RUN]
LONGEST = max(len(found) for records in LEAVES for found in records)


def tampered(k, i, record):
    records = copy.deepcopy(RUN)
    records[k][i] = record
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder with a tokenizer that every change overwrites."""
    run = tmp_path_factory.mktemp("run")
    write_tokenizer(run)
    return run


@pytest.fixture
def quick(monkeypatch, folder):
    """Open the tokenizer once."""
    decode = audit.decoder(folder)
    monkeypatch.setattr(audit, "decoder", lambda run: decode)
    return folder


def all_changed(j, skip=()):
    """The run with leaf number j of every record changed, and the lines where that happened."""
    records, where = copy.deepcopy(RUN), []
    for k, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
        path = LEAVES[k][i][j % len(LEAVES[k][i])]
        if not set(skip) & set(path):
            records[k][i] = changed(records[k][i], path)
            where.append((f"iteration-{k + 1}.jsonl:{i + 1}: ", path))
    return records, where


@pytest.mark.parametrize("j", range(LONGEST))
def test_any_changed_leaf_breaks_the_digest(tmp_path, j):
    records, where = all_changed(j)
    found = problems(tmp_path, records, BUFFER)
    for line, path in where:
        assert any(p.startswith(f"{line}sha256: written") for p in found), path


@pytest.mark.parametrize("j", range(LONGEST))
def test_any_leaf_that_others_determine_is_found_even_under_a_fresh_digest(quick, j):
    """The forger recomputes sha256; the field itself, or one that follows from it, must still give the change away."""
    records, where = all_changed(j, skip=FREE)
    found = problems(quick, [[rehashed(record) for record in file] for file in records], BUFFER)
    assert not any("sha256" in p for p in found)
    for line, path in where:
        assert any(p.startswith(line) for p in found), path


@pytest.mark.parametrize("name", ["sample_id", "gold", "responder", "labels", "prompt_ids"])
def test_inputs_of_a_kept_answer_and_of_a_child_are_checked_against_the_buffer(quick, name):
    for k, path in [(0, path) for path in LEAVES[0][0]] + [(1, path) for path in LEAVES[1][0]]:
        unknown = (k, name) == (1, "prompt_ids") or (k == 0 and path[-1] in ("persona", "kind"))
        if path[0] == name and not unknown:
            found = problems(quick, tampered(k, 0, rehashed(changed(RUN[k][0], path))), BUFFER)
            assert any(p.startswith(f"iteration-{k + 1}.jsonl:1: ") for p in found), (k, path)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (("lam",), "lam"),
        (("core", "anger"), "core"),
        (("answers", 2, "reward"), "answers[2].reward"),
        (("answers", 2, "consistency"), "answers[2].consistency"),
        (("answers", 2, "advantage"), "answers[2].advantage"),
        (("answers", 0, "parse", "last_emotions", "joy"), "answers[0].parse"),
        (("answers", 3, "index"), "answers[3].index"),
        (("selected",), "selected"),
        (("why",), "why"),
        (("depth",), "depth"),
        (("answers", 0, "ids", 2), "answers[0].ids"),
    ],
)
def test_a_difference_names_file_line_and_field(quick, path, field):
    found = problems(quick, tampered(1, 1, rehashed(changed(RUN[1][1], path))), BUFFER)
    assert any(p.startswith(f"iteration-2.jsonl:2: {field}: ") for p in found), found


def test_the_last_bit_counts(tmp_path):
    record = copy.deepcopy(RUN[0][0])
    record["answers"][1]["reward"] = 0.918181818181818  # instead of .9181818181818182
    found = problems(tmp_path, tampered(0, 0, rehashed(record)), BUFFER)
    assert found[0].startswith("iteration-1.jsonl:1: answers[1].reward: written 0.918181818181818, recomputed 0.91818")


def test_a_missing_field_is_a_finding_not_a_crash(tmp_path):
    for name in RUN[0][0]:
        record = {key: value for key, value in RUN[0][0].items() if key != name}
        assert problems(tmp_path, tampered(0, 0, record), BUFFER), name
    for bad in (None, 3, "x", [], {}):
        for name in RUN[0][0].keys() - ({"parent"} if bad is None else set()):
            assert problems(tmp_path, tampered(0, 0, {**RUN[0][0], name: bad}), BUFFER), (name, bad)


def test_any_changed_leaf_of_a_kept_answer_is_found(tmp_path):
    """Ids, prompt and the whole child, but for what only the child knows: the texts of the turns before the reply."""
    for path in leaves(BUFFER[0]):
        try:
            found = problems(tmp_path, RUN, [changed(BUFFER[0], path)])
        except UserError as error:
            found = "is not a kept answer" in str(error)
        earlier = path[:2] == ("child", "context") and path[2] < 2
        assert found or earlier, path


# Structure


def test_a_kept_answer_needs_its_line_and_a_line_its_kept_answer(tmp_path):
    found = problems(tmp_path, RUN, [])
    assert "iteration-1.jsonl:1: selected: missing in buffer.jsonl" in found
    assert any("no kept answer made world/train/a/1+1" in p for p in found)
    other = {**BUFFER[0], "sample_id": "world/train/z/1"}
    assert any("world/train/z/1 of iteration 1 is kept without" in p for p in problems(tmp_path, RUN, [*BUFFER, other]))


def test_roots_must_be_train_dialogues(tmp_path):
    record = rehashed({**RUN[0][1], "sample_id": "world/test/b/1"})
    found = problems(tmp_path, tampered(0, 1, record), BUFFER)
    assert found == ("iteration-1.jsonl:2: sample_id: world/test/b/1 does not descend from a train dialogue of world",)


def test_a_child_cannot_be_answered_in_the_iteration_that_made_it(tmp_path):
    record = rehashed({**RUN[1][0], "iteration": 1, "step": 0})
    assert any("made in iteration 1, answered in 1" in p for p in problems(tmp_path, tampered(1, 0, record), BUFFER))


def test_lengths_must_fit(tmp_path):
    answers = copy.deepcopy(RUN[0][1]["answers"])
    answers[0]["logprobs"].pop()
    answers[1]["logprobs"][0] = 0.5
    answers[2]["ids"].pop()
    answers[2]["logprobs"].pop()
    found = problems(tmp_path, tampered(0, 1, rehashed({**RUN[0][1], "answers": answers})), BUFFER)
    assert [p.partition(": ")[2].partition(":")[0] for p in found] == [
        "answers[0].logprobs", "answers[1].logprobs", "answers[2].ids",
    ]  # fmt: skip
    assert any("answers: 4, the config says 3" in p for p in problems(tmp_path, RUN, BUFFER, {**CONFIG, "n": 3}))
    assert any("prompt_ids: 3 tokens" in p for p in problems(tmp_path, RUN, BUFFER, {**CONFIG, "max_prompt_tokens": 2}))


def test_steps_must_follow_each_other(tmp_path):
    (kept, rule), (low, label) = RUN
    assert any("RL step 2: 1 groups, the config says 2" in p for p in problems(tmp_path, [[kept, rule], [low]], BUFFER))
    assert any("RL step 1: 3 groups" in p for p in problems(tmp_path, [[kept, rule, rule], [low, label]], BUFFER))
    mixed = problems(tmp_path, [[kept, rule, low, label], []], BUFFER)
    assert any("iteration-1.jsonl:3: iteration: 2, but RL step 2 belongs to iteration-2.jsonl" in p for p in mixed)
    swapped = problems(tmp_path, [[low, label], [kept, rule]], BUFFER)
    assert any("iteration-2.jsonl:1: step: RL step 1 with weights 0 follows RL step 2 with weights 7" in p for p in swapped)
    stale = rehashed({**low, "weights_version": 0}), rehashed({**label, "weights_version": 0})
    assert any("iteration-1.jsonl:1: step: RL step 2 with weights 7 comes first" in p for p in swapped)
    assert any("RL step 2 with weights 0 follows" in p for p in problems(tmp_path, [[kept, rule], [*stale]], BUFFER))


@pytest.mark.parametrize(
    ("settings", "weight", "off"),
    [
        ({"retrain_from": "base", "S": 2, "T": 4}, 0.5, False),
        ({"self_grpo": False}, 0.0, False),
        ({"self_play": False}, 0.5, True),
    ],
)
def test_lambda_and_selection_follow_the_config(tmp_path, settings, weight, off):
    """From base, two steps per iteration: lambda 0, 1/2 within the first. Plain GRPO: 0. Without self-play: never kept."""
    one_file = settings.get("S") == 2
    _, first = group(original("b", {"joy": 1.0}), [MUTE, MUTE, CUT, MUTE], 0, weight=0.0, off=off)
    _, second = group(original("c", {"anger": 1.0}), [PLAIN, WRONG, GOOD, GOOD], 1, weight=weight, off=off)
    second = rehashed({**second, "iteration": 1}) if one_file else second
    config = {**CONFIG, "batch_prompts": 1, **settings}
    records = [[first, second]] if one_file else [[first], [second]]
    assert problems(tmp_path, records, [], config) == ()
    assert problems(tmp_path, records, [], {**config, "self_grpo": not config["self_grpo"]})
    assert problems(tmp_path, records, [], {**config, "self_play": not config["self_play"]})


def test_lambda_begins_anew_in_every_iteration_from_base(tmp_path):
    """One step per iteration: step 1 is the first of iteration 2, lambda 0 of 1."""
    first = group(original("b", {"joy": 1.0}), [MUTE, MUTE, CUT, MUTE], 0, weight=0.0)[1]
    second = group(original("c", {"anger": 1.0}), [PLAIN, WRONG, GOOD, GOOD], 1, weight=0.0)[1]
    config = {**CONFIG, "batch_prompts": 1, "retrain_from": "base"}
    assert problems(tmp_path, [[first], [second]], [], config) == ()


def test_refusals_that_need_context_are_believed_and_counted(tmp_path):
    of = original("d", {"joy": 1.0})
    lonely = Sample(of.id, of.dataset, (Turn("Ann", "Hm."),), of.responder, of.labels, of.gold)
    records = [
        group(of, [PLAIN, MUTE, MUTE, MUTE], 0, weight=0.0, fits=False)[1],
        group(lonely, [PLAIN, MUTE, MUTE, MUTE], 0, weight=0.0)[1],
    ]
    assert [record["why"] for record in records] == ["length", "responder"]
    write(tmp_path, [records], [])
    findings = audit.audit(tmp_path)
    assert findings.problems == () and "not recomputed: 2 refusals" in findings.summary
    for record in records:  # they are not believed where the reward says otherwise
        answers = RUN[0][1]["answers"]
        forged = rehashed({**record, "answers": answers, "core": {}})
        assert any(": why: written" in p for p in problems(tmp_path, [[forged, records[1]]], []))


def test_ids_must_decode_to_the_text_and_end_where_it_says(quick):
    record = copy.deepcopy(RUN[0][1])
    record["answers"][0]["ids"][3] = 1
    record["answers"][1]["ids"][-1] = 1
    record["answers"][3] |= {"text": "", "parse": records.parse_record(parse_output("", LABELS))}
    found = problems(quick, tampered(0, 1, rehashed(record)), BUFFER)
    named = [p.partition(": ")[2].partition(":")[0] for p in found]
    assert named == ["answers[0].ids", "answers[1].ids", "answers[1].finished", "answers[3].ids"]


def test_a_think_block_that_the_template_opened_is_no_difference(quick):
    """The prompt ends with <think>, the answer's tokens begin after it; the text has both."""
    record = copy.deepcopy(RUN[0][1])
    opened = WORDS.index("<think>")
    for answer in record["answers"]:
        answer["text"] = "<think>" + answer["text"]
        answer["parse"] = records.parse_record(parse_output(answer["text"], LABELS, finished=answer["finished"]))
    assert problems(quick, tampered(0, 1, rehashed({**record, "prompt_ids": [1, opened]})), BUFFER) == ()
    assert len(problems(quick, tampered(0, 1, rehashed({**record, "prompt_ids": [opened, 1]})), BUFFER)) == 4


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        audit.audit(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no rollouts"):
        audit.audit(tmp_path)
    write(tmp_path, RUN, BUFFER)
    path = tmp_path / "rollouts" / "iteration-2.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match=r"iteration-2\.jsonl line 2 is not JSON"):
        audit.audit(tmp_path)
    write(tmp_path, RUN, [{"child": {}}])
    with pytest.raises(UserError, match=r"buffer\.jsonl:1 is not a kept answer"):
        audit.audit(tmp_path)


def test_a_line_separator_inside_a_reply_does_not_end_a_line(tmp_path):
    """U+2028 and U+0085 stand raw in JSON; str.splitlines() would cut there."""
    _, record = group(original("b", {"joy": 1.0}), [PLAIN, WRONG, MUTE, CUT], 0, weight=0.0, off=True)
    record["answers"][2]["text"] = MUTE.replace("Oh.", "Oh.\u2028Oh\u0085no.")
    config = {**CONFIG, "batch_prompts": 1, "self_play": False}
    assert problems(tmp_path, [[rehashed(record)]], [], config) == ()


# Showing


def test_show_works_a_group_out(tmp_path):
    """Gold .65 .35. GOOD .9 .3: shares .75 .25; minima .65 .25 = .9, maxima .75 .35 = 1.1, IOU .818182, reward .918182.
    PLAIN joy 1: .65/1.35 = .481481. Core: joy 1.75, fear .25. Rewards .581481, .918182, 0, 0: mean .374916."""
    write(tmp_path, RUN, BUFFER)
    text = audit.show(tmp_path, "world/train/a/1")
    for line in (
        "world/train/a/1, RL step 1, iteration 1, original",
        "gold {'joy': 0.65, 'fear': 0.35}; normalised (Eq. 9): joy 0.650000, fear 0.350000",
        "  minima: joy 0.650000, fear 0.250000; sum 0.900000",
        "  maxima: joy 0.750000, fear 0.350000; sum 1.100000",
        "  IOU = 0.900000 / 1.100000 = 0.818182 (Eq. 10)",
        "  r = 0.818182 + 0.1 = 0.918182 (Eq. 8)",
        "  joy: 1.000000 + 0.750000 = 1.750000",
        "  core: joy 0.875000, fear 0.125000",
        "  answer 1 names joy, fear: 2/3 (Eq. 12)",
        "r: 0.581481, 0.918182, 0.000000, 0.000000; mean 0.374916, standard deviation 0.454214",
        "selected: 1 (kept)",
    ):
        assert line in text.splitlines(), line
    assert "A1 = (0.918182 - 0.374916)/0.454214 + 0.000000 * (0.666667 - 0.250000)/0.319142 = 1.196055" in text
    assert "the rule fails (think: " in text and "the rule fails (unfinished: " in text
    with pytest.raises(UserError, match="no answers to 'world/train/q/1'"):
        audit.show(tmp_path, "world/train/q/1")


# The command


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "audit", *map(str, arguments)])
    status = status_of(evaluate.main)
    return status, *capsys.readouterr()


def test_the_command_exits_0_1_and_2(tmp_path, monkeypatch, capsys):
    write(tmp_path, RUN, BUFFER)
    code, out, err = command(monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, "") and "0 differences" in out
    code, out, _ = command(monkeypatch, capsys, tmp_path, "--show", "world/train/a/1")
    assert code == 0 and "(Eq. 13)" in out
    write(tmp_path, tampered(0, 0, changed(RUN[0][0], ("lam",))), BUFFER)
    code, out, _ = command(monkeypatch, capsys, tmp_path)
    assert code == 1 and "iteration-1.jsonl:1: lam: written" in out
    code, out, err = command(monkeypatch, capsys, tmp_path / "nowhere")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
