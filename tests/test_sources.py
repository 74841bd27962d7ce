"""Every source that a docstring names is in sources.bib, under the same arXiv number."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "thalweg"
ENTRIES = {
    found["key"]: found["eprint"]
    for found in re.finditer(
        r"@\w+\{(?P<key>\w+),.*?eprint\s*=\s*\{(?P<eprint>[\d.]+)\}",
        (ROOT / "sources.bib").read_text(),
        re.DOTALL,
    )
}


def test_the_four_papers_are_there() -> None:
    assert set(ENTRIES) >= {
        "zhang2021embedding",
        "zhang2022hierarchical",
        "dascoli2019finding",
        "anokhin2020lowloss",
        "tian2019luck",
    }


def test_a_key_is_cited_with_its_own_arxiv_number() -> None:
    cited = {
        (path.name, key, eprint)
        for path in ROOT.rglob("*.py")
        for key, eprint in re.findall(r"\b([a-z]+(?:19|20)\d\d[a-z]+)\s+\(arXiv\s+([\d.]+)", path.read_text())
    }
    assert cited
    assert [c for c in cited if ENTRIES.get(c[1]) != c[2]] == []
