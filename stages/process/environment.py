"""Settings from environment variables: the home folder, secrets, and what a launcher passed to this process. Does not import torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stages.errors import LaunchError, RecipeError
from stages.process import redaction


def default_home() -> Path:
    """The folder for all results: ``STAGES_HOME``, else ``outputs``."""
    return Path(os.environ.get("STAGES_HOME") or "outputs")


def secret(variable: str) -> str:
    """Read a secret from an environment variable. It must never reach a log, manifest or report. Raises RecipeError if it is not set."""
    value = os.environ.get(variable, "")
    if not value:
        raise RecipeError(f"the environment variable {variable} is not set; export it, or remove api_key_variable if no key is needed")
    return value


def secret_if_set(variable: str) -> str | None:
    """The secret in an environment variable, or None."""
    return os.environ.get(variable) or None


def protect_secrets() -> None:
    """Redact the environment's secrets in all further output of this process."""
    redaction.protect(os.environ)
    sys.stdout, sys.stderr = redaction.Blotted(sys.stdout), redaction.Blotted(sys.stderr)


def continue_command() -> str:
    """The user's command, to repeat it: from launch.sh (STAGES_COMMAND), from the launcher, else this process's arguments."""
    if given := os.environ.get("STAGES_COMMAND"):
        return given
    if has_launcher() and (launcher := launcher_command()) is not None:
        return shlex.join([*launcher[0], *launcher[1]])
    program = Path(sys.argv[0]).name
    words = ["stages"] if program in ("stages", "__main__.py") else ["python", sys.argv[0]] if program.endswith(".py") else [program]
    return shlex.join([*words, *sys.argv[1:]])


def launcher_command() -> tuple[list[str], list[str]] | None:
    """(``accelerate launch`` or ``torchrun``, its arguments) of the process that started this one. None if no parent is a launcher."""
    import psutil

    for parent in psutil.Process().parents():
        with suppress(psutil.Error):
            if (launcher := _launcher_in(parent.cmdline())) is not None:
                return launcher
    return None


def _launcher_in(words: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """(the launcher, its arguments) of a command line, as the user would type it. None if the command line is not of a launcher."""
    for index, word in enumerate(words[:4]):
        name, arguments = os.path.basename(word), list(words[index + 1 :])
        if name == "accelerate" and arguments[:1] == ["launch"]:
            return ["accelerate", "launch"], arguments[1:]
        if name == "accelerate-launch" or word in (
            "accelerate.commands.launch",
            "accelerate/commands/launch.py",
            "stages.process.launching",
        ):
            return ["accelerate", "launch"], arguments
        if name == "torchrun" or word == "torch.distributed.run":
            return ["torchrun"], arguments
    return None


def launched_processes() -> int:
    """Number of processes that the launcher started (1 without a launcher). Does not import torch."""
    return _first_number("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", default=1)


def launched_rank() -> int:
    """This process's rank among the launched processes. Does not import torch."""
    return _first_number("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", default=0)


def _first_number(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def has_launcher() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process and waits for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_MODE" in os.environ


def is_short_of_processes() -> bool:
    """Whether ``accelerate launch`` should have started several processes but started only this one: it sets MASTER_ADDR but no size."""
    by_accelerate = "ACCELERATE_DYNAMO_MODE" in os.environ and "MASTER_ADDR" in os.environ
    return by_accelerate and launched_processes() == 1 and not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE"))


def wants_own_layers() -> bool:
    """Whether models may use Tristage's own layers. Raises LaunchError for another value of STAGES_OWN_LAYERS than 0 and 1."""
    value = os.environ.get("STAGES_OWN_LAYERS") or "1"
    if value not in ("0", "1"):
        raise LaunchError(f"STAGES_OWN_LAYERS={value}: expected 0 (keep the layers of transformers) or 1; set one of them, or unset it")
    return value == "1"


def environment_without_launcher() -> dict[str, str]:
    """The environment without a launcher's variables, for another launcher."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_", "KMP_"))}


def takes_sharding_over() -> bool:
    """Whether an accelerate config requested FSDP2. This project then shards the models (models/sharding.py), on CPUs and GPUs.

    Raises LaunchError for unsupported options.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise LaunchError("FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config")
    for option, advice in (
        ("FSDP_OFFLOAD_PARAMS", "remove it"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set training: {gradient_checkpointing: true} in the step instead"),
    ):
        if os.environ.get(option, "").lower() == "true":
            raise LaunchError(f"{option.lower()} in the accelerate config is not supported; {advice}")
    del os.environ["ACCELERATE_USE_FSDP"]
    return launched_processes() > 1


def uses_deepspeed() -> bool:
    """Whether an accelerate config requested DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def wants_cpu() -> bool:
    """Whether an accelerate config requested the CPU."""
    return _is_set("ACCELERATE_USE_CPU")


def limit_onednn_caches() -> None:
    """Limit oneDNN's code cache to 32 shapes, instead of 1024 in oneDNN and 1024 in PyTorch (per thread).

    Batches of varying lengths rarely repeat a shape, so a long run would fill hundreds of MiB for nothing.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
