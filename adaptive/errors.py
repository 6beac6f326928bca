"""The errors a user can cause; every command prints their message alone, without a traceback, and exits with `code`."""


class UserError(ValueError):
    """Something the user asked for cannot work. The message says what was wrong, where, and what would be right."""

    code = 2


class RecipeError(UserError):
    """A recipe, an override or a combination of settings is invalid."""


class NoRoomError(RecipeError):
    """A program of a recipe does not fit the memory of a device."""


class DataError(UserError):
    """A data source or a tokenizer is missing, malformed, or does not fit the recipe."""


class CheckpointError(UserError):
    """A workdir or checkpoint cannot be used as asked."""


class MeshError(UserError):
    """The requested mesh does not fit the devices, or an array does not divide over it."""


class ClusterError(UserError):
    """The processes of one job cannot find each other, or disagree about the job."""


class AbsentError(ClusterError):
    """A process of the job did not come in time. Starting all again may mend it."""

    code = 76


class StopError(RuntimeError):
    """A run cannot go on; the message says why."""

    code = 1


class NonFiniteError(StopError):
    """Too many consecutive steps had a non-finite loss or gradient."""

    code = 3


class CorruptionError(StopError):
    """The same step, computed twice from the same state, gave different results."""

    code = 4
