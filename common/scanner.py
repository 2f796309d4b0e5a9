"""A cursor over Python or JSON strings, numbers and dictionaries. Never evaluates, never goes back: linear on every text."""

import re
from collections.abc import Iterator

# Possessive repeats (*+ and ++) never go back over what they took: linear on every text.
STRING = re.compile(r"""\s*+('(?:[^'\\\r\n]|\\.)*+'|"(?:[^"\\\r\n]|\\.)*+")""")
WORD = re.compile(r"""\s*+([^\s'"{}:,]++)""")
SIGN, OPEN, CLOSE, COLON = map(re.compile, (r"\s*+(\S)", r"\s*+({)", r"\s*+(})", r"\s*+(:)\s*+"))
NUMBER = re.compile(r"((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
ESCAPES = dict(zip("\\'\"/abfnrtv", "\\'\"/\a\b\f\n\r\t\v", strict=True))


class Broken(Exception):
    """Reason and detail of a `Failure`."""


class Scanner:
    """A cursor that reads Python or JSON strings, numbers and dictionaries; each step moves on or ends the reading."""

    def __init__(self, text: str, position: int) -> None:
        self.text, self.position = text, position

    def take(self, pattern: re.Pattern[str], what: str, reason: str = "dictionary") -> str:
        """What `pattern` finds here. Fails for `reason`; at the end of the text and at an open quote, as `dictionary`."""
        match = pattern.match(self.text, self.position)
        if not match:
            sign = SIGN.match(self.text, self.position)
            cut = sign is None or (pattern is STRING and sign[1] in "'\"")
            raise Broken("dictionary" if cut else reason, f"{what} expected at character {self.position}")
        self.position = match.end()
        return match[1]

    def skip(self, sign: str) -> bool:
        """Whether the next sign is this one; it is passed then."""
        match = SIGN.match(self.text, self.position)
        if match and match[1] == sign:
            self.position = match.end()
        return match is not None and match[1] == sign

    def string(self, reason: str = "dictionary") -> str:
        """The next string: what it stands for."""
        text = ESCAPE.sub(_unescaped, self.take(STRING, "a string", reason)[1:-1])
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON may write one character as two halves
        except UnicodeDecodeError:
            raise Broken("dictionary", "half a surrogate pair") from None

    def entries(self, reason: str = "dictionary") -> Iterator[str]:
        """The keys of the next dictionary. Whoever takes a key has to read its value before taking the next."""
        self.take(OPEN, "{", reason)
        while not self.skip("}"):
            key = self.string()
            self.take(COLON, ":")
            yield key
            if not self.skip(","):
                self.take(CLOSE, "}")
                return


def _unescaped(match: re.Match[str]) -> str:
    code = int(match[1] or match[2] or match[3] or "110000", 16)
    if code < 0x110000:
        return chr(code)
    if match[4] not in ESCAPES:
        raise Broken("dictionary", f"unknown escape {match[0]}")
    return ESCAPES[match[4]]
