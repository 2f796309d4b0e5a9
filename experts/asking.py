"""Asking an expert: an OpenAI-compatible endpoint or a Hugging Face folder, and the cache that keeps every answer.

An answer is written down the moment it is there, so a stopped job goes on where it was and nothing is paid for twice.
"""

import asyncio
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

import data
from common.draws import stable_hash
from common.errors import UserError
from common.flags import Dtype
from common.hub import eos_ids, openable, quiet_transformers
from common.template import day, remarks, render, written
from common.text import clean
from data import MAX_BYTES
from engine.processes import computing, device, device_memory
from experts import responses
from experts.cache import Cache
from experts.responses import Reply, Unanswered, read_completion
from model import Policy
from rollout import generate

if TYPE_CHECKING:
    import openai

Chat = list[dict[str, str]]
Encoded = tuple[list[int], str]  # a prompt's ids, and what the template has begun of the answer
KEPT = "what was answered is kept, the same command goes on"
GIVE_UP = 8  # requests in a row without an answer, after which the endpoint is taken to be down
OTHER_LIMIT = "max_completion_tokens"  # what newer servers call max_tokens
MAX_BODY = 2**25  # bytes of a response that are read
CHUNK = 32  # prompts that a local expert answers between two writes to the cache


@dataclass(frozen=True)
class Settings:
    """How an expert is asked. The first three decide what it says, and with model and prompt they are the cache's key.

    A prompt holds the date where a local expert's chat template shows one; it is the same one for all that is asked.
    """

    temperature: float = 1.0  # 0 is greedy.
    max_new_tokens: int = 2048  # Longest answer, in tokens.
    seed: int = 0  # Of the shuffle of the prompts and of a local expert; another seed asks anew.
    concurrency: int = 8  # Requests under way at once.
    retries: int = 8
    """Of a request after 408, 409, 425, 429, 5xx, a timeout, a cut connection; pauses double to 8 s, or are the server's."""
    timeout: float = 300.0  # Seconds a try may be silent; all tries of a request together have four times as many.
    date: str = ""  # That the chat template of a folder shows, YYYY-MM-DD; default: today. Endpoints have their own.

    def __post_init__(self) -> None:
        object.__setattr__(self, "date", day(self.date))


Keep = Callable[[int, Reply | Unanswered], None]


# Endpoints


@dataclass(frozen=True)
class Endpoint:
    """A model behind POST {url}/chat/completions.

    `name` is the model's, by which a request asks for it; `price` is that of a million tokens: prompt, answer.
    """

    name: str
    url: str
    price: tuple[float, float] = (0.0, 0.0)
    key: str = field(default="", repr=False)  # out of every message; local servers want none
    control: Sequence[str] = ()  # nobody knows the control tokens behind an endpoint
    limit: list[str] = field(default_factory=lambda: ["max_tokens"], compare=False, repr=False)
    """What the server calls the longest answer; the last one holds, as learnt from its refusals."""

    @property
    def identity(self) -> str:
        """The model's part of the cache's key: its name, because a server may move."""
        return self.name

    def asked(self, chat: Chat, settings: Settings) -> Chat | str:
        """The prompt's part of the cache's key: what is sent."""
        return chat

    def answer(self, chats: Sequence[Chat], settings: Settings, keep: Keep) -> None:
        """Hand the answer to chat number i to `keep` as soon as it is there, `settings.concurrency` asked at once.

        Raises `UserError` where going on makes no sense.
        """
        asyncio.run(self.answer_all(chats, settings, keep))

    async def answer_all(self, chats: Sequence[Chat], settings: Settings, keep: Keep) -> None:
        """What `answer` does, inside an event loop."""
        gate, failed = asyncio.Semaphore(settings.concurrency), 0

        async def one(client: "openai.AsyncOpenAI", i: int) -> None:
            nonlocal failed
            async with gate:
                reply = await self.request(client, chats[i], settings)
                keep(i, reply)
                failed = failed + 1 if isinstance(reply, Unanswered) else 0
                if isinstance(reply, Unanswered) and failed >= GIVE_UP:
                    mend = "it will refuse them again, mend what it names" if reply.lasting else "try again later"
                    raise UserError(f"{self.url} failed {failed} times in a row ({reply.why}): {mend}; {KEPT}")

        try:
            async with connect(self.url, self.key, settings) as client, asyncio.TaskGroup() as group:
                for i in range(len(chats)):
                    group.create_task(one(client, i))
        except ExceptionGroup as several:  # the first error has stopped the other requests
            raise several.exceptions[0] from None

    async def request(self, client: "openai.AsyncOpenAI", chat: Chat, settings: Settings) -> Reply | Unanswered:
        """The answer to one chat, retries included. Raises `UserError` where no other chat would fare better."""
        import openai

        asked: Any = {"model": self.name, "messages": chat, "temperature": settings.temperature}
        try:
            async with asyncio.timeout(4 * settings.timeout):
                reply = read_completion(await self.sent(client, asked, settings.max_new_tokens))
            return replace(reply, why=self.brief(reply.why)) if isinstance(reply, Unanswered) else reply
        except openai.APIStatusError as error:
            return self.refused(error, settings.temperature)
        except (openai.OpenAIError, OSError) as error:  # the latter: no end in time, or in size
            return Unanswered(self.brief(f"{str(error) or 'no whole answer in time'} {error.__cause__ or ''}"))

    async def sent(self, client: "openai.AsyncOpenAI", asked: Any, longest: int) -> str:
        """The body of the response; asked once more where the server wants the longest answer under its other name."""
        import openai

        create: Any = client.chat.completions.with_raw_response.create
        name = self.limit[-1]
        try:
            return str((await create(**asked, **{name: longest})).http_response.text)
        except openai.APIStatusError as error:
            if error.status_code not in (400, 422) or name == OTHER_LIMIT or OTHER_LIMIT not in error.response.text:
                raise
        raw = await create(**asked, **{OTHER_LIMIT: longest})
        self.limit.append(OTHER_LIMIT)
        return str(raw.http_response.text)

    def refused(self, error: "openai.APIStatusError", temperature: float) -> Unanswered:
        """A status that is no answer. Raises `UserError` for one that every request of the job would get."""
        status, body = error.status_code, error.response.text
        why = self.brief(f"HTTP {status}: {responses.complaint(body)}".removesuffix(": "))
        if mend := responses.mend_of(status, body, {error.code, error.type}, error.param, temperature):
            raise UserError(f"{self.url}, model {self.name}: {why}; {mend}; {KEPT}") from None
        return Unanswered(why, lasting=status < 500 and status not in responses.PASSING)

    def brief(self, text: str) -> str:
        """An error of the server in one line, without the key that some servers send back."""
        return clean(text.replace(self.key, "***") if self.key else text)[: responses.LONGEST_WHY]


def connect(url: str, key: str, settings: Settings) -> "openai.AsyncOpenAI":
    """A client of the library, which times out and retries, with a limit on how much it reads."""
    import httpx2  # comes with openai
    import openai

    @dataclass
    class Limited(httpx2.AsyncByteStream):
        stream: httpx2.AsyncByteStream

        async def __aiter__(self) -> Any:
            size = 0
            async for part in self.stream:
                size += len(part)
                if size > MAX_BODY:
                    raise OSError(f"more than {MAX_BODY} bytes")
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def limit(response: httpx2.Response) -> None:
        response.stream = Limited(response.stream)  # type: ignore[arg-type]
        if response.status_code == 425:
            response.headers["x-should-retry"] = "true"  # the library goes by this header, and would not ask again
        if response.status_code == 429:
            await response.aread()
            if any(word in response.text for word in responses.EMPTY):
                response.headers["x-should-retry"] = "false"

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [limit]})
    return openai.AsyncOpenAI(
        api_key=key or "none", base_url=url, timeout=settings.timeout, max_retries=settings.retries, http_client=http
    )


# Local folders


@dataclass(frozen=True)
class Local:
    """A Hugging Face folder (or hub name), run by our own `rollout.generate`. `price` as of an `Endpoint`."""

    name: str
    folder: str
    tokenizer: Any
    price: tuple[float, float] = (0.0, 0.0)

    @property
    def identity(self) -> str:
        """The model's part of the cache's key: the folder's name with sizes and times of its weights.

        What was trained again is another model.
        """
        found = sorted(x for kind in ("safetensors", "bin") for x in Path(self.folder).glob(f"*.{kind}"))
        return " ".join([self.name, *(f"{x.name}:{x.stat().st_size}:{x.stat().st_mtime_ns}" for x in found)])

    @property
    def control(self) -> Sequence[str]:
        """Texts of the tokenizer's control tokens."""
        return data.control_tokens(self.tokenizer)

    def asked(self, chat: Chat, settings: Settings) -> Chat | str:
        """The prompt's part of the cache's key: what its chat template writes."""
        return written(self.tokenizer, chat, settings.date)

    def answer(self, chats: Sequence[Chat], settings: Settings, keep: Keep) -> None:
        """Hand the answer to chat number i to `keep`, `CHUNK` answers at a time.

        Raises `UserError` where the model cannot be opened or computes NaN.
        """
        replies_to = open_local(self.folder, self.tokenizer)
        for line in remarks(self.tokenizer, settings.date):
            print(line, file=sys.stderr, flush=True)
        for first in range(0, len(chats), CHUNK):
            part = chats[first : first + CHUNK]
            encoded = [render(self.tokenizer, chat, settings.date) for chat in part]
            replies = replies_to(encoded, [cache_key(self, chat, settings) for chat in part], settings)
            for i, reply in enumerate(replies, first):
                keep(i, reply)


Expert = Endpoint | Local


def open_local(
    folder: str, tokenizer: Any, *, kv_budget: int | None = None, progress: bool = False, dtype: Dtype = "auto"
) -> Callable[[Sequence[Encoded], Sequence[str], Settings], list[Reply]]:
    """Open a local model: a function of prompts, of a name for each prompt's random stream, and of settings.

    `kv_budget`: bytes for keys and values, default half of the device's memory. `dtype`: as --dtype of a run. Raises
    `UserError` where the model cannot be opened; the function raises it where the model computes NaN.
    """
    quiet_transformers()
    policy, stops = Policy.load(folder, computing(dtype), device()).eval(), eos_ids(folder, tokenizer)

    def replies_to(encoded: Sequence[Encoded], names: Sequence[str], settings: Settings) -> list[Reply]:
        try:
            groups = generate(
                policy, [ids for ids, _ in encoded], n=1, max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature, eos_ids=stops, keys=[(settings.seed, 0, name) for name in names],
                kv_budget=kv_budget or device_memory(policy.device) // 2, progress=progress,
            )
        except FloatingPointError as error:
            raise UserError(f"{folder}: {error}; take another model") from None
        replies = []
        for (ids, prefix), (said,) in zip(encoded, groups, strict=True):
            text = data.answer_text(tokenizer, said.ids, stops, prefix)
            replies.append(Reply(text[: MAX_BYTES + 1], said.finished, (len(ids), len(said.ids))))
        return replies

    return replies_to


# Which experts


def is_url(place: str) -> bool:
    """Whether a place is an endpoint; every other one is a Hugging Face folder."""
    return re.match(r"https?://", place) is not None


def open_experts(
    places: Sequence[str],
    models: Sequence[str] = (),
    prices: Sequence[str] = (),
    *,
    flags: tuple[str, str] = ("--expert", "--expert_model"),
) -> list[Expert]:
    """The experts of two flags, for places and for names (one per endpoint, in order), and of --price.

    The n-th expert's key is the environment variable OPENAI_API_KEY_n, else OPENAI_API_KEY. Raises `UserError`.
    """
    urls = list(filter(is_url, places))
    if not places or len(urls) != len(models):
        raise UserError(f"{len(places)} {flags[0]}, {len(urls)} of them URLs, and {len(models)} {flags[1]}: one per URL")
    if prices and len(prices) != len(places):
        raise UserError(f"{len(prices)} --price and {len(places)} {flags[0]}: give one each, in the same order")
    named, found = iter(models), list[Expert]()
    for n, place in enumerate(places, 1):
        price = read_price(prices[n - 1]) if prices else (0.0, 0.0)
        if is_url(place):
            check_url(place, flags[0])
            key = os.environ.get(f"OPENAI_API_KEY_{n}") or os.environ.get("OPENAI_API_KEY", "")
            found.append(Endpoint(next(named), place, price, key))
        else:
            found.append(Local(Path(place).resolve().name, place, openable(place), price))
    if len({expert.name for expert in found}) < len(found):
        raise UserError(f"two experts are called the same ({', '.join(x.name for x in found)}): their answers would mix")
    return found


def check_url(place: str, flag: str) -> None:
    """Raise `UserError` for a URL with more than scheme, host and path, and where the package that asks it is missing."""
    parts = urlsplit(place)
    if not parts.hostname or "@" in parts.netloc or parts.query:
        raise UserError(f"{flag} URL is scheme, host and path alone; a key comes from OPENAI_API_KEY")
    if importlib.util.find_spec("openai") is None:  # nothing but an endpoint needs it
        raise UserError("an endpoint needs the openai package: pip install -r requirements-extra.txt")


def read_price(text: str) -> tuple[float, float]:
    """The two prices of PROMPT,ANSWER, as --price has them."""
    prices = [float(x) for x in text.split(",") if re.fullmatch(r"\d+(\.\d+)?", x)]
    if len(prices) != 2 or text.count(",") != 1:
        raise UserError(f"--price {text}: give PROMPT,ANSWER a million tokens, such as 0.27,1.1")
    return prices[0], prices[1]


# Names of what is kept


def beside(out: Path, ending: str) -> Path:
    """The file that stands beside the file --out under the same name with one more ending."""
    return out.with_name(f"{out.name}.{ending}")


def cache_key(expert: Expert, chat: Chat, settings: Settings) -> str:
    """Hash of prompt, model and the settings that decide the answer."""
    parts = [expert.asked(chat, settings), expert.identity, settings.temperature, settings.max_new_tokens, settings.seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Asking


def ask(expert: Expert, chats: Sequence[Chat], settings: Settings, cache: Cache) -> list[Reply | Unanswered]:
    """The answer to every chat, from the cache where it is there, and one line that says what it cost."""
    keys = [cache_key(expert, chat, settings) for chat in chats]
    missing = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in cache.known}
    order, failed, started = list(missing), dict[str, Unanswered](), set(cache.known)

    def keep(i: int, reply: Reply | Unanswered) -> None:
        if isinstance(reply, Unanswered):
            failed[order[i]] = reply
        else:
            cache.add(order[i], expert.name, reply)
        bar.update()

    try:
        with tqdm(total=len(missing), desc=expert.name, unit="answer", disable=None) as bar:
            if missing:
                expert.answer(list(missing.values()), settings, keep)
    finally:
        replies = {key: cache.known[key] for key in keys if key in cache.known}
        new = [reply for key, reply in replies.items() if key not in started]
        print(cost_line(expert, list(replies.values()), new, len(failed)), flush=True)
    return [replies.get(key) or failed[key] for key in keys]


def cost_line(expert: Expert, replies: Sequence[Reply], new: Sequence[Reply], failed: int) -> str:
    """Answers, tokens and, with a price, money: of this call, and with what the cache had before."""

    def cost(part: Sequence[Reply]) -> str:
        tokens = [sum(reply.tokens[i] for reply in part) for i in (0, 1)]
        money = sum(n * price for n, price in zip(tokens, expert.price, strict=True)) / 1e6
        return f"{tokens[0]:,} + {tokens[1]:,} tokens" + f" ({money:.4f})" * any(expert.price)

    silent = sum(not any(reply.tokens) for reply in replies)
    counts = f"{len(new)} new answers, {len(replies) - len(new)} from the cache, {failed} prompts without an answer"
    untold = f"; {silent} answers came without a count" * (silent > 0)
    return f"expert {expert.name}: {counts}; prompt + answer: {cost(new)} now, {cost(replies)} in all{untold}"


def ask_drawn(
    experts: Sequence[Expert], chats: Mapping[str, Callable[[Sequence[str]], Chat]], settings: Settings, cache: Cache
) -> dict[str, Reply | Unanswered]:
    """One answer per id; of several experts each id draws one by its hash (D28).

    `chats`: how the prompt of each id is made, from the expert's control tokens.
    """
    found: dict[str, Reply | Unanswered] = {}
    for n, expert in enumerate(experts):
        mine = [name for name in chats if stable_hash(name) % len(experts) == n]
        found |= zip(mine, ask(expert, [chats[name](expert.control) for name in mine], settings, cache), strict=True)
    return found
