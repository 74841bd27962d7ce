"""Every error that thalweg raises on purpose: `Expected <what>. Got <value>. <What to do>.`."""


class ThalwegError(Exception):
    """Base of all errors raised on purpose; the command line shows it as one line and exits 2."""


class ShapeError(ThalwegError, ValueError):
    """A tensor or a vector of parameters has the wrong shape."""


class StructureError(ThalwegError, ValueError):
    """A view is wrong, or a module cannot be traced, widened or narrowed."""


class PlanError(ThalwegError, ValueError):
    """A split plan breaks a law: shares that do not sum to 1, a width below the net's, a coupled group."""


class CheckpointError(ThalwegError, ValueError):
    """A checkpoint is missing, unreadable, unsafe, not finite, or does not fit its module."""


class ConfigError(ThalwegError, ValueError):
    """A preset, an option or a reference `module:name` is wrong."""


class DataError(ThalwegError, ValueError):
    """Data is missing, empty, or of a kind that the objective cannot stream."""


class StoreError(ThalwegError, OSError):
    """The run store cannot be read or written, or an object in it is damaged."""


class NumericalError(ThalwegError, ArithmeticError):
    """A number that must be finite is not."""


class MemoryLimitError(ThalwegError, MemoryError):
    """What is asked for would take more memory than there is, or than is allowed."""
