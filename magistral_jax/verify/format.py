r"""The format gate of the reward: thoughts in tags, then an answer with a box or a code block (report §2.2.1).

In: the text of a completion. Out: its parts, or the rule that it breaks. All scans take time linear in the text,
whatever the text: completions are long and may be hostile.
"""

import dataclasses
import enum
import re
from collections.abc import Iterator


class FormatFault(enum.Enum):
    """The first rule of the format that a completion breaks."""

    NO_OPENING_TAG = "no_opening_tag"
    NO_CLOSING_TAG = "no_closing_tag"
    REPEATED_TAG = "repeated_tag"
    NO_BOXED_ANSWER = "no_boxed_answer"
    NO_CODE_BLOCK = "no_code_block"
    NO_ANSWER = "no_answer"  # where no format is asked for, nothing at all looks like an answer


@dataclasses.dataclass(frozen=True)
class Sections:
    """A completion cut at its tags; neither part contains a tag."""

    thoughts: str
    answer: str


@dataclasses.dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its language tag in lower case, and its lines."""

    language: str
    source: str


def split_completion(text: str, think_open: str, think_close: str) -> Sections | FormatFault:
    """Cut a completion into thoughts and answer.

    The completion starts with the opening tag itself. White space before it is a fault too: the policy writes the
    first character, so tolerance would only teach it a second form. Each tag occurs once; empty thoughts are allowed.
    """
    if not text.startswith(think_open):
        return FormatFault.NO_OPENING_TAG
    thoughts, close, answer = text[len(think_open) :].partition(think_close)
    if not close:
        return FormatFault.NO_CLOSING_TAG
    if think_open in thoughts or think_open in answer or think_close in answer:
        return FormatFault.REPEATED_TAG
    return Sections(thoughts, answer)


_BOX_COMMAND = r"\\(?:boxed|fbox)(?![A-Za-z])"
_BOX_TOKEN = re.compile(
    rf"(?P<open_box>{_BOX_COMMAND}\s*\{{)"
    rf"|(?P<bare_box>{_BOX_COMMAND}[ \t]*(?P<bare>[^\s${{}}\\]\S*?|\\[A-Za-z]\S*?)(?=[\s$]|\\\)|\\\]|[.,;]?\Z|[.,;]\s))"
    r"|(?P<escape>\\.)"
    r"|(?P<brace>[{}])",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Box:
    r"""A `\boxed` or `\fbox` in a text: where it starts and ends, and what is in it."""

    start: int
    end: int
    content: str
    content_start: int


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed` or `\fbox` in the text, or None where there is none.

    Braces nest, and escaped braces (`\{`) do not count. A box whose brace is never closed is no box. Without braces,
    `\boxed 42$` holds what runs up to the next white space or end of the formula. Of nested boxes the inner one, which
    starts last, is taken.
    """
    last = max(find_boxes(text), key=lambda box: box.content_start, default=None)
    return None if last is None else last.content


def find_boxes(text: str) -> Iterator[Box]:
    """All boxes that are closed, an inner one before the one around it."""
    open_braces: list[tuple[int, int] | None] = []  # where a box and its content start; None for any other brace
    for token in _BOX_TOKEN.finditer(text):
        if token["open_box"]:
            open_braces.append((token.start(), token.end()))
        elif token["bare_box"]:
            yield Box(token.start(), token.end(), token["bare"].strip(), token.start("bare"))
        elif token["brace"] == "{":
            open_braces.append(None)
        elif token["brace"] == "}" and open_braces:
            opening = open_braces.pop()
            if opening is not None:
                start, content_start = opening
                yield Box(start, token.end(), text[content_start : token.start()].strip(), content_start)


_FENCE = re.compile(r"^ {0,3}(?P<marks>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*?)[ \t]*$")


def first_code_block(text: str, default_language: str = "") -> CodeBlock | None:
    """The first fenced block that has a language tag and is closed, or None.

    Fences follow Markdown: three or more backticks or tildes, closed by at least as many of the same alone on a line.
    Blocks without a tag are of the default language; where there is none, they are passed over.
    """
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):  # not splitlines: a form feed is part of a line
        fence = _FENCE.match(line)
        if opening is None:
            if fence:
                opening, lines = fence, []
        elif fence and not fence["info"] and fence["marks"].startswith(opening["marks"]):
            if language := opening["info"] or default_language:
                return CodeBlock(language.split()[0].lower(), "\n".join(lines) + "\n")
            opening = None
        else:
            lines.append(line)
    return None
