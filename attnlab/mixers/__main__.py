"""The table of mechanisms, from the registry.

python -m attnlab.mixers             prints it
python -m attnlab.mixers README.md   puts it into a file, between its two marks
"""

import sys
from pathlib import Path

from attnlab.mixers import mixers

BEGIN, END = "<!-- mechanisms: begin -->", "<!-- mechanisms: end -->"


def table() -> str:
  """Every registered mixer as a row of Markdown, by family."""
  rows = ["| name in patterns | family | mechanism | source |", "|---|---|---|---|"]
  order = {"softmax": 0, "linear": 1, "sparse": 2}
  for name, cls in sorted(mixers().items(), key=lambda item: (order[item[1].family], item[0])):
    number = cls.paper.removeprefix("arXiv:")
    link = f"[{cls.paper}](https://arxiv.org/abs/{number})" if number != cls.paper else cls.paper
    names = ", ".join(f"`{n}`" for n in (name, *cls.aliases))
    rows.append(f"| {names} | {cls.family} | {cls.title} | {link} |")
  return "\n".join(rows)


def with_table(text: str) -> str:
  """A document with its table made anew."""
  before, rest = text.split(BEGIN)
  after = rest.split(END)[1]
  return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
  if len(sys.argv) > 1:
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
  else:
    print(table())
