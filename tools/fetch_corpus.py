"""Fetches documentation packages of Debian and extracts their text: a corpus of tens of millions of tokens.

    apt-get download -> OUT/packages/NAME_VERSION_ARCH.deb -> dpkg-deb -x -> OUT/text/NAME_VERSION_ARCH.jsonl
                                                                             OUT/sources.json

Read are .html, .txt (both also as .gz) and dictionaries in dictd's format. Root is not needed. What is there already is
neither fetched nor extracted again. The licences are those of the packages (each has a copyright file) and differ: keep
the text to yourself.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from model.config import DataError
from model.files import write_durably

# Prose, reference and dictionaries. A name with a version is of Debian 12 or 13; what a release lacks is skipped.
PACKAGES = """
    anarchism bash-doc debian-faq debian-policy debian-reference-en developers-reference dict-devil dict-foldoc
    dict-gcide dict-jargon dict-vera dict-wn git-doc linux-doc-6.1 linux-doc-6.12 maxima-doc nodejs-doc octave-doc
    postgresql-doc-15 postgresql-doc-17 python-django-doc python-pandas-doc python-scipy-doc python-sympy-doc
    python3.11-doc python3.13-doc sbcl-doc sqlite3-doc vim-doc zsh-doc
""".split()
SHORTEST = 200  # characters; what is shorter is a stub or a redirection
DICTIONARY_CHARS = 16_000  # entries of a dictionary that follow each other make documents of about this size

# Sphinx's indices, and the sources of the pages that are read as HTML
LEFT_OUT = re.compile(r"/(_static|_sources|_modules)/|/(genindex[^/]*|py-modindex|search)\.html?$")
HTML = (".html", ".htm", ".xhtml")

SKIPPED_TAGS = {"script", "style", "title", "nav", "svg", "button", "select", "noscript"}
VOID_TAGS = set("area base br col embed hr img input link meta source track wbr".split())  # have no end (HTML 13.1.2)
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "dl", "blockquote", "section"}
LINES = {"div", "li", "tr", "br", "hr", "dt", "dd", "article", "main", "body"}
CELLS = {"td", "th"}

# Digits of dictd's numbers, most significant first (RFC 2229's dictd, dictfmt(1)).
DIGITS = {digit: i for i, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


class TextOfPage(HTMLParser):
    """The text of a page: lines where a browser breaks them, no scripts and no navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.preformatted = 0
        self.skipped_tag = ""  # the element that is being left out ...
        self.skipped_depth = 0  # ... and how many of its name are open: others may lack their end

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped_depth:
            self.skipped_depth += tag == self.skipped_tag
            return
        given = dict(attrs)
        is_link_mark = "headerlink" in (given.get("class") or "").split()  # Sphinx's paragraph sign behind headings
        if tag in SKIPPED_TAGS or given.get("role") == "navigation" or is_link_mark:
            if tag not in VOID_TAGS:
                self.skipped_tag, self.skipped_depth = tag, 1
            return
        self.preformatted += tag == "pre"
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self.skipped_depth:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.skipped_depth:
            self.skipped_depth -= tag == self.skipped_tag
            return
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self.skipped_depth:
            return
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1][-1:].isspace():
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        end = self.parts[-1] if self.parts else ""
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in LINES and not end.endswith("\n"):
            self.parts.append("\n")
        elif tag in CELLS and not end[-1:].isspace():
            self.parts.append(" ")


def html_to_text(page: str) -> str:
    parser = TextOfPage()
    parser.feed(page)
    parser.close()
    return tidy("".join(parser.parts))


def tidy(text: str) -> str:
    """No blanks at the end of lines, one empty line at most, none around the text."""
    text = "\n".join(line.rstrip(" \t\r") for line in text.split("\n"))  # in time that grows with the text, no faster
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def dictionary_texts(index: str, content: bytes) -> Iterator[str]:
    """The entries of a dictionary in dictd's format, in their order in `content`, joined to documents.

    A line of `index` is: headword, tab, first byte, tab, number of bytes. Several headwords may share an entry.
    """
    spans = set()
    for line in index.splitlines():
        headword, _, place = line.partition("\t")
        if not headword.startswith(("00-database", "00database")):  # facts about the dictionary, kept like entries
            start, length = (number_of(digits) for digits in place.split("\t")[:2])
            spans.add((start, start + length))
    entries: list[str] = []
    num_chars = end = num_bad = 0
    for first, last in sorted(spans):
        if first < end:
            continue  # inside of the one before
        end = last
        try:
            entry = tidy(content[first:last].decode("utf-8"))
        except UnicodeDecodeError:
            num_bad += 1
            continue
        entries.append(entry)
        num_chars += len(entry)
        if num_chars >= DICTIONARY_CHARS:
            yield "\n\n".join(entries)
            entries, num_chars = [], 0
    if entries:
        yield "\n\n".join(entries)
    if num_bad:
        print(f"  left out, not UTF-8: {num_bad} of its entries")


def number_of(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * len(DIGITS) + DIGITS[digit]
    return number


class NotInRelease(DataError):
    """apt's lists have no such package."""


class Extracted(NamedTuple):
    path: str  # inside of the package
    text: str


def extract(folder: Path) -> Iterator[Extracted]:
    """Every document below `folder`, by sorted path. Links, duplicates, stubs and what is not UTF-8 are left out."""
    seen, num_bad = set(), 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or LEFT_OUT.search(f"/{name}"):
            continue
        try:
            texts = list(texts_of(path))
        except UnicodeDecodeError:
            num_bad += 1
            continue
        except (gzip.BadGzipFile, EOFError, zlib.error) as fault:
            print(f"  left out, damaged: {name} ({fault})")
            continue
        for text in texts:
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if len(text) >= SHORTEST and digest not in seen:
                seen.add(digest)
                yield Extracted(name, text)
    if num_bad:
        print(f"  left out, not UTF-8: {num_bad} of its files")


def texts_of(path: Path) -> Iterator[str]:
    kind = Path(path.name.removesuffix(".gz").removesuffix(".dz")).suffix.lower()
    if kind in (*HTML, ".txt", ".dict"):
        content = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        if kind == ".dict":
            index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
            yield from dictionary_texts(index.read_text(encoding="utf-8"), content)
        else:
            text = content.decode("utf-8")
            yield html_to_text(text) if kind in HTML else tidy(text)


def fetch(package: str, folder: Path) -> Path:
    """The package's .deb in `folder`, fetched if it is not there. Raises DataError if it cannot be."""
    if kept := sorted(folder.glob(f"{package}_*.deb")):
        return kept[-1]
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        command, english = ["apt-get", "download", package], {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, cwd=draft, env=english, capture_output=True, text=True, check=False)
        fetched = list(Path(draft).glob("*.deb"))
        if done.returncode or not fetched:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no reason given"]
            refusal = NotInRelease if any("Unable to locate package" in error for error in errors) else DataError
            raise refusal(
                f"{package} cannot be fetched: {errors[0].removeprefix('E:').strip()}. Bring apt's lists up to date "
                "(apt-get update, as root), or name packages that this release has: --packages."
            )
        return fetched[0].rename(folder / fetched[0].name)


def extract_package(deb: Path, out: Path) -> None:
    """Writes the documents of a .deb to `out`, one JSON object a line."""
    with tempfile.TemporaryDirectory(dir=deb.parent) as folder:  # not beside `out`: all text there is read
        dpkg_deb("-x", str(deb), folder)
        lines = [json.dumps({"text": text, "path": path}) for path, text in extract(Path(folder))]
    write_durably(out, "".join(f"{line}\n" for line in lines).encode("utf-8"))


def dpkg_deb(option: str, deb: str, *more: str) -> str:
    """What dpkg-deb prints. Raises DataError if it cannot read `deb`."""
    done = subprocess.run(["dpkg-deb", option, deb, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{deb} cannot be unpacked: {reason}. Delete it: the same command fetches it again.")
    return done.stdout


def describe(package: str, deb: Path, text: Path) -> dict[str, Any]:
    version = dpkg_deb("-f", str(deb), "Version")
    with open(text, encoding="utf-8") as lines:
        sizes = [len(json.loads(line)["text"].encode("utf-8")) for line in lines]
    return {
        "package": package,
        "version": version.strip(),
        "file": deb.name,
        "sha256": hashlib.sha256(deb.read_bytes()).hexdigest(),
        "documents": len(sizes),
        "bytes": sum(sizes),
    }


def fetch_corpus(out: Path, packages: Iterable[str], may_skip: bool) -> None:
    """Fills out/text with the documents of `packages`, and with nothing else. Raises DataError if it cannot."""
    missing = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if missing:
        raise DataError(
            f"{' and '.join(missing)} missing: this corpus is made of Debian's packages. Run it on Debian or Ubuntu, "
            "or prepare texts of your own: python -m tools.prepare_data --help."
        )
    (out / "packages").mkdir(parents=True, exist_ok=True)
    (out / "text").mkdir(exist_ok=True)
    sources = []
    for package in packages:
        try:
            deb = fetch(package, out / "packages")
        except NotInRelease as refusal:
            if not may_skip:
                raise
            print(f"{package}: skipped, {str(refusal).partition('. Bring')[0]}", flush=True)
            continue
        text = out / "text" / f"{deb.stem}.jsonl"
        if not text.is_file():
            extract_package(deb, text)
        sources.append(describe(package, deb, text))
        print(f"{package}: {sources[-1]['documents']:,} documents, {sources[-1]['bytes']:,} bytes", flush=True)
    if not sources:
        raise DataError(
            "none of the packages can be fetched. Bring apt's lists up to date (apt-get update, as root), or name "
            "others: --packages."
        )
    wanted = {f"{Path(source['file']).stem}.jsonl" for source in sources}
    for path in (out / "text").glob("*.jsonl"):
        if path.name not in wanted:
            path.unlink()
    write_durably(out / "sources.json", (json.dumps(sources, indent=2) + "\n").encode("utf-8"))
    documents, num_bytes = (sum(source[key] for source in sources) for key in ("documents", "bytes"))
    print(f"{out / 'text'}: {documents:,} documents, {num_bytes:,} bytes of {len(sources)} packages")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_corpus",
        description="Fetch documentation packages of Debian with apt-get and extract their text, as .jsonl for "
        "tools.prepare_data. Licences are those of the packages. Exit code 0: the text is there, 2: refused.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/debian"), help="folder to fill; default: %(default)s")
    parser.add_argument(
        "--packages",
        nargs="+",
        metavar="NAME",
        help="default: a list; what a release lacks of it is skipped",
    )
    args = parser.parse_args(argv)
    try:
        fetch_corpus(args.out.resolve(), args.packages or PACKAGES, may_skip=args.packages is None)
    except DataError as refusal:
        print(f"DataError: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
