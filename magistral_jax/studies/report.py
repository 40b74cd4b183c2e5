"""The report of a run: one self-contained HTML page and PNG plots, from nothing but the run's folder.

in: `config.json`, `stages.json`, `metrics.jsonl`, `rollouts.jsonl`, `summary.json`, whichever exist; out: the page
`report.html`, and `plots/`.
Completions are text that a model wrote: everything is escaped, and the page's own policy forbids scripts and network.
"""

import base64
import html
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from magistral_jax.metrics import METRICS_FILE, ROLLOUTS_FILE, read_json_lines
from magistral_jax.studies.curriculum import curriculum_html
from magistral_jax.studies.plots import write_plots

NUM_PAIRS = 4
REMEMBERED_PROBLEMS = 500
SHOWN_HEAD, SHOWN_TAIL = 4000, 1500  # characters of a long completion

Record = Mapping[str, Any]


def write_report(run_folder: pathlib.Path) -> pathlib.Path:
    """Write plots and page, over an earlier report; returns the page. Works at any stage of a run."""
    config = _read_json(run_folder / "config.json")
    summary = _read_json(run_folder / "summary.json")
    metrics = list(read_json_lines(run_folder / METRICS_FILE))
    plots = write_plots(run_folder / "plots", metrics, summary)
    pairs = pair_rollouts(read_json_lines(run_folder / ROLLOUTS_FILE))
    name = _escape(run_folder.resolve().name)
    body = [
        f"<header><p class=kicker>Run report</p><h1>{name}</h1><p>{_subtitle(metrics, summary)}</p></header>",
        _cards(metrics, summary),
        _section("Evaluation", _evaluation_table(summary)),
        _section("Curriculum", curriculum_html(run_folder, metrics)),
        _section("Curves", _figures(plots)),
        _section("Rollouts, early and late", _rollouts(pairs)),
        _section("Summary", _table(_flatten({k: v for k, v in summary.items() if not k.startswith("eval_")}))),
        _section("Settings", _folded("All settings of the run", _table(_flatten(config)))),
    ]
    path = run_folder / "report.html"
    path.write_text(PAGE.format(title=name, style=STYLE, body="\n".join(body)), "utf-8", "backslashreplace")
    return path


# --- choosing ----------------------------------------------------------------------------------------------------


def pair_rollouts(rollouts: Iterable[Record], *, num_pairs: int = NUM_PAIRS) -> list[tuple[Record, Record | None]]:
    """An early and a late completion side by side, of the same problem where one came up twice.

    Nothing is picked by its look: of a problem the first and the last completion are taken, problems furthest apart in
    steps first. One pass over the file, and memory for a bounded number of problems at either end.
    """
    first: dict[Any, Record] = {}
    last: dict[Any, Record] = {}
    for record in rollouts:
        problem = record.get("problem")
        if len(first) < REMEMBERED_PROBLEMS:
            first.setdefault(problem, record)
        last.pop(problem, None)
        last[problem] = record
        if len(last) > REMEMBERED_PROBLEMS:
            del last[next(iter(last))]

    repeated = [(first[p], last[p]) for p in first if p in last and first[p]["step"] < last[p]["step"]]
    repeated.sort(key=lambda pair: pair[0]["step"] - pair[1]["step"])
    others = [
        (early, late)
        for early, late in zip(first.values(), reversed(last.values()), strict=False)
        if early["step"] < late["step"]
    ]
    alone = [(record, None) for record in first.values()]
    pairs: Sequence[tuple[Record, Record | None]] = repeated or others or alone
    return list(pairs[:num_pairs])


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or broken: a report is also for a run that was killed."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# --- writing -----------------------------------------------------------------------------------------------------


def _subtitle(metrics: Sequence[Record], summary: Record) -> str:
    steps = summary.get("steps", metrics[-1]["step"] if metrics else 0)
    state = "" if summary else ", unfinished: no summary was written"
    return f"{_show(steps)} step{'' if steps == 1 else 's'}{state}"


def _cards(metrics: Sequence[Record], summary: Record) -> str:
    """The figures that a reader wants first."""
    before, after = _evaluation(summary, "eval_before"), _evaluation(summary, "eval_after")
    last = metrics[-1] if metrics else {}
    figures = [
        ("pass@1", _change(before.get("pass_at_1"), after.get("pass_at_1"), _percent), "held-out problems"),
        (
            "completion length",
            _change(
                summary.get("mean_completion_length_first"), summary.get("mean_completion_length_last"), "{:.0f}".format
            ),
            "tokens, first and last step",
        ),
        ("reward", _change(_first(metrics, "reward"), last.get("reward"), "{:.2f}".format), "first and last step"),
        ("time", _duration(summary.get("wall_seconds")), "wall clock"),
        ("staleness", _show(summary.get("mean_staleness")), "weight versions, mean"),
        ("tokens after a swap", _percent(summary.get("swapped_token_share")), "share of trained tokens"),
        ("generator idle", _percent(summary.get("generator_idle_share")), "share of time"),
    ]
    cards = [
        f"<div class=card><b>{value}</b><span>{label}</span><small>{note}</small></div>"
        for label, value, note in figures
        if value != MISSING
    ]
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""


def _evaluation_table(summary: Record) -> str:
    before, after = _evaluation(summary, "eval_before"), _evaluation(summary, "eval_after")
    names = [n for n in {**before, **after} if n not in ("intervals", "pass_at_k")]
    rows = [
        f"<tr><th scope=row>{_escape(name.replace('_at_', '@').replace('_', ' '))}</th>"
        + "".join(f"<td>{_show(e.get(name))}{_interval(e, name)}</td>" for e in (before, after))
        + "</tr>"
        for name in names
    ]
    head = "<tr><td></td><th scope=col>before</th><th scope=col>after</th></tr>"
    return f"<table class=numbers>{head}{''.join(rows)}</table>" if rows else ""


def _interval(evaluation: Record, name: str) -> str:
    bounds = (evaluation.get("intervals") or {}).get(name)
    return f" <small>{_show(bounds[0])} to {_show(bounds[1])}</small>" if bounds else ""


def _figures(plots: Mapping[str, pathlib.Path]) -> str:
    images = [
        f"<img alt='{_escape(title)}' src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'>"
        for title, path in plots.items()
    ]
    return f"<div class=plots>{''.join(images)}</div>" if images else ""


def _rollouts(pairs: Sequence[tuple[Record, Record | None]]) -> str:
    if not pairs:
        return ""
    is_repeated = any(late and early.get("problem") == late.get("problem") for early, late in pairs)
    note = (
        "First and last completion of the same problem, not chosen by result."
        if is_repeated
        else "First and last completions of the run, not chosen by result; no problem came up in two steps."
    )
    blocks = []
    for early, late in pairs:
        sides = [side for side in (early, late) if side is not None]
        if late is None or early.get("problem") == late.get("problem"):
            prompt, columns = _prompt(early), "".join(map(_completion, sides))
        else:
            prompt, columns = "", "".join(f"<div>{_prompt(side)}{_completion(side)}</div>" for side in sides)
        blocks.append(f"<article>{prompt}<div class=pair>{columns}</div></article>")
    return f"<p>{note}</p>{''.join(blocks)}"


def _prompt(record: Record) -> str:
    return (
        f"<h3>{_show(record.get('problem'))} <small>reference answer {_show(record.get('reference'))}</small></h3>"
        f"<pre class=prompt>{_text(record.get('prompt'))}</pre>"
    )


def _completion(record: Record) -> str:
    verdict = str(record.get("verdict"))
    color = "good" if verdict == "correct" else "bad"
    facts = [
        f"<span class='verdict {color}'>{_escape(verdict.replace('_', ' '))}</span>",
        f"reward {_show(record.get('reward'))}",
        f"{_show(record.get('completion_tokens'))} tokens",
        f"weights {_show(record.get('version_min'))} to {_show(record.get('version_max'))}",
    ]
    if record.get("truncated"):
        facts.append("cut at the limit")
    return (
        f"<section class=completion><p><b>step {_show(record.get('step'))}</b> {' · '.join(facts)}</p>"
        f"<pre>{_text(record.get('completion'))}</pre></section>"
    )


def _text(value: Any) -> str:
    """Untrusted text, escaped; the middle of a very long one is left out."""
    text = "" if value is None else str(value)
    left_out = len(text) - SHOWN_HEAD - SHOWN_TAIL
    if left_out > 0:
        text = f"{text[:SHOWN_HEAD]}\n[… {left_out} characters left out …]\n{text[-SHOWN_TAIL:]}"
    return _escape(text)


def _escape(text: str) -> str:
    """HTML of any text; control characters, which no page may hold, are made visible."""
    return html.escape("".join("�" if ord(c) < 32 and c not in "\n\t" else c for c in text))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{content}</section>" if content else ""


def _table(entries: Mapping[str, Any]) -> str:
    rows = [f"<tr><th scope=row>{_escape(k)}</th><td>{_show(v)}</td></tr>" for k, v in entries.items()]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _folded(label: str, content: str) -> str:
    return f"<details><summary>{_escape(label)}</summary>{content}</details>" if content else ""


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _evaluation(summary: Record, key: str) -> Record:
    return summary[key] if isinstance(summary.get(key), Mapping) else {}


def _first(metrics: Sequence[Record], name: str) -> Any:
    return metrics[0].get(name) if len(metrics) > 1 else None


def _show(value: Any) -> str:
    """Any value, escaped; numbers with four figures that count."""
    if value is None or value == "":
        return MISSING
    is_fraction = isinstance(value, float) and not value.is_integer()
    return _escape(f"{value:.4g}" if is_fraction else f"{value:.0f}" if isinstance(value, float) else str(value))


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else MISSING


def _change(before: Any, after: Any, show: Callable[[float], str]) -> str:
    """`before → after`, or the one of them that there is."""
    shown = [show(value) for value in (before, after) if isinstance(value, int | float)]
    return " → ".join(shown) or MISSING


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


MISSING = "—"
STYLE = """
:root { color-scheme: light; --ink: #1f2430; --muted: #6b7280; --line: #e5e7eb; --blue: #2456d6; }
body { margin: 0; background: #f7f8fa; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; margin: 0; } h2 { font-size: 19px; margin: 44px 0 14px; } h3 { font-size: 15px; margin: 0 0 8px; }
header p { margin: 0; color: var(--muted); } small { color: var(--muted); font-weight: normal; }
.kicker { text-transform: uppercase; letter-spacing: .08em; font-size: 12px; color: var(--blue) !important; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin-top: 24px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 20px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card span, .card small { display: block; } .card small { font-size: 12.5px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
.plots img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 10px; box-sizing: border-box;
  padding: 8px; }
article { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 12px 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 16px; }
.pair > * { min-width: 0; } .completion p { margin: 0 0 6px; font-size: 13.5px; color: var(--muted); }
.completion p b { color: var(--ink); } .verdict { padding: 1px 8px; border-radius: 9px; font-weight: 600; }
.good { background: #d9f2e6; color: #0b6b4a; } .bad { background: #fbe3e4; color: #a12835; }
pre { margin: 0; padding: 10px 12px; max-height: 420px; overflow: auto; background: #f7f8fa; border-radius: 8px;
  font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.prompt { max-height: 150px; margin-bottom: 14px; border-left: 3px solid var(--blue); }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--line); }
th, td { padding: 5px 14px; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 500; color: var(--muted); } td { overflow-wrap: anywhere; }
summary { cursor: pointer; margin-bottom: 12px; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · run report</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
