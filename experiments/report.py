"""Tells of an experiment: table.md, table.csv, plot.png, plot.svg and report.html, which needs no other file; and
runs.jsonl, the results it is made of."""

import csv
import dataclasses
import datetime
import html
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab import accounting, metrics
from attnlab.errors import UserError
from experiments.cells import Experiment, NotKnown, Prediction, Test
from experiments.harness import RUNS, Plan, read_runs

# Okabe and Ito's colours, told apart by all, without the yellow that paper swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_MARKS = "osD^vP*"  # one fewer than colours, so that 56 lines differ


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure.

  Attributes:
    axes: of its cell and its test.
    values: in percent, chance being 0, or in bits a byte; one a finished seed.
    published: in percent, or None.
    facts: learning rate, parameters, state bytes and so on; those that are known.
    measure: the test's.
  """

  axes: Mapping[str, Any]
  values: tuple[float, ...]
  published: float | None
  facts: Mapping[str, Any]
  measure: str = "accuracy"

  @property
  def is_bits(self) -> bool:
    return self.measure.endswith("bits")

  @property
  def mean(self) -> float | None:
    return statistics.fmean(self.values) if self.values else None

  @property
  def spread(self) -> float | None:
    """Standard deviation over seeds; None for fewer than two."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


def rows(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
  """A row for each test of each cell, run or not."""
  out = []
  for number, cell in enumerate(plan.cells):
    runs = plan.seeds(number)
    done = [results[r.key] for r in runs if r.key in results]
    finite = [r for r in done if "not_finite" not in r]
    config = plan.sweep(number)[0].config
    facts: dict[str, Any] = {
      **cell.facts(),
      "parameters": accounting.parameters(config.model),
      "state bytes": accounting.cache_bytes(config.model, config.data.seq_len),
      "train FLOPs a token": round(accounting.train_flops_per_token(config)),
    }
    if finite:
      facts["learning rate"] = plan.rate(number)
      facts["updates"] = round(statistics.fmean(r["steps"] for r in finite))
      facts["seconds"] = round(statistics.fmean(r["seconds"] for r in finite))
      facts["devices"] = finite[0]["devices"]
      speeds = [r["tokens_per_second"] for r in finite if r.get("tokens_per_second")]
      facts["tokens a second"] = round(statistics.median(speeds)) if speeds else None
    if len(finite) < len(done):
      facts["not finite"] = len(done) - len(finite)
    if done:
      facts["commit"] = ", ".join(sorted({r["commit"] for r in done if r.get("commit")})) or None
    for i, test in enumerate(cell.tests):
      told = [r["tests"][i] if "tests" in r else None for r in done]
      values = tuple(_value(test, figure) for figure in told)
      out.append(Row({**cell.axes, **test.axes}, values, test.published, facts, test.measure))
  return out


def _value(test: Test, figure: float | None) -> float:
  """A run's figure as it is told; None: the run was not finite, and is as good as guessing."""
  if test.is_bits:
    return 8.0 if figure is None else figure
  return 100 * ((test.chance if figure is None else figure) - test.chance) / (1 - test.chance)


def write(
  experiment: Experiment,
  plan: Plan,
  results: Mapping[str, Mapping[str, Any]],
  out: Path,
  *,
  command: str,
  size: str,
) -> None:
  """Writes the report of what has been run.

  Args:
    experiment: what was run.
    plan: its runs.
    results: of those that are finished.
    out: a directory, made if it is not there.
    command: that was given, to be told.
    size: "cpu", "gpu" or "paper".

  Raises:
    UserError: matplotlib is not installed, or the directory's results of runs are not such.
  """
  out.mkdir(parents=True, exist_ok=True)
  _write_runs(plan, results, out / RUNS)
  table = rows(plan, results)
  lines = _lines(table)
  with open(out / "table.csv", "w", newline="") as file:
    csv.writer(file).writerows(lines)
  grids = dict.fromkeys(cell.learning_rates for cell in plan.cells)
  told = _told(experiment, table, command, size) | {"Runs": _runs(plan, results)}
  told["Learning rates"] = "; or ".join(
    ", ".join(f"{rate:g}" for rate in grid)
    + " (the best by validation, of the first seed)" * (len(grid) > 1)
    for grid in grids
  )
  predictions = _predictions(experiment, table, size)
  summary = _summary(experiment, table)
  (out / "table.md").write_text(_markdown(experiment, summary, lines, told, predictions))
  figure = _figure(experiment, table)
  figure.savefig(out / "plot.png", dpi=160)
  svg = _svg(figure, experiment.name)
  (out / "plot.svg").write_text(svg)
  page = _html(experiment, table, summary, lines, told, predictions, svg)
  (out / "report.html").write_text(page)


def _write_runs(plan: Plan, results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
  """Writes the results of a plan's runs, a line each; lines that tell of others stay."""
  lines = read_runs(path)
  for cell in range(len(plan.cells)):
    for run in plan.runs(cell):
      if run.key in results:
        lines[run.key] = {"key": run.key, "run": str(run), "result": results[run.key]}
  metrics.write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines.values()))


def _lines(table: Sequence[Row]) -> list[list[str]]:
  """The table as text, headings first; what is missing is "-"."""
  axes = list(dict.fromkeys(k for row in table for k in row.axes))
  facts = list(dict.fromkeys(k for row in table for k in row.facts))
  lines = [[*axes, "ours, %", "spread", "seeds", "published, %", *facts]]
  for row in table:
    digits = 2 if row.is_bits else 1
    mean = f"{row.mean:.{digits}f}" if row.mean is not None else "-"
    spread = f"{row.spread:.{digits}f}" if row.spread is not None else "-"
    published = f"{row.published:g}" if row.published is not None else "-"
    line = [*(str(row.axes.get(a, "-")) for a in axes), mean, spread, str(len(row.values))]
    lines.append([*line, published, *(_short(row.facts.get(k)) for k in facts)])
  return lines


def _summary(experiment: Experiment, table: Sequence[Row]) -> list[list[str]]:
  """The figures alone, headings first: by line and facet of the plot down, by its x across (a fact: "columns", or the
  facet, across).

  A field has the mean and the spread; several, where more than these tell figures apart. Where a plot's x is a fact, a
  line is a model, and its costs follow.
  """
  x, by, facet = (experiment.plot[k] for k in ("x", "line", "facet"))
  across = x if any(x in row.axes for row in table) else experiment.plot.get("columns", facet)
  down = [name for name in (facet, by) if name != across]
  columns = list(dict.fromkeys(row.axes[across] for row in table))
  fields: dict[tuple[str, ...], dict[Any, list[str]]] = {}
  for row in table:
    cells = fields.setdefault(tuple(str(row.axes[name]) for name in down), {})
    digits = 2 if row.is_bits else 1
    spread = f" ± {row.spread:.{digits}f}" if row.spread is not None else ""
    mean = "-" if row.mean is None else f"{row.mean:.{digits}f}"
    if row.values and row.facts.get("not finite") == len(row.values):
      mean, spread = "not finite", ""
    cells.setdefault(row.axes[across], []).append(mean + spread)
  head = [*down, *(f"{across} {c}" if _is_number(c) else str(c) for c in columns)]
  body = [
    [*names, *(", ".join(cells.get(c, "-")) for c in columns)] for names, cells in fields.items()
  ]
  if across == facet:
    told = [name for name in _numbers(table) if name not in ("learning rate", "updates", "seconds")]
    head += told
    for line, names in zip(body, fields, strict=True):
      here = [row for row in table if tuple(str(row.axes[name]) for name in down) == names]
      for name in told:
        values = [row.facts[name] for row in here if row.facts.get(name) is not None]
        line.append(metrics.human(statistics.median(values)) if values else "-")
  return [head, *body]


def _numbers(table: Sequence[Row]) -> list[str]:
  """The facts that are numbers."""
  facts = {name: value for row in table for name, value in row.facts.items() if value is not None}
  return [name for name, value in facts.items() if _is_number(value)]


def _short(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:g}" if isinstance(value, float) else str(value)


def _told(experiment: Experiment, table: Sequence[Row], command: str, size: str) -> dict[str, str]:
  """Command, date, machine and how much of it is there."""
  done = sum(bool(row.values) for row in table)
  devices = sorted({row.facts["devices"] for row in table if "devices" in row.facts})
  commits = {c for row in table for c in (row.facts.get("commit") or "").split(", ") if c}
  return {
    "Command": command,
    "Date": datetime.date.today().isoformat(),
    "Size": size,
    "Devices": ", ".join(devices) or "-",
    "Commits": ", ".join(sorted(commits)) or "-",
    "Figures": f"{done} of {len(table)}",
    "Published": experiment.source,
  }


def _runs(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> str:
  """How many there are, and their time: that of training alone where no more is known."""
  every = {run.key for cell in range(len(plan.cells)) for run in plan.runs(cell)}
  done = [results[key] for key in every if key in results]
  seconds = sum(r.get("wall_seconds", r.get("seconds", 0)) for r in done)
  return f"{len(done)}, of {seconds / 60:.0f} minutes of one device in all" if done else "0"


def _predictions(
  experiment: Experiment, table: Sequence[Row], size: str
) -> list[tuple[Prediction, str]]:
  """Each with what is to be said of it."""

  def value(**axes: Any) -> float:
    found = [r for r in table if all(r.axes.get(k) == v for k, v in axes.items())]
    if len(found) > 1:
      raise ValueError(f"a prediction's axes {axes} fit {len(found)} figures")
    if not found or found[0].mean is None:
      raise NotKnown(axes)
    return found[0].mean

  def word(prediction: Prediction) -> str:
    try:
      return "held" if prediction.holds(value) else "did not hold"
    except NotKnown:
      return "not known yet"

  return [(p, word(p)) for p in experiment.predictions(size)]


def _markdown(
  experiment: Experiment,
  summary: list[list[str]],
  lines: list[list[str]],
  told: Mapping[str, str],
  predictions: Sequence[tuple[Prediction, str]],
) -> str:
  head = [f"# {experiment.title}", "", experiment.about, ""]
  head += [f"- {k}: {'`' + v + '`' if k == 'Command' else v}" for k, v in told.items()]
  if predictions:
    head += ["", "Predictions, written before the runs:", ""]
    head += [f"- {p.text} **{word}**" for p, word in predictions]
  middle = [
    "",
    "Accuracy in percent, guessing being 0, and its spread over seeds (bits a byte as they are):",
    "",
  ]
  parts = [*head, *middle, *_grid(summary), "", "All figures:", "", *_grid(lines), ""]
  return "\n".join(parts)


def _grid(lines: list[list[str]]) -> list[str]:
  """A table in Markdown, in columns."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

  def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

  rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
  return [line(lines[0]), rule, *map(line, lines[1:])]


def _figure(experiment: Experiment, table: Sequence[Row]) -> Any:
  """A plot for each value of the facet: our mean and range by x, one line a mechanism; published values hollow.

  Values of an axis stand side by side, as bars where each has a line of its own; a fact is a number, on a logarithmic
  scale.
  """
  try:
    import matplotlib.figure
  except ImportError as error:
    raise UserError("the report needs matplotlib: pip install attnlab[plots]") from error
  x, by, facet = (experiment.plot[k] for k in ("x", "line", "facet"))
  bars = x == by
  draw = _bars if bars else _draw
  facets = list(dict.fromkeys(r.axes[facet] for r in table))
  names = list(dict.fromkeys(r.axes[by] for r in table))
  columns = 2 if len(facets) == 4 else min(len(facets), 3)
  shape = (math.ceil(len(facets) / columns), columns)
  figure = matplotlib.figure.Figure(
    figsize=(max(3.6 * columns + 0.4, 6), 2.9 * shape[0] + 0.7), layout="constrained"
  )
  panels = figure.subplots(*shape, squeeze=False).ravel()
  styles = dict(zip(names, zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKS)), strict=False))
  for axes, value in itertools.zip_longest(panels, facets):
    if value is None:
      axes.axis("off")
      continue
    here = [r for r in table if r.axes[facet] == value]
    ticks = list(dict.fromkeys(r.axes[x] for r in here if x in r.axes))
    place = (lambda r: ticks.index(r.axes[x])) if ticks else (lambda r: r.facts[x])  # noqa: B023
    lines = {name: [r for r in here if r.axes[by] == name] for name in names}
    for name, of_it in lines.items():
      draw(axes, sorted(of_it, key=place), place, str(name), *styles[name])
    axes.set_title(f"{facet} {value}" if _is_number(value) else str(value), loc="left", fontsize=10)
    if ticks:
      long = sum(len(str(t)) for t in ticks) > 28
      turned = dict(rotation=30, ha="right") if long else {}
      axes.set_xticks(range(len(ticks)), [str(t) for t in ticks], **turned)
    else:
      _logarithmic(axes, [place(r) for r in here])
    bits = here[0].is_bits
    lowest = min((v for r in here for v in r.values), default=0)  # guesses may fall below guessing
    if not bars:
      axes.set_xlabel(x)
    if not bits:
      axes.set_ylim(min(lowest, 0) - 5, 109 if bars else 105)  # Bars have their values above them.
    if bits or facets.index(value) % columns == 0:
      axes.set_ylabel("bits a byte" if bits else "accuracy, %")
    if not ticks and all(len(of_it) <= 1 for of_it in lines.values()):
      _frontier(axes, here, place, by)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
  handles = {h.get_label(): h for p in panels for h in p.get_legend_handles_labels()[0]}
  if handles:
    # What is wider than the figure would be cut; lines beyond the second have no place yet.
    inches = 0.5 + 0.065 * max(map(len, handles))
    across = max(1, min(int(figure.get_figwidth() / inches), max(3, 2 * columns)))
    down = math.ceil(len(handles) / across)
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, down - 2))
    figure.legend(
      handles=list(handles.values()), loc="outside lower center", ncols=across, frameon=False, fontsize=9
    )  # fmt: skip
  return figure


def _svg(figure: Any, salt: str) -> str:
  """As text that changes when the figure does: the same ids for the same things, and no date."""
  import matplotlib

  text = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": salt}):
    figure.savefig(text, format="svg", metadata={"Date": None})
  return text.getvalue()


def _logarithmic(axes: Any, places: Sequence[float]) -> None:
  """A scale in powers of ten as 1k and 1M, and between them where there is room."""
  from matplotlib import ticker

  axes.set_xscale("log")
  few = max(places) < 300 * min(places)
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _frontier(axes: Any, table: Sequence[Row], place: Callable[[Row], float], name: str) -> None:
  """A line through the points that no other is both cheaper than and as good as, with the names that there is room for,
  the best first."""
  best: list[Row] = []
  done = [row for row in table if row.mean is not None]
  for row in sorted(done, key=lambda r: (place(r), -_quality(r))):
    if not best or _quality(row) > _quality(best[-1]):
      best.append(row)
  points = [(place(row), row.mean) for row in best]
  if not points:
    return
  # As a staircase: between two of them there is nothing.
  axes.step(*zip(*points, strict=True), where="post", color="#555555", linewidth=1, zorder=0)
  taken: list[tuple[float, float, float]] = []  # left and right end and height, in points
  for row, point in zip(reversed(best), reversed(points), strict=True):
    label, size = str(row.axes[name]), 6.5
    x, y = axes.transData.transform(point) * 72 / axes.figure.dpi
    right = x + size * 0.6 * len(label)
    if all(abs(y - other) > 1.2 * size or x > end or right < start for start, end, other in taken):
      taken.append((x, right, y))
      axes.annotate(
        label, point, textcoords="offset points", xytext=(5, -9), fontsize=size, color="#333333"
      )


def _quality(row: Row) -> float:
  assert row.mean is not None
  return -row.mean if row.is_bits else row.mean


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _draw(
  axes: Any, here: Sequence[Row], place: Callable[[Row], float], name: str, colour, mark
) -> None:
  ours = [(place(r), r) for r in here if r.values]
  if ours:
    places = [i for i, _ in ours]
    style = dict(color=colour, marker=mark, markersize=4.5, linewidth=1.8, label=name)
    axes.plot(places, [r.mean for _, r in ours], **style)
    low, high = ([f(r.values) for _, r in ours] for f in (min, max))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
  _published(axes, here, place, colour, mark)


def _bars(
  axes: Any, here: Sequence[Row], place: Callable[[Row], float], name: str, colour, mark
) -> None:
  for row in here:
    if row.mean is not None:
      reach = [[row.mean - min(row.values)], [max(row.values) - row.mean]]
      several = len(row.values) > 1
      bar = axes.bar(place(row), row.mean, 0.7, yerr=reach if several else None, color=colour)
      axes.bar_label(bar, fmt="%.0f", padding=2, fontsize=8, color="#333333")
  _published(axes, here, place, "#333333", mark)


def _published(
  axes: Any, here: Sequence[Row], place: Callable[[Row], float], colour: str, mark: str
) -> None:
  published = [(place(r), r.published) for r in here if r.published is not None]
  if published:
    where, values = zip(*published, strict=True)
    axes.plot(
      where, values, color=colour, linestyle=":", linewidth=1.2, marker=mark, markersize=8, markerfacecolor="none"
    )  # fmt: skip


_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; --ink: #1c1e21; --soft: #667; --line: #e3e5ea; --hue: 205; }}
body {{ font: 15px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 72rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p {{ max-width: 46rem; }} svg {{ max-width: 100%; height: auto; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; color: var(--soft); font-size: .9rem; }}
dd {{ margin: 0; }} code {{ font-size: .92em; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th {{ text-align: left; border-bottom: 2px solid var(--ink); padding: .35rem .7rem; background: #fff; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }} th button:focus-visible {{ outline: 2px solid #0072b2; }}
th[aria-sort=ascending] button::after {{ content: " \2191"; }}
th[aria-sort=descending] button::after {{ content: " \2193"; }}
td {{ border-bottom: 1px solid var(--line); padding: .3rem .7rem; }} td.number {{ text-align: right; }}
tbody tr:hover td {{ box-shadow: inset 0 0 0 99rem rgb(0 0 0 / .04); }}
.held {{ color: #00795a; }} .not {{ color: #b34700; }} .open {{ color: var(--soft); }}
</style>
</head>
<body>
<h1>{title}</h1>
{about}
<dl>{told}</dl>
{predictions}
<h2>Figures</h2>
<p>Accuracy on examples that neither training nor the choice of a learning rate has seen, guessing being 0 %: the mean
over seeds, bands from the worst to the best. Published values are hollow.</p>
{svg}
<h2>Summary</h2>
<div class="scroll"><table><thead><tr>{summary_heads}</tr></thead><tbody>
{summary}
</tbody></table></div>
<h2>All figures</h2>
<p>Spread is the standard deviation over seeds. "-" is not run, or not published. Click a heading to sort.</p>
<div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<script>
const units = {{k: 1e3, M: 1e6, B: 1e9, T: 1e12}};
for (const head of document.querySelectorAll("th")) head.firstChild.addEventListener("click", () => {{
  const table = head.closest("table"), body = table.tBodies[0], i = head.cellIndex;
  const up = head.ariaSort !== "ascending";
  table.querySelectorAll("th").forEach(h => h.removeAttribute("aria-sort"));
  head.ariaSort = up ? "ascending" : "descending";
  // "97.5 ± 1.2" is 97.5, "1.3M" 1300000, and "-" before all.
  const value = row => row.cells[i].textContent, number = t => {{
    const found = /^(-?[\d.]+(?:e[+-]?\d+)?)([kMBT]?)(?: ±.*)?$/.exec(t);
    return t === "-" ? -Infinity : found ? Number(found[1]) * (units[found[2]] ?? 1) : NaN;
  }};
  const order = (a, b) => {{
    const [x, y] = [number(value(a)), number(value(b))];
    return Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
  }};
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
}});
</script>
</body>
</html>
"""


def _html(
  experiment: Experiment,
  table: Sequence[Row],
  summary: list[list[str]],
  lines: list[list[str]],
  told: Mapping[str, str],
  predictions: Sequence[tuple[Prediction, str]],
  svg: str,
) -> str:
  ours = lines[0].index("ours, %")
  body = []
  for row, line in zip(table, lines[1:], strict=True):
    cells = []
    for i, text in enumerate(line):
      more = ' class="number"' if i >= ours and text.replace(".", "").lstrip("-").isdigit() else ""
      if i == ours and row.mean is not None:
        light = 100 if row.is_bits else 100 - 0.42 * min(max(row.mean, 0), 100)
        seeds = ", ".join(f"{v:.1f}" for v in row.values)
        more += f' style="background: hsl(var(--hue) 75% {light:.0f}%)" title="each seed: {seeds}"'
      cells.append(f"<td{more}>{html.escape(text)}</td>")
    body.append(f"<tr>{''.join(cells)}</tr>")
  expected = ""
  if predictions:
    classes = {"held": "held", "did not hold": "not", "not known yet": "open"}
    items = "".join(
      f'<li>{html.escape(p.text)} <b class="{classes[word]}">{word}</b></li>'
      for p, word in predictions
    )
    expected = f"<h2>Predictions, written before the runs</h2><ul>{items}</ul>"
  tags = {"Command": "<code>{}</code>"}
  return _PAGE.format(
    title=html.escape(experiment.title),
    about="".join(f"<p>{html.escape(p)}</p>" for p in experiment.about.split("\n\n")),
    told="".join(
      f"<dt>{k}</dt><dd>{tags.get(k, '{}').format(html.escape(v))}</dd>" for k, v in told.items()
    ),
    predictions=expected,
    svg=svg[svg.index("<svg") :],
    summary_heads=_heads(summary[0]),
    summary="\n".join(
      f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in line)}</tr>"
      for line in summary[1:]
    ),
    heads=_heads(lines[0]),
    body="\n".join(body),
  )


def _heads(names: Sequence[str]) -> str:
  return "".join(f'<th scope="col"><button>{html.escape(h)}</button></th>' for h in names)
