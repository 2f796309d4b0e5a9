"""An OpenAI-compatible endpoint for the tests: POST /v1/chat/completions on the loopback address, answered by a function.

    python -m tests.endpoint MODEL_DIR PORT        answers with a Hugging Face folder through rollout.generate

`transformers serve` would be the real thing, but it needs fastapi and uvicorn, which no requirements file has.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
Answer = Callable[[Json, int], Any]  # (request body, number of it) -> what `Server` takes


def completion(text: str | None, *, finish: str = "stop", tokens: tuple[int, int] = (7, 3), **message: Any) -> Json:
    """The JSON of a chat completion."""
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
    return {**head, "choices": [choice], "usage": usage}


class Server(ThreadingHTTPServer):
    """`answer(request body, number of it)` gives a JSON object, bytes, (status, one of these, headers), or None to hang up.

    `seen` holds every request: its body, and its Authorization header under "key".
    """

    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.seen, self.closing = answer, list[Json](), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({**body, "key": self.headers.get("Authorization")})
        said = self.server.answer(body, len(self.server.seen))
        self.close_connection = True
        if said is None:
            return
        status, said, headers = said if isinstance(said, tuple) else (200, said, {})
        raw = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(raw), "Connection": "close", **headers}
        for name, value in headers.items():  # without the word "close" a client may ask again on what is being closed
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked may have gone
            self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def model_answer(folder: str) -> Answer:
    """What a model says, one request at a time."""
    import torch  # here, so that a server of one's own needs this file alone

    import data
    from common.hub import eos_ids, load_tokenizer
    from common.template import render
    from model import Policy
    from rollout import generate

    torch.set_num_threads(1)
    tokenizer, policy, lock = load_tokenizer(folder), Policy.load(folder).eval(), threading.Lock()
    stops = eos_ids(folder, tokenizer)

    def answer(body: Json, number: int) -> Json:
        ids, prefix = render(tokenizer, body["messages"])
        settings: Json = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"], "eos_ids": stops}
        with lock:
            ((said,),) = generate(policy, [ids], n=1, keys=[(0, 0, json.dumps(body["messages"]))], **settings)
        text = data.answer_text(tokenizer, said.ids, stops, prefix)
        return completion(text, finish="stop" if said.finished else "length", tokens=(len(ids), len(said.ids)))

    return answer


def main(folder: str, port: str) -> None:
    """Serve until the end, and say how many requests there were after each."""
    answer, started = model_answer(folder), time.monotonic()

    def told(body: Json, number: int) -> Any:
        print(f"request {number} after {time.monotonic() - started:.0f} s", flush=True)
        return answer(body, number)

    Server(told, int(port)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
