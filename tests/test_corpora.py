"""stats, download and audit of data.py. Downloads come from a server on this machine that misbehaves on purpose."""

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import status_of

import data
from common.errors import UserError
from corpora import check, download
from corpora.dialogue import SPLITS, Dialogue, Turn
from corpora.download import Remote, fetch

REAL = Path(__file__).parents[1] / "../shared/data"
needs_csv = pytest.mark.skipif(not REAL.exists(), reason="the CSV files of MELD and EmoryNLP are not beside the repository")
BODY = bytes(range(256)) * 1024  # 256 KiB
SHA = hashlib.sha256(BODY).hexdigest()
MELD_HEAD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\r\n"


def run(monkeypatch, capsys, *words):
    """(exit status, stdout, stderr) of `python data.py words`."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
    return status_of(data.main), *capsys.readouterr()


# download


class Server:
    """Serves BODY; `plan` says what goes wrong with each request in turn, and "" or the end of it means nothing does."""

    def __init__(self):
        self.plan, self.asked, self.release = [], 0, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.serve(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.remote = Remote("meld/a.csv", f"http://127.0.0.1:{self.http.server_port}/a.csv", len(BODY), SHA)

    def serve(self, request):
        fault = self.plan.pop(0) if self.plan else ""
        self.asked += 1
        request.close_connection = True
        if fault.isdecimal():
            return request.send_error(int(fault))
        body = {"corrupts": b"!" + BODY[1:], "sends more": BODY + b"more"}.get(fault, BODY)
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:100_000] if fault in ("truncates", "stalls") else body)
        if fault == "stalls":
            self.release.wait(20)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    yield made
    made.release.set()
    made.http.shutdown()
    made.http.server_close()


def get(server, to, **options):
    return fetch(server.remote, to, **{"timeout": 5.0, "tries": 3, "wait": 0.0, **options})


def there(to):
    return {path.name: path.read_bytes() for path in (to / "meld").iterdir()}


@pytest.mark.parametrize(
    "plan", [[], ["truncates"], ["corrupts"], ["sends more"], ["truncates", "corrupts"], ["503", "429"], ["408", "425"]]
)
def test_a_file_arrives_whole_whatever_the_server_does(server, tmp_path, plan):
    """Every fault costs one more try, and nothing half-written is left."""
    server.plan = list(plan)
    assert get(server, tmp_path) == "262144 bytes, SHA-256 as pinned"
    assert there(tmp_path) == {"a.csv": BODY}
    assert server.asked == len(plan) + 1


def test_a_server_that_falls_silent_is_left_after_the_time_out(server, tmp_path):
    server.plan = ["stalls"]
    started = time.monotonic()
    get(server, tmp_path, timeout=0.3)
    assert time.monotonic() - started < 10
    assert there(tmp_path) == {"a.csv": BODY} and server.asked == 2


@pytest.mark.parametrize(
    "plan, asked, message",
    [
        (["404"], 1, "a.csv: 404 Not Found; is something"),
        (["403"], 1, "a.csv: 403 Forbidden; is something"),
        (["500"] * 3, 3, "a.csv: 500 .*, 3 times in a row; run the command again"),
        (["corrupts"] * 3, 3, f"what came has the SHA-256 [0-9a-f]{{64}} and not {SHA}, 3 times"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(server, tmp_path, plan, asked, message):
    server.plan = list(plan)
    with pytest.raises(UserError, match=message) as error:
        get(server, tmp_path)
    assert "\n" not in str(error.value)
    assert there(tmp_path) == {} and server.asked == asked


def test_a_file_that_is_there_is_not_asked_for_again(server, tmp_path):
    server.plan = ["truncates"] * 2
    with pytest.raises(UserError, match="the connection ended after 100000 of 262144 bytes, 2 times"):
        get(server, tmp_path, tries=2)
    assert there(tmp_path) == {}
    get(server, tmp_path)
    assert there(tmp_path) == {"a.csv": BODY}
    assert get(server, tmp_path) == "already there" and server.asked == 3


def test_another_file_in_its_place_is_never_touched(server, tmp_path):
    (tmp_path / "meld").mkdir()
    (tmp_path / "meld/a.csv").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"a\.csv: another file is in this place; move it away"):
        get(server, tmp_path)
    assert there(tmp_path) == {"a.csv": b"mine"} and server.asked == 0


def test_no_network_and_no_folder_are_one_line_each(server, tmp_path):
    gone = Remote("meld/a.csv", "http://127.0.0.1:9/a.csv", 5, SHA)
    with pytest.raises(UserError, match=r"127.0.0.1:9/a.csv: .*refused, 2 times in a row"):
        fetch(gone, tmp_path, tries=2, wait=0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="make room there or give another --to"):
        get(server, tmp_path / "file")


def test_the_waits_double(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.plan = ["500"] * 4
    get(server, tmp_path, tries=5, wait=0.5)
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_download_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "FILES", (server.remote,))
    status, out, err = run(monkeypatch, capsys, "download", "--to", tmp_path)
    first, request = out.splitlines()
    assert (status, first) == (0, f"{tmp_path / 'meld/a.csv'}: 262144 bytes, SHA-256 as pinned")
    assert "https://sail.usc.edu/iemocap/" in request and "Session1" in request and "EmoEvaluation" in request
    (tmp_path / "meld/a.csv").write_bytes(b"mine")
    status, out, err = run(monkeypatch, capsys, "download", "--to", tmp_path)
    assert status == 2 and re.fullmatch(r"error: .*another file.*\n", err)


def test_the_pinned_files_are_six_of_one_commit():
    paths = [remote.path for remote in download.FILES]
    assert paths == [
        *(f"meld/{split}_sent_emo.csv" for split in SPLITS),
        *(f"emorynlp/emorynlp_{split}_final.csv" for split in SPLITS),
    ]
    commit = "https://raw.githubusercontent.com/declare-lab/MELD/2d2011b409d3ca2d7e94460cd007d434b1d0a102/data/"
    ends = ("MELD/dev_sent_emo.csv", "emorynlp/emorynlp_dev_final.csv")
    assert [download.FILES[i].url for i in (1, 4)] == [commit + end for end in ends]


@needs_csv
def test_the_pinned_sizes_and_sums_are_those_of_the_files():
    for remote in download.FILES:
        content = (REAL / remote.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (remote.size, remote.sha256)


# audit


@needs_csv
def test_the_audit_of_the_real_files(monkeypatch, capsys):
    """Counted by other scripts before: holes, monologues, lines that MELD and EmoryNLP share (73 of 492, 208 of 1,483)."""
    words = [f"--data={name}={REAL / name}" for name in ("meld", "emorynlp")]
    status, out, _ = run(monkeypatch, capsys, "audit", *words, "--json")
    found = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    checks = found["checks"]
    assert {c["status"] for rows in checks.values() for c in rows.values()} == {"ok", "info"}
    assert checks["meld"]["samples"]["found"] == {"train": 9989, "dev": 1109, "test": 2610}
    assert checks["emorynlp"]["samples"]["found"] == {"train": 7551, "dev": 954, "test": 984}
    for name, what, numbers in (
        ("emorynlp", "dialogues with holes", (531, 72, 58)),
        ("emorynlp", "turns missing in holes", (1641, 251, 183)),
        ("emorynlp", "dialogues that begin late", (511, 74, 72)),
        ("meld", "dialogues that begin late", (10, 0, 0)),
        ("meld", "dialogues of one speaker", (96, 6, 21)),
        ("meld", "odd characters", (0, 0, 0)),
    ):
        assert checks[name][what]["found"] == dict(zip(SPLITS, numbers, strict=True)), what
    assert "train 312 and 698" in checks["meld"]["dialogues that repeat another"]["detail"]
    shared = found["shared_lines"]
    assert (shared["emorynlp/test"]["meld/train"], shared["emorynlp/test"]["emorynlp/test"]) == (73, 492)
    assert (shared["meld/test"]["emorynlp/train"], shared["meld/test"]["meld/test"]) == (208, 1483)
    status, out, _ = run(monkeypatch, capsys, "audit", *words)
    assert status == 0 and out.splitlines()[-1] == "checks: ok 22, differs 0"
    assert re.search(r"^samples +9989 +1109 +2610  ok$", out, re.MULTILINE)


@pytest.fixture
def small(tmp_path):
    """Invented rows in MELD's format: ids 1, 2, 5 in one dialogue of train, one dialogue of a group alone."""
    rows = {
        "train": [
            (3, 1, "Ann", "We never said that it was easy.", "joy"),
            (3, 2, "Bo", "Now the kettle is cold again, Ann.", "fear"),
            (3, 5, "Ann", "Caf\u00c3\u00a9?", "joy"),
            (4, 0, "All", "Hurray\u200b!", "joy"),
        ],
        "dev": [(0, 0, "Ann", "Hm.", "joy")],
        "test": [
            (0, 0, "Cy", "WE NEVER SAID - that it was easy", "joy"),
            (0, 1, "Dee", "Now the kettle is cold again, Ann?", "joy"),
            (1, 0, "Cy", "We never said that it was easy.", "joy"),
        ],
    }
    for split, lines in rows.items():
        text = "".join(f'1,"{text}",{who},{label},-,{d},{u},1,1,-,-\r\n' for d, u, who, text, label in lines)
        (tmp_path / f"{split}_sent_emo.csv").write_bytes((MELD_HEAD + text).encode())
    return tmp_path


def test_an_audit_of_other_files_shows_what_differs(small, monkeypatch, capsys):
    """Ids 1, 2, 5: one dialogue with a hole of two, beginning one late. Odd: one U+200B and one badly read é."""
    status, out, _ = run(monkeypatch, capsys, "audit", "--data", f"meld={small}", "--json")
    found = json.loads(out)
    rows = found["checks"]["meld"]
    seen = {what: tuple(row["found"].values()) for what, row in rows.items()}
    assert status == 0
    assert seen["samples"] == (4, 1, 3) and rows["samples"]["status"] == "differs"
    assert rows["samples"]["expected"] == {"train": 9989, "dev": 1109, "test": 2610}
    assert seen["label joy"] == (3, 1, 3) and seen["label disgust"] == (0, 0, 0)
    assert rows["SHA-256 of the file"]["status"] == "differs" and seen["line ends"] == ("CRLF",) * 3
    assert seen["odd characters"] == (2, 0, 0) and rows["odd characters"]["status"] == "differs"
    assert rows["odd characters"]["detail"] == "U+200B 1, \u00c3\u00a9 1"
    assert (seen["dialogues with holes"], seen["turns missing in holes"]) == ((1, 0, 0), (2, 0, 0))
    assert seen["dialogues that begin late"] == (1, 0, 0)
    assert seen["dialogues of one speaker"] == (1, 1, 1) and seen["turns of group speakers"] == (1, 0, 0)
    assert rows["turns of group speakers"]["detail"] == "All 1"
    assert found["shared_lines"]["meld/test"] == {"meld/train": 3, "meld/dev": 0, "meld/test": 3}
    assert found["shared_lines"]["meld/train"]["meld/test"] == 2
    assert found["overlap"]["meld"] == {
        "train dialogues": 2,
        "dropped by --drop_overlap": 1,
        "test samples": 3,
        "clean test samples": 1,
    }
    status, out, _ = run(monkeypatch, capsys, "audit", "--data", f"meld={small}")
    assert status == 0 and re.search(r"^samples +4 +1 +3  differs, expected 9989 1109 2610$", out, re.MULTILINE)
    assert re.search(r"^dialogues with holes +1 +0 +0  -$", out, re.MULTILINE)
    assert re.search(r"^meld/test +3 +0 +3$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "checks: ok 0, differs 11"


def test_dialogues_that_repeat_another():
    """Two long lines in common, in one split; short ones and one alone do not count."""
    long, other = "We never said that it was easy.", "Now the kettle is cold again, Ann."

    def talk(name, *texts):
        return Dialogue(name, "w", "train", tuple(Turn("Ann", text) for text in texts))

    made = [talk("a", long, other, "Oh."), talk("b", long, "Oh."), talk("c", other.upper(), long), talk("d", long, long)]
    assert check.repeats(made) == [("a", "c")]


def test_an_audit_of_jsonl_expects_nothing_but_clean_characters(tmp_path, monkeypatch, capsys):
    turns = [{"speaker": "Ann", "text": "Hi.", "label": "joy"}, {"speaker": "Bo", "text": "Ho.", "label": None}]
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"id": "d", "turns": turns}))
    status, out, _ = run(monkeypatch, capsys, "audit", "--data", f"mine={tmp_path}", "--json")
    rows = json.loads(out)["checks"]["mine"]
    assert status == 0 and rows["samples"] == {"found": dict.fromkeys(SPLITS, 1), "expected": None, **INFO}
    assert rows["turns without a label"]["found"] == dict.fromkeys(SPLITS, 1)
    assert [what for what, row in rows.items() if row["status"] != "info"] == ["odd characters"]


INFO = {"status": "info", "detail": ""}


@pytest.mark.parametrize(
    "text, odd",
    [
        ("Caf\u00e9 \u2019s \U0001f468\u200d\U0001f469\r\n\t", {}),
        ("a\x92b\x92", {"U+0092": 2}),
        ("\ufffd \u200b\x00\ue000", {"U+FFFD": 1, "U+200B": 1, "U+0000": 1, "U+E000": 1}),
        ("don\u00e2\u20ac\u2122t Caf\u00c3\u00a9", {"\u00e2\u20ac": 1, "\u00c3\u00a9": 1}),
    ],
)
def test_odd_characters(text, odd):
    assert dict(check.odd_characters(text)) == odd


@pytest.mark.parametrize("words", ["meld={0}", "iemocap={0}", "mine={0}", "meld", "meld={0}/file", "meld=x meld=x", ""])
def test_rubbish_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "file").write_text("rubbish")
    (tmp_path / "rubbish.csv").write_bytes(b"\xff\xfe\x00")
    for command in ("audit", "stats"):
        given = [part for word in words.split() for part in ("--data", word.format(tmp_path))]
        status, out, err = run(monkeypatch, capsys, command, *given)
        assert (status, out) == (2, "") and re.fullmatch(r"error: .*\n", err), err


def iemocap_release(root):
    """Five dialogues of one turn each; that of session 1 is a promoted one."""
    for session in range(1, 6):
        name = f"Ses0{session}F_impro01"
        for part in ("transcriptions", "EmoEvaluation"):
            (root / f"Session{session}/dialog" / part).mkdir(parents=True)
        spoken = root / f"Session{session}/dialog/transcriptions/{name}.txt"
        spoken.write_text(f"{name}_F000 [001.0-002.0]: Well.\n")
        votes = "C-E1:\tHappiness;\t()\nC-E2:\tSadness;\t()\nC-F1:\tHappiness;\t()\n"
        rating = f"[1.0 - 2.0]\t{name}_F000\t{'xxx' if session == 1 else 'neu'}\t[2.5, 2.5, 2.5]\n{votes}"
        spoken.parent.with_name("EmoEvaluation").joinpath(spoken.name).write_text(rating)
    return root


def test_iemocaps_self_check_is_shown_by_stats_and_audit(tmp_path, monkeypatch, capsys):
    root = iemocap_release(tmp_path / "IEMOCAP_full_release")
    text = "\n".join(f"Ses0{session}F_impro01 1" for session in range(1, 6))
    digest = hashlib.sha256(text.encode()).hexdigest()
    words = ("--data", f"iemocap={tmp_path}")
    for expected, verdict in ((None, "failed"), (digest, "passed")):
        if expected:
            monkeypatch.setattr("corpora.iemocap.FINGERPRINT", expected)
        status, out, _ = run(monkeypatch, capsys, "stats", *words)
        assert (status, out.splitlines()[-1]) == (0, f"iemocap: self-check {verdict} (SHA-256 {digest})")
        assert "iemocap/train: 3 dialogues, 3 samples" in out and "iemocap/test: 1 dialogues, 1 samples" in out
        status, out, _ = run(monkeypatch, capsys, "audit", *words)
        assert status == 0 and re.search(rf"^self-check +{verdict} .*\(SHA-256 {digest}\)$", out, re.MULTILINE)
    status, out, _ = run(monkeypatch, capsys, "audit", *words, "--json")
    rows = json.loads(out)["checks"]["iemocap"]
    assert rows["promoted to happy"]["found"] == {"train": 1, "dev": 0, "test": 0}
    assert rows["promoted to happy"]["expected"] == {"train": 51, "dev": 1, "test": 1}
    assert rows["rated turns of the release"]["found"] == {"all": 5}
    assert rows["rated turns of the release"]["status"] == "differs"
    assert rows["undecided with a majority"]["status"] == "ok" and root.exists()


# stats


def test_stats(tmp_path, monkeypatch, capsys):
    turns = [("Ann", "Hi.", "joy"), ("Bo", "Ho.", "fear"), ("Bo", "Ha.", "joy")]
    rows = [dict(zip(("speaker", "text", "label"), turn, strict=True)) for turn in turns]
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"id": "d1", "turns": rows}))
    status, out, _ = run(monkeypatch, capsys, "stats", "--data", f"mine={tmp_path}")
    text = out.splitlines()
    assert text[:3] == ["mine/train: 1 dialogues, 3 samples", "  labels: joy 2, fear 1", "  responders: prev 2, next 1"]
    assert re.fullmatch(r"  words per prompt: mean \d+, p50 \d+, p95 \d+, max \d+", text[3])
    assert (status, len(text)) == (0, 12)
