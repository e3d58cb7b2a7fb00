"""How often the simulated annotators agree with each other and with the gold judge.

    python tests/benchmarks/agreement.py

Every annotator ranks the completions of the same held-out rows. A pair of completions counts if both annotators prefer one of the two.
Ouyang et al. 2022 report 72.6 +- 1.5 % agreement among training labelers and 77.3 +- 1.3 % among held-out labelers, and 73 +- 4 % among
the researchers of Stiennon et al. 2020.

Time: seconds. Result: printed as a table; docs/results.md, section "Reward models".
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
    """(agreement of each pair of annotators, agreement of each annotator with the gold judge, share of ties).

    Agreement is a share of the pairs of completions in which neither side has a tie.
    """
    people = annotators()
    between_annotators = {pair: [0, 0] for pair in itertools.combinations(range(len(people)), 2)}  # [agreements, comparisons]
    with_judge = [[0, 0] for _ in people]
    ties = total = 0
    for number, row in enumerate(world_rows(f"world:{part}/heldout")):
        request, texts = read_request(row["prompt"]), row["completions"]
        assert request is not None
        scores = [gold.score(row["prompt"], text) for text in texts]
        ranks = [person.rank(Random(f"agreement {number} {person.name}"), request, texts, haste=haste) for person in people]
        for a, b in itertools.combinations(range(len(texts)), 2):
            preferences = [(rank[a] > rank[b]) - (rank[a] < rank[b]) for rank in ranks]  # 0: a tie
            judge_preference = (scores[a] < scores[b]) - (scores[a] > scores[b])
            ties += preferences.count(0)
            total += len(preferences)
            for index, preference in enumerate(preferences):
                if preference and judge_preference:
                    with_judge[index][0] += preference == judge_preference
                    with_judge[index][1] += 1
            for (first, second), counts in between_annotators.items():
                if preferences[first] and preferences[second]:
                    counts[0] += preferences[first] == preferences[second]
                    counts[1] += 1
    return [hits / count for hits, count in between_annotators.values()], [hits / count for hits, count in with_judge], ties / total


def main() -> None:
    print("| data | agreement of two annotators (mean, minimum, maximum) | agreement with the gold judge (mean, minimum, maximum) | ties |")
    print("|---|---|---|---|")
    for part, haste in (("comparisons", 1.0), ("rankings", HASTE)):
        pairs, judge, ties = agreement(part, haste)
        cells = [f"{mean_interval(values)[0]:.1%}, {min(values):.1%}, {max(values):.1%}" for values in (pairs, judge)]
        print(f"| world:{part} | {cells[0]} | {cells[1]} | {ties:.1%} |")


if __name__ == "__main__":
    main()
