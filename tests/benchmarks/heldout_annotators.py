"""Accuracy of reward models on annotators that they were not trained on, as in section 4.1 of Ouyang et al. 2022.

    stages sweep recipes/instructgpt-studies.yaml preference.data.validation=null preference.data.split_by=annotator \\
      preference.data.folds=5 "preference.data.fold=[0,1,2,3,4]" --until preference --metric steps.preference.metrics.heldout_accuracy
    python tests/benchmarks/heldout_annotators.py outputs/sweeps/instructgpt-studies/preference.data.fold-*/results.jsonl

The annotators are split into five groups. For each group (fold), one reward model is trained on the rankings of the other four groups. The
accuracy is measured on rankings of prompts that no model was trained on, in three rows:

- rankings by the fold's held-out annotators;
- the same rankings, judged by the four models that were trained on these annotators (annotators differ in how careful they are);
- rankings by annotators that the fold's model was trained on.

The paper reports 69.6 +- 0.9 % for held-out annotators and 72.4 +- 0.4 % for training annotators.

Time: the sweep trains five reward models; then seconds. Result: printed as a table; docs/results.md, section "Reward models".
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from stages.corpora.splits import shuffled_groups
from stages.corpora.templates import encode_pair
from stages.corpora.world.parts import world_rows
from stages.models.heads import RewardModel
from stages.registry.ledger import Registry
from stages.rewards.learned import score_rows
from stages.rl.ranking import ranking_pairs
from stages.stats.replicates import mean_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    chosen = parser.parse_args()
    results = [json.loads(line) for line in chosen.results.read_text().splitlines()]
    folds = {row["values"]["preference.data.fold"]: row["models"]["preference"] for row in results}
    registry = Registry(chosen.results.resolve().parents[3] / "registry")
    groups = shuffled_groups({row["annotator"] for row in world_rows("world:rankings")})  # as a step with split_by splits them
    fold_of = {name: index % len(folds) for index, name in enumerate(groups)}
    rows = [row for split in ("validation", "heldout") for row in world_rows(f"world:rankings/{split}")]

    hits: dict[tuple[int, int], list[bool]] = defaultdict(list)  # (model's fold, annotator's fold)
    for fold, ref in folds.items():
        model = RewardModel.from_pretrained(str(registry.get(ref).path), dtype=torch.float32).eval()
        tokenizer = model.tokenizer
        assert tokenizer is not None
        pairs = [(row["prompt"], text) for row in rows for text in row["completions"]]
        with torch.inference_mode():
            scores = score_rows([encode_pair(tokenizer, *pair)[0] for pair in pairs], model, tokenizer.pad_token_id, 64)
        start = 0
        for row in rows:
            end = start + len(row["completions"])
            better, worse = ranking_pairs(torch.tensor(row["ranks"]), torch.zeros(end - start, dtype=torch.long))
            hits[fold, fold_of[row["annotator"]]] += (scores[start:end][better] > scores[start:end][worse]).tolist()
            start = end

    def accuracy(*cells: tuple[int, int]) -> float:
        right = [hit for cell in cells for hit in hits[cell]]
        return sum(right) / len(right)

    numbers = sorted(folds)
    heldout = [accuracy((fold, fold)) for fold in numbers]
    trained_on = [accuracy(*((fold, other) for other in numbers if other != fold)) for fold in numbers]
    heldout_by_other_models = [accuracy(*((other, fold) for other in numbers if other != fold)) for fold in numbers]
    print("| | " + " | ".join(f"fold {fold}" for fold in numbers) + " | mean (95 %) |")
    print("|---" * (len(numbers) + 2) + "|")
    for name, values in (
        ("held-out annotators", heldout),
        ("the same rankings, models trained on these annotators", heldout_by_other_models),
        ("annotators of the training set", trained_on),
    ):
        mean, low, high = mean_interval(values)
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + f" | {mean:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
