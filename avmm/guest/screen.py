"""What a terminal on the guest's console would show: as text to assert on, and as a picture. Needs ``avmm[screen]``."""

from __future__ import annotations

from html import escape
from typing import Any, Final

from avmm.errors import ConfigError

#: VT colours as most terminals draw them; what pyte gives as six hexadecimal digits is a colour already.
_COLOURS: Final = {
    "black": "#2e3436", "red": "#cc0000", "green": "#4e9a06", "brown": "#c4a000", "blue": "#3465a4",
    "magenta": "#75507b", "cyan": "#06989a", "white": "#d3d7cf",
    "brightblack": "#555753", "brightred": "#ef2929", "brightgreen": "#8ae234", "brightbrown": "#fce94f",
    "brightblue": "#729fcf", "brightmagenta": "#ad7fa8", "brightcyan": "#34e2e2", "brightwhite": "#eeeeec",
}  # fmt: skip
_WIDTH, _HEIGHT, _FONT = 8, 16, 13


class Screen:
    """A terminal of ``columns`` by ``rows`` that is fed what the guest prints. Raises ConfigError without pyte."""

    def __init__(self, columns: int = 80, rows: int = 25) -> None:
        try:
            import pyte
        except ImportError:
            raise ConfigError("a screen needs pyte: pip install 'avmm[screen]'") from None
        self._screen: Any = pyte.Screen(columns, rows)
        self._stream: Any = pyte.ByteStream(self._screen)

    def feed(self, data: bytes) -> None:
        """What the guest printed."""
        self._stream.feed(data)

    @property
    def lines(self) -> list[str]:
        """The rows from top to bottom, without blanks at their ends."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        """The rows as one text, without blanks at their ends and empty rows at the bottom."""
        return "\n".join(self.lines).rstrip("\n")

    @property
    def cursor(self) -> tuple[int, int]:
        """Column and row, from 0."""
        return self._screen.cursor.x, self._screen.cursor.y

    def svg(self) -> str:
        """A picture of it."""
        columns, rows = self._screen.columns, self._screen.lines
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * _WIDTH + 16}" height="{rows * _HEIGHT + 16}" '
            f'font-family="monospace" font-size="{_FONT}" xml:space="preserve">',
            '<rect width="100%" height="100%" fill="#1c1c1c"/>',
        ]
        for row in range(rows):
            cells = self._screen.buffer[row]
            start = 0
            while start < columns:
                look = _look(cells[start])
                end = start + 1
                while end < columns and _look(cells[end]) == look:
                    end += 1
                parts += _run("".join(cells[at].data for at in range(start, end)), start, row, end - start, look)
                start = end
        column, row = self.cursor
        parts.append(
            f'<rect x="{8 + column * _WIDTH}" y="{8 + row * _HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
            'fill="#eeeeec" fill-opacity="0.4"/></svg>\n'
        )
        return "\n".join(parts)


def _look(cell: Any) -> tuple[str, str, bool, bool]:
    front, back = _colour(cell.fg, "#d3d7cf"), _colour(cell.bg, "#1c1c1c")
    return (back, front, cell.bold, cell.underscore) if cell.reverse else (front, back, cell.bold, cell.underscore)


def _colour(name: str, default: str) -> str:
    return default if name == "default" else _COLOURS.get(name, f"#{name}")


def _run(text: str, column: int, row: int, width: int, look: tuple[str, str, bool, bool]) -> list[str]:
    front, back, bold, underlined = look
    x, y = 8 + column * _WIDTH, 8 + row * _HEIGHT
    parts = []
    if back != "#1c1c1c":
        parts.append(f'<rect x="{x}" y="{y}" width="{width * _WIDTH}" height="{_HEIGHT}" fill="{back}"/>')
    if text.strip():
        style = ' font-weight="bold"' * bold + ' text-decoration="underline"' * underlined
        printable = "".join(each if each.isprintable() else " " for each in text)
        place = f'x="{x}" y="{y + _FONT}" textLength="{width * _WIDTH}"'
        parts.append(f'<text {place} fill="{front}"{style}>{escape(printable)}</text>')
    return parts
