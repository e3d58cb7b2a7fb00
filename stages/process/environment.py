"""What the environment says: the home folder, secrets, and what a launcher told this process. Imports no torch."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from stages.errors import LaunchError, RecipeError
from stages.process import redaction


def default_home() -> Path:
    """The folder under which everything made is kept: ``STAGES_HOME``, else ``outputs``."""
    return Path(os.environ.get("STAGES_HOME") or "outputs")


def secret(variable: str) -> str:
    """The secret in an environment variable; it must never reach a log, a manifest or a report. Raises RecipeError where it is not set."""
    value = os.environ.get(variable, "")
    if not value:
        raise RecipeError(f"the environment variable {variable} is not set; export it, or remove api_key_variable where no key is needed")
    return value


def secret_if_set(variable: str) -> str | None:
    """The secret in an environment variable, or None."""
    return os.environ.get(variable) or None


def protect_secrets() -> None:
    """Blot the environment's secrets out of what this process prints from now on."""
    redaction.protect(os.environ)
    sys.stdout, sys.stderr = redaction.Blotted(sys.stdout), redaction.Blotted(sys.stderr)


def command_to_go_on() -> str:
    """What the user typed, to be typed again: as launch.sh tells (STAGES_COMMAND), else this process's own arguments."""
    given = os.environ.get("STAGES_COMMAND")
    program = Path(sys.argv[0]).name
    return given or shlex.join(["stages" if program in ("stages", "__main__.py") else program, *sys.argv[1:]])


def launched_processes() -> int:
    """How many processes the launcher started (1 without a launcher); known without importing torch."""
    return _first_number("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", default=1)


def launched_rank() -> int:
    """This process's number among those the launcher started; known without importing torch."""
    return _first_number("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", default=0)


def _first_number(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def has_launcher() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process and waits for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_MODE" in os.environ


def is_short_of_processes() -> bool:
    """Whether ``accelerate launch`` was asked for several processes and started this one alone: it then sets MASTER_ADDR and no size."""
    by_accelerate = "ACCELERATE_DYNAMO_MODE" in os.environ and "MASTER_ADDR" in os.environ
    return by_accelerate and launched_processes() == 1 and not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE"))


def environment_without_launcher() -> dict[str, str]:
    """The environment less what a launcher set, for another launcher to begin from."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_", "KMP_"))}


def takes_sharding_over() -> bool:
    """Whether an accelerate config asked for FSDP2. It is then our own affair (models/sharding.py), on CPUs as well as on GPUs.

    Raises LaunchError for what is not offered.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise LaunchError("FSDP of version 1 was asked for; write fsdp_version: 2 into the accelerate config")
    for option, advice in (
        ("FSDP_OFFLOAD_PARAMS", "leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "write training: {gradient_checkpointing: true} into the step instead"),
    ):
        if os.environ.get(option, "").lower() == "true":
            raise LaunchError(f"{option.lower()} in the accelerate config is not offered here; {advice}")
    del os.environ["ACCELERATE_USE_FSDP"]
    return launched_processes() > 1


def uses_deepspeed() -> bool:
    """Whether an accelerate config asked for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def wants_cpu() -> bool:
    """Whether an accelerate config asked for the CPU."""
    return _is_set("ACCELERATE_USE_CPU")


def limit_onednn_caches() -> None:
    """Keep oneDNN's compiled code for 32 shapes, not for 1024 in oneDNN and again 1024 in PyTorch (for each thread).

    Ragged batches hardly ever repeat a shape: a long run would fill hundreds of MiB for nothing.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
