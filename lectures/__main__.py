"""List the lectures, each with its title and the papers it covers as the index tells.

python -m lectures
"""

import csv
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def title(lecture: Path) -> str:
    """The first heading of a lecture."""
    return re.search(r"^# # (.+)$", lecture.read_text(encoding="utf-8"), re.MULTILINE)[1]


def main() -> None:
    with open(HERE / "papers.tsv", encoding="utf-8", newline="") as file:
        papers = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for lecture in sorted(HERE.glob("[0-9][0-9]_*.py")):
        path = f"lectures/{lecture.name}"
        print(f"{path}\n    {title(lecture)}")
        for paper in papers:
            if path in paper["lecture"].split("; "):
                print(f"      - {paper['title']} ({paper['status']})")
    counts = {status: sum(paper["status"] == status for paper in papers) for status in ("works", "partly", "not yet")}
    print(f"\n{len(papers)} papers in the index: " + ", ".join(f"{count} {status}" for status, count in counts.items()))


if __name__ == "__main__":
    main()
