"""How often simulated annotators agree with each other and with the gold judge, as Ouyang et al. 2022 report for their labelers.

    python tests/benchmarks/agreement.py

Every annotator ranks the same held-out rows; a pair of completions counts where both annotators have a preference. The paper: 72.6 +- 1.5 %
among training labelers, 77.3 +- 1.3 % among held-out ones, 73 +- 4 % among the researchers of Stiennon et al. 2020.
"""

from __future__ import annotations

import itertools
from random import Random

from stages.corpora.world import gold
from stages.corpora.world.annotators import annotators
from stages.corpora.world.language import read_request
from stages.corpora.world.parts import HASTE, world_rows
from stages.stats.replicates import mean_interval


def agreement(part: str, haste: float) -> tuple[list[float], list[float], float]:
    """(share of equal preferences of each pair of annotators, of each annotator with the judge, share of ties)."""
    people = annotators()
    same = {pair: [0, 0] for pair in itertools.combinations(range(len(people)), 2)}
    with_judge = [[0, 0] for _ in people]
    ties = total = 0
    for number, row in enumerate(world_rows(f"world:{part}/heldout")):
        request, texts = read_request(row["prompt"]), row["completions"]
        assert request is not None
        scores = [gold.score(row["prompt"], text) for text in texts]
        ranks = [person.rank(Random(f"agreement {number} {person.name}"), request, texts, haste=haste) for person in people]
        for a, b in itertools.combinations(range(len(texts)), 2):
            views = [(rank[a] > rank[b]) - (rank[a] < rank[b]) for rank in ranks]  # 0: a tie
            truth = (scores[a] < scores[b]) - (scores[a] > scores[b])
            ties += views.count(0)
            total += len(views)
            for index, view in enumerate(views):
                if view and truth:
                    with_judge[index][0] += view == truth
                    with_judge[index][1] += 1
            for (one, other), counts in same.items():
                if views[one] and views[other]:
                    counts[0] += views[one] == views[other]
                    counts[1] += 1
    return [hits / count for hits, count in same.values()], [hits / count for hits, count in with_judge], ties / total


def main() -> None:
    print("| part | two annotators agree (of pairs of annotators: mean, least, most) | with the gold judge (mean, least, most) | ties |")
    print("|---|---|---|---|")
    for part, haste in (("comparisons", 1.0), ("rankings", HASTE)):
        pairs, judge, ties = agreement(part, haste)
        cells = [f"{mean_interval(values)[0]:.1%}, {min(values):.1%}, {max(values):.1%}" for values in (pairs, judge)]
        print(f"| world:{part} | {cells[0]} | {cells[1]} | {ties:.1%} |")


if __name__ == "__main__":
    main()
