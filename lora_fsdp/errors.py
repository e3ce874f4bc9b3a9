"""Every exception that a user's input can cause.

Each message says what was wrong (file, row, key, value) and what to do about it. Each class also
subclasses the standard exception it stands for, so that ``except ValueError`` keeps working.

    LoraFsdpError
    ├── DataError(ValueError)           rows and tables
    │   ├── DataFileNotFoundError(FileNotFoundError)
    │   ├── UnsupportedTableError
    │   ├── NoRowsError
    │   ├── ColumnNotFoundError(LookupError)
    │   ├── TableEncodingError
    │   ├── MalformedRowError
    │   ├── EmptyTextError
    │   ├── UnknownLabelError
    │   ├── SingleLabelError
    │   ├── SplitError
    │   ├── RowTooLongError
    │   └── ControlTokenError
    ├── TaskError                       what is learnt
    │   ├── UnknownTaskError(LookupError)
    │   ├── DuplicateTaskError(ValueError)
    │   ├── BrokenTaskError(ImportError)
    │   ├── IncompleteTaskError(ValueError)
    │   └── LabelCollisionError(ValueError)
    ├── ModelError                      the base model and its adapter
    │   ├── ModelNotFoundError(FileNotFoundError)
    │   ├── ModelAccessError(PermissionError)
    │   ├── DownloadError(ConnectionError)
    │   ├── DiskSpaceError(OSError)
    │   ├── TokenizerNotFoundError(FileNotFoundError)
    │   ├── UnsupportedModelError(ValueError)
    │   ├── TargetModulesError(ValueError)
    │   ├── AdapterVerificationError(RuntimeError)
    │   ├── UnsafeFileError(ValueError)
    │   ├── UnsupportedAdapterError(ValueError)
    │   ├── BaseMismatchError(ValueError)
    │   └── MergeError(RuntimeError)
    ├── LaunchError(RuntimeError)       the ranks got something else than the launcher was asked for
    │   ├── Fsdp1ConfigError
    │   ├── FsdpOnOneProcessError
    │   ├── FsdpDroppedError
    │   ├── FsdpSettingError
    │   └── RankMismatchError
    ├── MissingPackageError(ImportError) an optional package that a task or a setting needs
    ├── ArgumentError(ValueError)       settings that contradict each other
    ├── OutputFolderError(FileExistsError)
    │   ├── OutputFolderInUseError
    │   └── OutputFileError
    ├── RunError                        the folder of a run, to report on
    │   ├── RunNotFoundError(FileNotFoundError)
    │   ├── DamagedRunError(ValueError)
    │   └── PdfError(RuntimeError)
    ├── CheckpointError(RuntimeError)   what a run leaves on disk to continue from
    │   ├── CheckpointSaveError(OSError)
    │   ├── DamagedCheckpointError(ValueError)
    │   └── ResumeMismatchError(ValueError)
    ├── WatchdogError(RuntimeError)     a run that went wrong while it ran
    │   ├── NonFiniteError(FloatingPointError)
    │   ├── RankDriftError
    │   ├── StalledRankError(TimeoutError)
    │   └── LostHostError(ConnectionError)
    ├── CaptureError(RuntimeError)      a step as a CUDA graph, with the gathers in it
    └── TrainingInterrupted(SystemExit) stopped on request, with a checkpoint; exit code 75
"""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or ""."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


class LoraFsdpError(Exception):
    """Base class of all errors that this library raises on purpose."""


class DataError(LoraFsdpError, ValueError):
    """Something is wrong with the rows."""


class DataFileNotFoundError(DataError, FileNotFoundError):
    """The data file or folder does not exist."""


class UnsupportedTableError(DataError):
    """The file's format is not one that can be read as a table."""


class NoRowsError(DataError):
    """The table holds no rows (or none is left)."""


class ColumnNotFoundError(DataError, LookupError):
    """A column is missing; the message names those that are there."""


class TableEncodingError(DataError):
    """The file is not in the encoding it was read with."""


class MalformedRowError(DataError):
    """A row cannot be parsed, or not be used; the message gives its number and the column."""


class EmptyTextError(DataError):
    """Rows whose text is empty or missing."""


class UnknownLabelError(DataError):
    """Rows whose label is missing or outside the task's label set."""


class SingleLabelError(DataError):
    """All rows carry the same label: there is nothing to learn."""


class SplitError(DataError):
    """The table is too small for the split asked for."""


class RowTooLongError(DataError):
    """An example does not fit `max_length` even with its text removed."""


class ControlTokenError(DataError):
    """A text holds a control token that the tokenizer cannot take as ordinary text."""


class TaskError(LoraFsdpError):
    """Something is wrong with a task or its registration."""


class UnknownTaskError(TaskError, LookupError):
    """No task of that name; the message suggests the nearest."""


class DuplicateTaskError(TaskError, ValueError):
    """Two tasks of one name; the message names both origins."""


class BrokenTaskError(TaskError, ImportError):
    """A plug-in's task fails to import; the message gives the reason."""


class IncompleteTaskError(TaskError, ValueError):
    """A task lacks something it needs (instruction, column, label set)."""


class LabelCollisionError(TaskError, ValueError):
    """Two labels, or two choices of a row, have the same tokens."""


class ModelError(LoraFsdpError):
    """Something is wrong with the base model or the adapter."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """The model folder does not exist, is incomplete, or the Hub name cannot be reached."""


class ModelAccessError(ModelError, PermissionError):
    """The Hub refuses a model: it is gated or private, or the token is wrong."""


class DownloadError(ModelError, ConnectionError):
    """A server could not be reached, or a download broke off or came out damaged."""


class DiskSpaceError(ModelError, OSError):
    """There is too little room on the disk for what is to be downloaded."""


class TokenizerNotFoundError(ModelError, FileNotFoundError):
    """The model folder holds no tokenizer."""


class UnsupportedModelError(ModelError, ValueError):
    """The architecture cannot be trained in packed sequences."""


class TargetModulesError(ModelError, ValueError):
    """LoRA target modules match nothing in this model."""


class AdapterVerificationError(ModelError, RuntimeError):
    """An adapter on disk, or on some rank, is not the one that was trained."""


class UnsafeFileError(ModelError, ValueError):
    """A file that is not opened: a pickle, or a name or link that leads out of its folder."""


class UnsupportedAdapterError(ModelError, ValueError):
    """An adapter that is not plain LoRA, or whose settings cannot be honoured here."""


class BaseMismatchError(ModelError, ValueError):
    """The adapter was trained on another base model; the message names both."""


class MergeError(ModelError, RuntimeError):
    """A merge that would not be right (an overflow, say), or that cannot be written."""


class LaunchError(LoraFsdpError, RuntimeError):
    """The processes are not what the launcher was asked for."""


class Fsdp1ConfigError(LaunchError):
    """The accelerate YAML asks for FSDP1; the message prints the FSDP2 equivalent."""


class FsdpOnOneProcessError(LaunchError):
    """The accelerate YAML asks for FSDP, but there is one process: nothing would be sharded."""


class FsdpDroppedError(LaunchError):
    """The accelerate YAML asks for FSDP or for N processes, and the ranks got something else."""


class FsdpSettingError(LaunchError):
    """An FSDP setting of the accelerate YAML that this library does not support."""


class RankMismatchError(LaunchError):
    """The ranks were started with different settings or different data."""


class MissingPackageError(LoraFsdpError, ImportError):
    """A task or a setting needs an optional package; the message has the command to install it."""


class ArgumentError(LoraFsdpError, ValueError):
    """Settings that contradict each other or cannot work."""


class OutputFolderError(LoraFsdpError, FileExistsError):
    """The output folder already holds a run."""


class RunError(LoraFsdpError):
    """A run's folder cannot be reported on."""


class RunNotFoundError(RunError, FileNotFoundError):
    """The folder does not exist or holds no run."""


class DamagedRunError(RunError, ValueError):
    """A file of a run cannot be read; the message names it."""


class PdfError(RunError, RuntimeError):
    """A page cannot be printed as a PDF: there is no browser, or it failed."""


class CheckpointError(LoraFsdpError, RuntimeError):
    """Something is wrong with a checkpoint."""


class CheckpointSaveError(CheckpointError, OSError):
    """A checkpoint or an adapter cannot be written; what was there before is as it was."""


class DamagedCheckpointError(CheckpointError, ValueError):
    """A checkpoint is not as it was written, or there is none that is."""


class ResumeMismatchError(CheckpointError, ValueError):
    """A run cannot go on from a checkpoint with these settings, data or processes."""


class WatchdogError(LoraFsdpError, RuntimeError):
    """A watchdog stopped the run; earlier checkpoints are as they were."""


class NonFiniteError(WatchdogError, FloatingPointError):
    """A step's loss or gradient is NaN or infinite; the message names step, ranks and rows."""


class RankDriftError(WatchdogError):
    """The ranks no longer hold the same adapter."""


class StalledRankError(WatchdogError, TimeoutError):
    """A rank makes no progress; it ends the process with 70, since its main thread cannot."""


class LostHostError(WatchdogError, ConnectionError):
    """Another machine of the run is gone: its processes ended, its power or its network failed."""


class CaptureError(LoraFsdpError, RuntimeError):
    """A step that gathers layers cannot be captured as a CUDA graph, nor run without one."""


class TrainingInterrupted(LoraFsdpError, SystemExit):
    """Training was stopped by SIGTERM or `--max_hours`; uncaught, it ends the process with 75.

    75 is the exit code that sysexits.h calls EX_TEMPFAIL: start again with
    `--resume_from_checkpoint true`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 75


class OutputFolderInUseError(OutputFolderError):
    """Another job that is still running writes into the output folder."""


class OutputFileError(OutputFolderError):
    """A file to be written is already there, or half written for another input."""
