"""Pages as a browser would see them."""

import html.parser
from pathlib import Path


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, and the text inside each kind of element."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_bytes().decode("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[tuple[str, tuple[str, ...]]] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "br", "input", "wbr"):
            self._open.append((tag, tuple((attributes.get("class") or "").split())))
            self.texts.append((self._path(), ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self._open:
            path, text = self.texts[-1]
            if path == self._path():
                self.texts[-1] = (path, text + data)
            else:
                self.texts.append((self._path(), data))

    def _path(self) -> tuple[str, ...]:
        return tuple(name for tag, classes in self._open for name in (tag, *classes))

    def inside(self, *names: str) -> list[str]:
        """Texts of elements whose innermost name is the last one and which lie inside the others."""
        return [text for path, text in self.texts if path[-1:] == names[-1:] and set(names) <= set(path)]
