"""The frame of a self-contained HTML page: nothing comes from outside it, legible on light and dark screens."""

from collections.abc import Sequence
from html import escape

from jmm_fast.viz import player, style


def section(title: str, body: str) -> str:
    """One part of the page; ``body`` is markup."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values side by side; both are text."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>'


def figure(drawn) -> str:
    """A matplotlib figure inlined at its own width, narrower where the page is."""
    width = drawn.get_size_inches()[0] * 96
    return f'<figure class="wide" style="max-width:{width:.0f}px">{style.inline_svg(drawn)}</figure>'


def page(kind: str, title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole document: ``kind`` above the title, ``lead`` below it."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{_STYLE}{player.STYLE}</style>
</head>
<body>
<main>
<header><p class="kicker">{escape(kind)}</p><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
{"".join(sections)}
</main>
</body>
</html>
"""


_STYLE = """
:root { --sans: "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif;
  --serif: Charter, "Iowan Old Style", "Source Serif Pro", Georgia, serif;
  --page: #fcfbf8; --ink: #1b1f24; --muted: #646b75; --hairline: #d8d9d6; --bone: #8d959f; --paper: #fcfbf8;
  --blue: #2163a5; --mark: #9aa2ad; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e8e6e1; --muted: #9ea5ae; --hairline: #343a42;
  --bone: #7d8690; --paper: #15181c; --blue: #6ea8e0; --mark: #6b737e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.55 var(--serif); }
main { max-width: 1080px; margin: 0 auto; padding: 3.5rem 1.4rem 5rem; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 1.4rem; }
.kicker { font: 600 .8rem/1 var(--sans); letter-spacing: .04em; color: var(--muted); margin: 0 0 .8rem; }
h1 { font-size: 2.3rem; line-height: 1.12; margin: 0 0 .8rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; font-weight: 600; margin: 0 0 .8rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.15rem; line-height: 1.5; max-width: 42rem; margin: 0; }
section { padding-top: 2.6rem; }
section > p { max-width: 42rem; margin: 0 0 1.1rem; }
figure { margin: 1.2rem 0 2rem; }
figure svg { display: block; width: 100%; height: auto; min-width: 620px; overflow: visible; }
.wide { overflow-x: auto; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.6rem; margin: 0 0 1rem;
  font: .88rem/1.5 var(--sans); }
dl.facts dt { color: var(--muted); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { border-left: 3px solid var(--hairline); padding: .3rem 0 .3rem .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; font: .9rem/1.4 var(--sans); min-width: 32rem; }
th, td { text-align: left; padding: .5rem 1.6rem .5rem 0; border-bottom: 1px solid var(--hairline);
  vertical-align: top; font-weight: 400; }
thead th { color: var(--muted); font-size: .8rem; border-bottom-color: var(--ink); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sub { display: block; color: var(--muted); font-size: .78rem; }
.none, .small { color: var(--muted); } .small { font-size: .78rem; }
.missing { color: var(--muted); font-style: italic; margin: .8rem 0; }
.missing code { display: block; font-style: normal; color: var(--ink); }
@media (max-width: 640px) { body { font-size: 16px; } main { padding-top: 2rem; } h1 { font-size: 1.8rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: .5rem; } }
@media print { .player { display: none; } }
"""
