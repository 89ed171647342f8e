"""The one error tree. An error's type says how the process ends; its text names the fix.

Whatever a user can cause is a `TitanliteError`, printed as a paragraph; anything else is our mistake, with a traceback.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE = 0
EXIT_RECIPE = 2
EXIT_GUARD = 3
EXIT_CHECKPOINT = 4
EXIT_STOPPED_EARLY = 75


class TitanliteError(Exception):
    """Base of every error a user can cause or meet."""

    exit_code = 1
    on_all_ranks = False  # whether each ends with it: then one of each machine prints it, and its code is the run's

    def __init_subclass__(cls, exit_code: int | None = None, on_all_ranks: bool | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code
        cls.on_all_ranks = cls.on_all_ranks if on_all_ranks is None else on_all_ranks


@dataclass(frozen=True)
class Finding:
    """One thing wrong (or worth saying) about a recipe: where, what, and what to do about it."""

    key: str  # dotted recipe key, such as `training.steps`; empty for the file as a whole
    problem: str
    fix: str = ""
    file: str = ""
    line: int = 0
    severity: str = "error"  # `error` refuses the run; `warning` is printed and the run goes on
    extended_by: str = ""  # the recipe that was asked for, where `file` is another one that it extends

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        key = f"{self.key}: " if self.key else ""
        fix = f" {self.fix}" if self.fix else ""
        heir = f" ({self.extended_by} extends this file, and may set the key.)" if self.extended_by else ""
        return f"{place}{key}{self.problem}{fix}{heir}"


def warning(key: str, problem: str, fix: str) -> Finding:
    """A finding about a recipe that runs all the same."""
    return Finding(key, problem, fix, severity="warning")


class UsageError(TitanliteError, exit_code=EXIT_RECIPE):
    """The command line, an input file or the run folder is not what it must be."""


class RecipeError(TitanliteError, exit_code=EXIT_RECIPE, on_all_ranks=True):
    """A recipe that must not run; carries every finding, not only the first."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__("\n".join(str(finding) for finding in findings))


class CommandLineError(UsageError, on_all_ranks=True):
    """What stands on the command line makes no sense; all ranks of a job are given the same."""


class DataError(UsageError):
    """A corpus, a data file or a tokenizer that cannot be used; the text names the file."""


class WorkerKilled(DataError):
    """A process that read data for this one was killed from outside. Like a rank that is, it counts as no crash."""


class GuardStop(TitanliteError, exit_code=EXIT_GUARD, on_all_ranks=True):
    """A guard ended the training: the numbers went wrong, and the recipe asks to stop."""


class NonfiniteFound(GuardStop, on_all_ranks=False):
    """A module made a number that is not finite. Other than what the guards judge, only one rank may have met it."""


class OtherRankFailed(TitanliteError):
    """This rank is sound, and ends because another one has."""


class CheckpointError(TitanliteError, exit_code=EXIT_CHECKPOINT):
    """A checkpoint could not be written, or none that fits could be read."""


class DamagedCheckpointError(CheckpointError):
    """One checkpoint is not whole: a file is missing, cut or changed. An older one may still serve."""


class NewerFormatError(CheckpointError):
    """Written by a later titanlite; going on from an older checkpoint instead would lose work in silence."""


class RunFolderLost(CheckpointError, on_all_ranks=True):
    """The run's folder may be another process's by now: nothing more may be written there, and no retry helps."""


class StoppedEarly(TitanliteError, exit_code=EXIT_STOPPED_EARLY, on_all_ranks=True):
    """A signal or a limit of the recipe ended the run before its last step; its state is saved."""

    signalled = False  # whether a signal to one rank or more was the reason
    received = False  # whether this process was signalled itself


MILDEST_FIRST = (DamagedCheckpointError, NewerFormatError, RunFolderLost, CheckpointError, UsageError, GuardStop)
"""Errors that one rank's are raised as on all (see `Ranks`): an older checkpoint mends damage, and nothing else."""
