"""Every exception that anyprec raises on purpose.

    AnyprecError
    |-- BitsError (ValueError)              a bit-width, `Bits` or configuration that does not fit
    |-- ConversionError (ValueError)        a network or pattern that `convert` cannot take
    |-- CalibrationError (ValueError)       calibration data that gives no step size
    |-- NotCalibratedError (RuntimeError)   low precision without step sizes
    |-- TrainingError (RuntimeError)        the training hooks used out of order
    |-- BudgetError (ValueError)            a budget that is unreadable, or that nothing fits
    |-- SearchError (ValueError)            a search that cannot be made, or a wrong search file
    |-- PrecisionError (RuntimeError)       a precision that another thread or pass has set
    |-- PackedError (RuntimeError)          latent weights asked of integer codes
    |-- CheckpointError (ValueError)        a file that is damaged, foreign or does not match
    |-- HardwareError (ValueError)          a target that is not known, or that cannot run something
    |-- ExportError (ValueError)            a network or precision that a target cannot have
    |-- BatchError (ValueError, TypeError)  images or labels that a network cannot take
    `-- NoValuesError (RuntimeError)        values asked of a network on the meta device

    StaleNormsWarning (UserWarning)         evaluation on norm statistics of earlier weights
    InputSizeWarning (UserWarning)          costs counted at another input size
    NegativeInputWarning (UserWarning)      an input that was never to be negative, and is

Each error also derives from the built-in that people would expect, so `except ValueError` keeps
working. Messages name the value that was found, what is allowed, and the remedy.
"""


class AnyprecError(Exception):
    """Base of every error that anyprec raises on purpose."""


class BitsError(AnyprecError, ValueError):
    """A bit-width, a `Bits` value or a configuration that does not fit the network."""


class ConversionError(AnyprecError, ValueError):
    """A network, a pattern or a setting that `convert` cannot take."""


class CalibrationError(AnyprecError, ValueError):
    """Calibration data from which no step size can be estimated."""


class NotCalibratedError(AnyprecError, RuntimeError):
    """A precision was asked of a network whose activation step sizes are not set yet."""


class TrainingError(AnyprecError, RuntimeError):
    """The training hooks were used out of order, or training left the finite numbers.

    Or the statistics of norms were to be reset or averaged in a way that copies cannot follow.
    """


class BudgetError(AnyprecError, ValueError):
    """A budget that cannot be read, or that no configuration fits."""


class SearchError(AnyprecError, ValueError):
    """An argument that no search can be made with, or a search file that is damaged or foreign."""


class PrecisionError(AnyprecError, RuntimeError):
    """A pass would run at a precision that another thread, task or backward pass has set."""


class PackedError(AnyprecError, RuntimeError):
    """Latent weights were asked of a network that holds integer codes only.

    They are needed to train, to calibrate and to run in floating point.
    """


class CheckpointError(AnyprecError, ValueError):
    """A checkpoint that is damaged, of another format, or of another network."""


class ExportError(AnyprecError, ValueError):
    """A network, a precision or a target that cannot be exported, or a tool that is missing."""


class StaleNormsWarning(UserWarning):
    """A network is evaluated on norm statistics that training has left behind."""


class BatchError(AnyprecError, ValueError, TypeError):
    """A loader yields images or labels that cannot be used, or is no loader at all."""


class NoValuesError(AnyprecError, RuntimeError):
    """Values were asked of a network on the meta device, whose tensors have none."""


class InputSizeWarning(UserWarning):
    """Costs are counted at another input size than that of the images in use."""


class NegativeInputWarning(UserWarning):
    """Calibration met a negative input of a layer that conversion had taken for never negative."""


class HardwareError(AnyprecError, ValueError):
    """A target that the table of hardware does not have, or something that a target cannot run."""
