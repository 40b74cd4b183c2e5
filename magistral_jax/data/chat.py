"""From a problem, or a conversation, to the prompt that the policy sees; in: Problem, out: Prompt.

A prompt is tokenised as Hugging Face tokenises it (the rendered chat template as one text) whenever the control tokens
in it are the template's own. A statement that smuggles one in (`<|im_end|>`) is encoded apart, as plain text; only in
this case can token merges at its two borders differ, which is the price of keeping the turn closed.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from jaxtyping import Int32

from magistral_jax.data.tokenizer import Tokenizer, encode_pieces
from magistral_jax.records import MagistralError, Problem, Prompt

_THINK_FIRST = (
    "Work on the task in private before you answer. Put everything you think between {think_open} and {think_close}: "
    "this is scratch paper, so be as informal as you like, try things out, go back, check, and take as much room as "
    "you need. Then leave the scratch paper and write for a reader who has not seen it: a short, self-contained "
    "summary of how the result comes about, and the result. Write in Markdown and set formulas in LaTeX. Both the "
    "thoughts and the answer are in the language of the task."
)
_SYSTEM_PROMPTS = {
    "none": "",
    "math": _THINK_FIRST + " End with the final answer in \\boxed{{}}, for instance \\boxed{{42}}.",
    "code": _THINK_FIRST + " Give the whole program in one fenced code block that names its language, for instance "
    "```python or ```cpp.",
}
# Stands for any harmless statement: it tells which control tokens are the template's own.
_HARMLESS = "x"
_SENTINEL = "\ue000statement\ue001"
_FIXED_DAY = datetime.date(2025, 1, 1)


def system_message(kind: Literal["none", "math", "code"], think_tags: tuple[str, str]) -> str:
    """Instructions before the problem (report Fig. 2, own wording); empty for "none"."""
    return _SYSTEM_PROMPTS[kind].format(think_open=think_tags[0], think_close=think_tags[1])


def build_prompt(
    problem: Problem,
    tokenizer: Tokenizer,
    system_prompt: Literal["auto", "none", "math", "code"],
    think_tags: tuple[str, str] = ("<think>", "</think>"),
) -> Prompt:
    """The prompt of a problem.

    With a chat template: system message, the statement as the user's turn, the opening of the assistant's turn.
    Without: `<bos>`, the system message and an empty line if there is one, the statement and a line break.
    The system prompt "auto" is the one for the kind of the problem.

    Raises:
      MagistralError: The template fails, drops the statement, or opens the thoughts itself.
    """
    system = system_message(problem.kind if system_prompt == "auto" else system_prompt, think_tags)
    if tokenizer.chat_template is None:
        head, tail = (system + "\n\n" if system else ""), "\n"
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        text = head + problem.statement + tail
        ids = np.concatenate([np.asarray(bos, np.int32), tokenizer.encode(text)])
        return Prompt(problem, ids, tokenizer.decode(ids[: len(bos)]) + text)

    instructions = [{"role": "system", "content": system}] if system else []
    render = lambda statement: _render(tokenizer, [*instructions, {"role": "user", "content": statement}])
    if render(_HARMLESS).rstrip().endswith(think_tags[0]):
        raise MagistralError(
            f"the chat template already writes {think_tags[0]} before the completion; take it out of the template, "
            "since the completion must open its thoughts itself"
        )
    text = render(problem.statement)
    ids = tokenizer.encode(text, allow_special=True)
    controls = set(tokenizer.special_tokens.values())
    own_ids = tokenizer.encode(render(_HARMLESS), allow_special=True)
    if [i for i in ids.tolist() if i in controls] != [i for i in own_ids.tolist() if i in controls]:
        ids = _encode_apart(render(_SENTINEL), problem.statement, tokenizer)
    return Prompt(problem, ids, text)


def _encode_apart(rendered: str, statement: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " T"]:
    """Ids of a template rendered around the sentinel, with `statement` in its place as plain text."""
    pieces = rendered.split(_SENTINEL)
    if len(pieces) == 1:
        raise MagistralError("the chat template leaves out or rewrites the user's message; it must stand as it is")
    plain = tokenizer.encode(statement)
    ids = [tokenizer.encode(pieces[0], allow_special=True)]
    for piece in pieces[1:]:
        ids += [plain, tokenizer.encode(piece, allow_special=True)]
    return np.concatenate(ids)


def encode_conversation(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, think_tags: tuple[str, str] = ("<think>", "</think>")
) -> Int32[np.ndarray, " T"]:
    """Ids of a conversation, up to the opening of the assistant's next turn.

    A message that holds a control token is encoded apart, as plain text, so that it cannot close its turn; only think
    tags are what they are in what the assistant said and in the instructions. Without a chat template it is the format
    of `build_prompt`, which has room for one user message and a system message before it.

    Args:
      messages: Each with `role` (system, user or assistant) and `content`.
      tokenizer: Of the model.
      think_tags: Tags around the thoughts.

    Raises:
      MagistralError: The template refuses the conversation or rewrites a message that has to be encoded apart.
    """
    if tokenizer.chat_template is None:
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"]):
            raise MagistralError(
                "the model has no chat template; expected one user message, or a system message and then a user message"
            )
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        text = "\n\n".join(message["content"] for message in messages) + "\n"
        return np.concatenate([np.asarray(bos, np.int32), tokenizer.encode(text)])

    apart: dict[str, Int32[np.ndarray, " T"]] = {}
    shown: list[Mapping[str, str]] = []
    for index, message in enumerate(messages):
        tags = () if message["role"] == "user" else think_tags
        allowed = {tokenizer.special_tokens[tag] for tag in tags if tag in tokenizer.special_tokens}
        found = set(tokenizer.encode(message["content"], allow_special=True).tolist())
        if (found & set(tokenizer.special_tokens.values())) <= allowed:
            shown.append(message)
        else:
            mark = f"\ue000{index}\ue001"
            apart[mark] = encode_pieces(message["content"], tokenizer, tags)
            shown.append({**message, "content": mark})
    pieces = re.split("(\ue000[0-9]+\ue001)", _render(tokenizer, shown))
    if missing := apart.keys() - set(pieces):
        raise MagistralError(
            f"the chat template leaves out or rewrites {len(missing)} message with control tokens; "
            "it must stand as it is"
        )
    if not apart:
        return tokenizer.encode("".join(pieces), allow_special=True)
    ids = [apart[piece] if piece in apart else tokenizer.encode(piece, allow_special=True) for piece in pieces]
    return np.concatenate(ids)


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The chat template around messages; one that refuses a system message gets it in the user's turn behind it."""
    conversations = [list(messages)]
    if len(messages) > 1 and messages[0]["role"] == "system":
        system, user, *rest = messages
        conversations.append([{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest])
    first_error = None
    for conversation in conversations:
        try:
            template = _compile(tokenizer.chat_template or "")
            return template.render(
                messages=conversation, tools=None, documents=None, add_generation_prompt=True, **tokenizer.named_tokens
            )
        except Exception as error:  # a template may run into any
            first_error = first_error or error
    raise MagistralError(f"the chat template of the model folder fails: {first_error}")


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text in some templates; here it is a block without effect."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> Any:
        """Drop the markers, keep the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """A template in the environment that transformers gives it, sandboxed: templates come with downloaded models."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlocks]
    )

    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    # A fixed day: a prompt must be the same tomorrow, when the run is resumed.
    environment.globals["strftime_now"] = _FIXED_DAY.strftime
    return environment.from_string(template)
