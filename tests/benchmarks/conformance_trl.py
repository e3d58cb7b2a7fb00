"""Compares TRL 1.12's PPO and reward trainer with the papers' numbers in tests/conformance/cases.py.

    python tests/benchmarks/conformance_trl.py [--trl-env FOLDER] [--json FILE]

The script prints for each number whether TRL computes it. TRL runs in a separate environment. TRL's maths is inline in
``PPOTrainer.train``, so the script extracts the lines from the installed source and runs them on the numbers of the case. The answers
therefore come from TRL's code, not from a copy of it.

Time: a few minutes for the environment, the first time only (it downloads packages); then less than a minute. Result:
results/conformance_trl.json; docs/results.md, section "Comparison with TRL's PPO by detail".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve()
CASES = HERE.parents[1] / "conformance" / "cases.py"
WHY = {
    "whiten-P8": "the variance is unbiased (the default of masked_var); the papers use the biased variance",
    "scale-P9": "the variance is unbiased, as for P8",
    "adam-G5": "torch's Adam, whose first steps are larger",
    "penalize-P25": "the penalty is subtracted; the papers replace the score",
    "ranking_loss-R2": "every pair has the same weight: a prompt with K = 9 counts as much as 36 prompts with K = 2",
    "reward_head_std-R10": "transformers' initializer_range, for every width",
    "mean_entropy-P34": "policy/entropy_avg counts padding",
    "rewards-P3": "the score is credited to the state after the last token if there is room, as in Huang et al.",
    "split": "a minibatch's loss is the mean of its microbatches' means, so tokens of short microbatches have more weight",
    "clip": "PPOTrainer.train never clips gradients and ignores max_grad_norm",
    "bias": "AutoModelForSequenceClassification has no bias: a reward model's centring is lost without a message (trl#1783)",
}


def load_cases() -> Any:
    spec = importlib.util.spec_from_file_location("conformance_cases", CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conformance_cases"] = module
    spec.loader.exec_module(module)
    return module


# Functions that run in TRL's environment


def lines_between(source: str, first: str, last: str) -> str:
    """The lines of ``source`` from the first that contains ``first`` to the next that contains ``last``, dedented."""
    lines = source.splitlines()
    begin = next(number for number, line in enumerate(lines) if first in line)
    end = next(number for number, line in enumerate(lines) if number >= begin and last in line)
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def trl_implementation(cases: Any) -> Any:
    import inspect

    import torch
    from trl.experimental.ppo import ppo_trainer
    from trl.trainer import reward_trainer
    from trl.trainer.utils import selective_log_softmax

    train = inspect.getsource(ppo_trainer.PPOTrainer.train)
    names = vars(ppo_trainer)
    args = SimpleNamespace(
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.0,
        kl_coef=0.1,
        kl_estimator="k1",
        missing_eos_penalty=1.0,
        whiten_rewards=False,
    )

    def run(first: str, last: str, **values: Any) -> dict[str, Any]:
        scope = {**names, "args": args, **values}
        exec(lines_between(train, first, last), scope)  # noqa: S102
        return scope

    def gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
        args.gamma, args.lam = gamma, lam
        masked = values.masked_fill(~mask, 0), rewards.masked_fill(~mask, 0)  # as the preceding lines of TRL do
        scope = run("lastgaelam = 0", "returns = advantages + values", values=masked[0], rewards=masked[1], responses=values)
        return scope["advantages"], scope["returns"]

    def losses(ratio: Any, advantages: Any, mask: Any, values: Any, old: Any, returns: Any) -> dict[str, Any]:
        rows = torch.arange(len(ratio))
        return run(
            "vpredclipped = torch.clamp(",
            "pg_loss = masked_mean(",
            vpred=values,
            mb_values=old,
            mb_return=returns,
            mb_advantage=advantages,
            padding_mask_p1=~mask,
            padding_mask=~mask,
            micro_batch_inds=rows,
            new_logprobs=ratio.log(),
            mb_logprobs=torch.zeros_like(ratio),
        )

    def policy_loss(ratio: Any, advantages: Any, mask: Any) -> Any:
        zeros = torch.zeros_like(ratio)
        return losses(ratio, advantages, mask, zeros, zeros, zeros)["pg_loss"]

    def value_loss(values: Any, old: Any, returns: Any, mask: Any) -> Any:
        return losses(torch.ones_like(values), torch.zeros_like(values), mask, values, old, returns)["vf_loss"]

    def adam(gradient: float, epsilon: float) -> float:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments("/tmp", learning_rate=1.0, adam_epsilon=epsilon, use_cpu=True)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        weight = torch.tensor([0.0], requires_grad=True)
        optimizer = kind([weight], **options)
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        return -weight.item()

    def penalize(scores: Any, stopped: Any) -> Any:
        responses = torch.where(stopped[:, None], 0, 5)
        trainer = SimpleNamespace(processing_class=SimpleNamespace(eos_token_id=0), args=args)
        return run(
            "contain_eos_token = torch.any(",
            "scores[~contain_eos_token]",
            postprocessed_responses=responses,
            self=trainer,
            scores=scores.clone(),
        )["scores"]

    def ranking_loss(prompts: Any) -> float:
        pairs = [(better, worse) for prompt in prompts for rank, better in enumerate(prompt) for worse in prompt[rank + 1 :]]
        scope = {
            **vars(reward_trainer),
            "rewards_chosen": torch.tensor([pair[0] for pair in pairs]),
            "rewards_rejected": torch.tensor([pair[1] for pair in pairs]),
        }
        source = inspect.getsource(reward_trainer.RewardTrainer.compute_loss)
        line = next(line for line in source.splitlines() if "logsigmoid(rewards_chosen - rewards_rejected)" in line)
        exec(line.strip(), scope)  # noqa: S102
        return float(scope["loss"])

    def rewards(scores: Any, log_ratio: Any, mask: Any, kl_coef: float) -> Any:
        args.kl_coef = kl_coef
        lengths = mask.sum(dim=1) - 1
        return run(
            "logr = ref_logprobs - logprobs",
            "rewards[actual_start, actual_end] += scores",
            logprobs=log_ratio.masked_fill(~mask, 0),
            ref_logprobs=torch.zeros_like(log_ratio),
            sequence_lengths=lengths,
            sequence_lengths_p1=lengths + 1,
            scores=scores,
        )["rewards"]

    def mean_entropy(logits: Any, mask: Any) -> float:
        scope = run("prob_dist = torch.nn.functional.softmax(logits", "entropy = torch.logsumexp(logits", logits=logits)
        return float(scope["entropy"].mean())  # as TRL computes entropy_stats

    def head_std(width: int) -> float:
        from transformers import LlamaConfig, LlamaForSequenceClassification

        config = LlamaConfig(vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1, num_labels=1)
        return float(torch.cat([LlamaForSequenceClassification(config).score.weight.detach() for _ in range(20)]).std())

    return cases.Implementation(
        name="trl 1.12.0",
        whiten=lambda x, mask: ppo_trainer.masked_whiten(x, mask),
        scale=lambda x, mask: ppo_trainer.masked_whiten(x, mask, shift_mean=False),
        gae=gae,
        policy_loss=policy_loss,
        value_loss=value_loss,
        adam=adam,
        penalize=penalize,
        ranking_loss=ranking_loss,
        response_mask=lambda ids, end: ppo_trainer.truncate_response(end, -1, ids) != -1,
        logprobs=lambda logits, tokens, temperature: selective_log_softmax(logits / (temperature + 1e-7), tokens),
        mean_entropy=mean_entropy,
        reward_head_std=head_std,
        rewards=rewards,
    )


def behaviours(implementation: Any) -> list[dict[str, Any]]:
    """Checks that need more than one function: microbatches and the loss, gradient clipping, a reward model's bias after loading."""
    import inspect
    import tempfile

    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
    from trl.experimental.ppo.ppo_trainer import PPOTrainer

    ratio, advantages = torch.ones(2, 3), torch.tensor([[-1.0, 0.0, 0.0], [-4.0, -4.0, -4.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    full_batch = float(implementation.policy_loss(ratio, advantages, mask))
    halves = [float(implementation.policy_loss(ratio[[row]], advantages[[row]], mask[[row]])) for row in range(2)]
    rows = [
        {
            "detail": "P11",
            "what": "a minibatch's loss does not depend on its split into microbatches",
            "expected": full_batch,
            "found": sum(halves) / 2,
            "key": "split",
        },
        {
            "detail": "P29",
            "what": "max_grad_norm clips gradients if it is set",
            "expected": 1.0,
            "found": float("clip_grad" in inspect.getsource(PPOTrainer.train)),
            "key": "clip",
        },
    ]
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1, pad_token_id=0
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    ids = torch.tensor([[3, 4, 5]])
    model.score = torch.nn.Linear(8, 1, bias=True)
    torch.nn.init.constant_(model.score.bias, -1.5)  # demonstrations have mean reward 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        centred = float(model(ids).logits)
        model.save_pretrained(folder)
        loaded = float(AutoModelForSequenceClassification.from_pretrained(folder).eval()(ids).logits)
    rows.append(
        {"detail": "R11", "what": "a reward model's bias survives saving and loading", "expected": centred, "found": loaded, "key": "bias"}
    )
    return rows


def compare_with_trl() -> list[dict[str, Any]]:
    """One row per case: the expected number, TRL's number and the verdict."""
    cases = load_cases()
    implementation = trl_implementation(cases)
    rows = []
    for case in cases.CASES:
        function = getattr(implementation, case.needs)
        row = {"detail": case.detail, "what": case.what, "expected": case.expected, "key": f"{case.needs}-{case.detail}"}
        if function is None:
            rows.append({**row, "verdict": "missing", "found": None})
            continue
        actual = case.run(function)
        rows.append(
            {**row, "found": actual, "verdict": "meets" if cases.difference(actual, case.expected) <= case.tolerance else "deviates"}
        )
    for row in behaviours(implementation):
        rows.append({**row, "verdict": "meets" if abs(row["found"] - row["expected"]) < 1e-4 else "deviates"})
    return rows


# Functions that run in this environment


def short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(short, value)) + "]"
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return str(value)
    return "nan" if math.isnan(value) else f"{value:.6g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-env", type=Path, default=Path("outputs/trl-1.12"), help="Folder of TRL's environment.")
    parser.add_argument("--json", type=Path, help="Also write the rows to this file.")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        print(json.dumps(compare_with_trl()))
        return
    from ppo_speed import trl_python  # TRL's environment does not need it

    python = trl_python(options.trl_env.absolute())
    done = subprocess.run([str(python), str(HERE), "--answer"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    for verdict in ("deviates", "missing", "meets"):
        print(f"\n{verdict}:")
        for row in rows:
            if row["verdict"] == verdict:
                print(f"  {row['detail']:4s} {row['what']}")
                if verdict == "deviates":
                    print(f"       expected {short(row['expected'])}, TRL {short(row['found'])}: {WHY.get(row['key'], '?')}")
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("meets", "deviates", "missing")}
    print("\n" + ", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
