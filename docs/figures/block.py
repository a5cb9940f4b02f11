"""Draws block.svg: one decoder block on one rank, in four ways (`python docs/figures/block.py`)."""

from pathlib import Path

COLUMNS = (
    ("keep_sync", "two all-reduces", True, True, "the MLP reads the whole sum"),
    ("block_drop", "one all-reduce for both sums", False, True, "the MLP reads x + own share"),
    ("plain_drop", "one, attention is never reduced", None, True, "own share stays for good"),
    ("MLP deferred", "the next block settles p", True, False, "the next block reads x + p"),
)
WIDTH, HEIGHT, COLUMN = 960, 470, 240
STYLE = """
  text { font: 13px sans-serif; fill: #222; text-anchor: middle }
  .title { font: bold 15px monospace } .small { font-size: 11.5px; fill: #555 }
  .box { fill: #eef2f7; stroke: #55677d; rx: 5 } .sync { fill: #cdeccf; stroke: #2c7a34; rx: 14 }
  .none { fill: none; stroke: #b3541e; stroke-dasharray: 5 4; rx: 14 } .dropped { fill: #b3541e }
  .line { stroke: #55677d; fill: none; stroke-width: 1.6; marker-end: url(#tip) }
  .owed { stroke: #b3541e; fill: none; stroke-width: 1.6; stroke-dasharray: 5 4; marker-end: url(#tip) }
  .paper { fill: #fff }
"""


def box(x: int, y: int, text: str, kind: str = "box") -> str:
    words = ' class="dropped"' if kind == "none" else ""
    return (
        f'<rect class="{kind}" x="{x - 62}" y="{y}" width="124" height="30"/>'
        f'<text{words} x="{x}" y="{y + 20}">{text}</text>'
    )


def line(points: str, kind: str = "line") -> str:
    return f'<polyline class="{kind}" points="{points}"/>'


def place(x: int, y: int, kept: bool | None) -> str:
    """Draw a sync point: kept (True), deferred (False), never reduced (None)."""
    return box(
        x, y, {True: "all-reduce", False: "p ← p + partial", None: "not reduced"}[kept], "sync" if kept else "none"
    )


def column(index: int, name: str, syncs: str, attention: bool | None, mlp: bool, note: str) -> str:
    x, stream = index * COLUMN + 140, index * COLUMN + 42  # the sub-layers, and the residual stream left of them
    parts = [
        f'<text class="title" x="{x - 20}" y="28">{name}</text>',
        f'<text class="small" x="{x - 20}" y="48">{syncs}</text>',
        f'<text x="{stream}" y="78">x</text>',
        line(f"{stream},86 {stream},410"),
        line(f"{stream},100 {x},100 {x},112"),
        box(x, 114, "norm, attention"),
        line(f"{x},144 {x},162"),
        place(x, 164, attention),
    ]
    if attention is False:  # the debt runs down the right-hand side to the next all-reduce
        parts.append(line(f"{x + 62},179 {x + 90},179 {x + 90},347 {x + 64},347", "owed"))
    else:
        parts.append(line(f"{x - 62},179 {stream + 4},179", "line" if attention else "owed"))
    if attention is False:
        parts.append(line(f"{x},194 {x},240", "owed"))
    parts += [
        line(f"{stream},226 {x - 26},226 {x - 26},240"),
        box(x, 242, "norm, MLP"),
        f'<text class="small" x="{x}" y="290">{note}</text>',
        line(f"{x},296 {x},330"),
        place(x, 332, mlp),
        line(f"{x - 62},347 {stream + 4},347") if mlp else line(f"{x},362 {x},410", "owed"),
        f'<text x="{stream}" y="430">{"x" if not mlp else "y"}</text>',
    ]
    if not mlp:
        parts.append(f'<text class="dropped" x="{x}" y="430">p, to the next block</text>')
    return "\n".join(parts)


def figure() -> str:
    columns = "\n".join(column(i, *row) for i, row in enumerate(COLUMNS))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        "<title>One block on one rank: keep_sync, block_drop, plain_drop, and the MLP's sync point deferred</title>\n"
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#55677d"/></marker></defs>\n'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>\n{columns}\n'
        f'<text class="small" x="{WIDTH // 2}" y="458">solid: part of every rank\'s stream; '
        "dashed: this rank's own share, which the others have not</text>\n</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "block.svg").write_text(figure(), encoding="utf-8")
