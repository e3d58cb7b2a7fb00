"""Runs three shipped recipes on local data, and takes a small picture of each report.

    python tests/benchmarks/real_runs.py [quickstart] [steer-sentiment] [hh-harmless] [--home DIR] [--pictures DIR]

quickstart runs unchanged. The other two recipes name models and data of the Hub. Here, overrides replace these by files in ../shared/data:

- steer-sentiment steers stories260K (260,032 parameters) toward "negative" by a small classifier that is trained on IMDb reviews. A second
  classifier is another judge.
- hh-harmless uses Anthropic's harmless pairs and the language model of two million parameters that tests/benchmarks/real_judgements.py
  trains. Run that script first, with the same --home.

The pictures need Chromium.

Time: quickstart takes 4 minutes. steer-sentiment takes 8 minutes for the first classifier and 5 minutes for PPO on one core; the second
classifier and hh-harmless are not measured. Result: results/report-*.png; docs/results.md.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = "../shared/data"
RESULTS = Path(__file__).with_name("results")

IMDB = [
    "sentiment.model=null",
    f"sentiment.data.train=[{SHARED}/imdb/train.jsonl.gz, {SHARED}/imdb/train_extra.jsonl.gz]",
    f"sentiment.data.validation={SHARED}/imdb/validation.jsonl.gz",
    "sentiment.tokenizer={vocab_size: 8192}",
]
TRAINING = "epochs: 4, batch_size: 32, microbatch_size: 32, weight_decay: 0.1, warmup_fraction: 0.05"
CLASSIFIER = [
    *IMDB,
    "sentiment.max_length=448",
    f"sentiment.training={{learning_rate: 1.0e-3, {TRAINING}}}",
    "sentiment.architecture={type: distilbert, dim: 128, hidden_dim: 256, n_layers: 1, n_heads: 4, dropout: 0.3}",
]
ANOTHER = [  # a classifier of another size that reads fewer tokens of a review
    *IMDB,
    "name=imdb-another",
    "sentiment.max_length=256",
    f"sentiment.training={{learning_rate: 5.0e-4, {TRAINING}}}",
    "sentiment.architecture={type: distilbert, dim: 128, hidden_dim: 512, n_layers: 2, n_heads: 4, dropout: 0.2}",
]
POLICY = f"{SHARED}/stories260K/hf"
REWARD = "model: imdb-sentiment/sentiment, label: negative"
STEER = [
    f"steered.policy={POLICY}",
    "steered.reward=[{" + REWARD + ", output: logit, name: sentiment}]",
    f"steered.data={SHARED}/tinystories/train.jsonl.gz",
    "steered.total_episodes=5120",
    "steered.kl_coef=0.1",
    "steered.training={learning_rate: 1.0e-4}",
    f"verdict.candidates.base={POLICY}",
    f"verdict.candidates.best-of-16.model={POLICY}",
    "verdict.candidates.best-of-16.best_of.reward={" + REWARD + ", output: logprob}",
    f"verdict.data={SHARED}/tinystories/validation.jsonl.gz",
    f"verdict.exclude={SHARED}/tinystories/train.jsonl.gz",
    "verdict.judges=[{" + REWARD + ", output: probability, name: sentiment}, "
    "{model: imdb-another/sentiment, label: negative, output: probability, name: another}]",
]
PAIRS = f"{SHARED}/hh_harmless"
HARMLESS = [
    "sft.model=real-judgements/base",
    "sft.max_length=320",
    "preference.max_length=320",
    "judge.max_length=320",
    "dpo.max_length=320",
    *(f"{step}.data.validation={PAIRS}/validation.jsonl.gz" for step in ("sft", "preference", "judge", "dpo")),
    f"sft.data.train={PAIRS}/train.jsonl.gz",
    *(f"{step}.data.train={{path: {PAIRS}/train.jsonl.gz, limit: 950}}" for step in ("preference", "dpo")),
    f"judge.data.train={{path: {PAIRS}/train.jsonl.gz, skip: 950}}",
    f"aligned.data={PAIRS}/train.jsonl.gz",
    "aligned.max_prompt_tokens=256",
    "aligned.total_episodes=3072",
    f"verdict.data={PAIRS}/validation.jsonl.gz",
    "verdict.candidates.base=real-judgements/base",
    "sft.training={learning_rate: 1.0e-3, epochs: 2, batch_size: 16, microbatch_size: 8}",
    *(f"{step}.training={{learning_rate: 2.0e-4, batch_size: 16, microbatch_size: 8}}" for step in ("preference", "judge")),
    "dpo.training={learning_rate: 1.0e-4, batch_size: 16, microbatch_size: 8}",
    "aligned.training={learning_rate: 2.0e-4, value_learning_rate: 5.0e-4}",
]
RUNS: dict[str, list[tuple[str, list[str]]]] = {
    "quickstart": [("quickstart", [])],
    "steer-sentiment": [
        ("imdb-sentiment", CLASSIFIER),
        ("imdb-sentiment", ANOTHER),
        ("steer-sentiment", STEER),
    ],
    "hh-harmless": [("hh-harmless", HARMLESS)],
}


def run(recipe: str, overrides: list[str], home: Path) -> None:
    command = [sys.executable, "-m", "stages", "run", f"recipes/{recipe}.yaml", *overrides, "--home", str(home)]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def picture(page: Path, target: Path, *, width: int = 1280, height: int = 940) -> None:
    """Save a picture of the top of a report, reduced to 5/8 of its size and to 48 colours, so that the file is small."""
    from PIL import Image
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium") or shutil.which("google-chrome"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(shutil.which("chromedriver"))))
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]})
        driver.get(page.as_uri())
        drawn = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    finally:
        driver.quit()
    target.parent.mkdir(parents=True, exist_ok=True)
    small = drawn.resize((width * 5 // 8, height * 5 // 8), Image.Resampling.LANCZOS)
    small.quantize(48, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--home", type=Path, default=Path("outputs"))
    parser.add_argument("--pictures", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    home = chosen.home.absolute()
    for name in chosen.runs or RUNS:
        for recipe, overrides in RUNS[name]:
            run(recipe, overrides, home)
        picture(home / "runs" / name / "latest" / "report.html", chosen.pictures / f"report-{name}.png")


if __name__ == "__main__":
    main()
