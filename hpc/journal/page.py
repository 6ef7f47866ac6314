"""The report as one HTML page that needs nothing else: figures inside, no script, light and dark.

Of many runs the foremost figures only (content.INLINED); the others are files beside it, as in the Markdown.
"""

from __future__ import annotations

from hpc.journal.content import Report
from hpc.journal.markdown import figure_file

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c2024; --soft: #5d6670; --line: #d9dee3;
  --band: #f5f7f9; --link: #0b5cad; --better: #17703a; --worse: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --text: #e6e9ec; --soft: #9aa4ae; --line: #343b42; --band: #1d2226; --link: #7db7f2;
    --better: #6fcf8f; --worse: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 88rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: 1.75rem; }
h2 { margin: 3rem 0 0; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; color: var(--soft); font-weight: 600; }
a { color: var(--link); }
p { margin: .5rem 0; color: var(--soft); }
.tag { font-size: .8rem; font-weight: 600; color: var(--soft); border: 1px solid var(--line); border-radius: 1rem;
  padding: .1rem .6rem; vertical-align: middle; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th small { display: block; font-weight: 400; white-space: nowrap; }
td.words { overflow-wrap: break-word; min-width: 5.5rem; max-width: 26rem; }
td.words:last-child { overflow-wrap: anywhere; min-width: min(16rem, 45vw); }
td.words a { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--band); }
.change { color: var(--soft); }
.better { color: var(--better); }
.worse { color: var(--worse); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 4px; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .25rem; overflow-wrap: anywhere; }
.notes { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding: .25rem 1rem; }
@media print { h2 { break-before: page; } .wide { overflow: visible; } }
"""

_TEMPLATE = """\
{%- macro show(table) -%}
<div class="wide"><table>
<thead><tr>
{%- for head in table.heads %}
<th scope="col"{% if loop.index0 not in table.words %} class="number"{% endif %}>{{ head.text }}
{%- if head.remark %}<small>{{ head.remark }}</small>{% endif %}</th>
{%- endfor %}
</tr></thead>
<tbody>
{%- for row in table.rows %}
{%- set place = loop.index %}
<tr>{% for cell in row %}<td class="{{ 'words' if loop.index0 in table.words else 'number' }}">
{%- if table is sameas report.overview and loop.first %}<a href="#run-{{ place }}">{{ cell.text }}</a>
{%- else %}{{ cell.text }}{% endif %}
{%- if cell.change %} <span class="change {{ cell.tone }}">({{ cell.change }})</span>{% endif %}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table></div>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Report: {{ report.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>Report: {{ report.title }}</h1>
{%- if report.legend %}
<p>{{ report.legend }}
{%- if report.sections | selectattr('baseline') | list %}
<span class="better">Green is better</span>, <span class="worse">red is worse</span>.{% endif %}</p>
{{ show(report.overview) }}
{%- endif %}
{%- for section in report.sections %}
<section id="run-{{ loop.index }}">
<h2>{{ section.run }}{% if section.baseline %} <span class="tag">baseline</span>{% endif %}</h2>
{%- for table in section.tables %}
<h3>{{ table.title }}</h3>
{{ show(table) }}
{%- endfor %}
{%- if section.figures %}
<h3>Figures</h3>
<div class="figures">
{%- for figure in section.figures %}
{%- if figure.size and figure.inline %}
<figure><img src="{{ figure.uri }}" alt="{{ figure.name }} of {{ section.run }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{%- elif figure.size %}
<p><a href="figures/{{ file_of(section.run, figure) }}">{{ figure.name }}</a>: {{ figure.caption }}
(a file beside this page)</p>
{%- else %}
<p>Figure {{ figure.name }}: the file is missing or no PNG.</p>
{%- endif %}
{%- endfor %}
</div>
{%- endif %}
{%- if section.notes %}
<h3>Notes</h3>
<div class="notes">{{ section.notes }}</div>
{%- endif %}
</section>
{%- endfor %}
{%- if report.other_notes %}
<section>
<h2>Notes of runs that are not in this report</h2>
{%- for run, text in report.other_notes.items() %}
<h3>{{ run }}</h3>
<div class="notes">{{ text }}</div>
{%- endfor %}
</section>
{%- endif %}
</body>
</html>
"""


def render(report: Report) -> str:
    """The text of index.html; everything that comes from runs and notes is escaped by the template engine."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    return template.render(report=report, style=Markup(_STYLE), file_of=figure_file)
