"""Errors: everything that lapilli raises on purpose.

    LapilliError
    |- ConfigError (ValueError)           a config.json, recipe or option says the impossible
    |  |- UnknownKeyError                 a key that nothing reads (strict_config=True)
    |  |- ConfigFileError                 the same of a checkpoint's own file: a CheckpointError too
    |  '- UnsupportedModelError           a model, tower or projector that lapilli does not have:
    |                                     a CheckpointError too
    |- CheckpointError (ValueError)       the files of a checkpoint
    |  |- MissingFileError                a file that the checkpoint needs is not there
    |  |- MissingWeightsError             parameters without a tensor, tensors without a parameter
    |  |- ShapeMismatchError              a tensor of another shape than the config says
    |  '- UnsafeFileError                 a pickle that wants to run code
    |- MediaError (ValueError)            a picture that cannot be fetched or decoded
    |  '- MediaTooLargeError              more bytes or pixels than the limits allow
    |- DataError (ValueError)             a training sample, or the file that holds it
    |- StoreError (ValueError)            a store of embeddings: its files, ids, vectors or stamps
    |- PromptError (ValueError)           messages, templates, placeholders
    |  |- MediaCountMismatchError         another number of media than of places for them
    |  '- TemplateFileError               a checkpoint's own template: a CheckpointError too
    |- FusionError (ValueError)           features that do not fit their span
    '- GenerationError (ValueError)       sampling options, the context
       |- ContextTooLongError             prompt plus answer do not fit the context
       |- GrammarError                    a schema that no answer can be held to
       |- RequestError                    a request that an engine could not answer as it is
       |- BusyError                       as many requests as may wait are waiting
       |- ClosedError                     what should answer takes no requests any more
       '- ModelFailedError                the model or its engine failed in the middle of a step

A message names the thing, says what was expected and what was found, and what to do.
"""


class LapilliError(Exception):
    """The root: `except lapilli.LapilliError` catches everything raised on purpose."""


class ConfigError(LapilliError, ValueError):
    """A configuration, recipe or option that cannot be followed."""


class UnknownKeyError(ConfigError):
    """A configuration key that nothing reads."""


class CheckpointError(LapilliError, ValueError):
    """The files of a checkpoint are not usable."""


class ConfigFileError(ConfigError, CheckpointError):
    """A configuration file of a checkpoint that cannot be followed."""


class UnsupportedModelError(ConfigError, CheckpointError):
    """A model, tower or projector type that lapilli does not have."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that the checkpoint needs is not there."""


class MissingWeightsError(CheckpointError):
    """Parameters without a tensor, or tensors without a parameter."""


class ShapeMismatchError(CheckpointError):
    """A tensor has another shape than the configuration says."""


class UnsafeFileError(CheckpointError):
    """A pickle that would run code when read."""


class MediaError(LapilliError, ValueError):
    """A picture, or another medium, that cannot be fetched or decoded."""


class MediaTooLargeError(MediaError):
    """A medium of more bytes or pixels than the limits allow."""


class DataError(LapilliError, ValueError):
    """A training sample, or a file of samples, that cannot be learned from."""


class StoreError(LapilliError, ValueError):
    """A store of embeddings that cannot be read or written as asked."""


class PromptError(LapilliError, ValueError):
    """Messages that a template cannot render."""


class MediaCountMismatchError(PromptError):
    """Another number of media than of places for them."""


class TemplateFileError(PromptError, CheckpointError):
    """A conversation template in the files of a checkpoint that cannot be used."""


class FusionError(LapilliError, ValueError):
    """Features that do not fit the span that was kept for them."""


class GenerationError(LapilliError, ValueError):
    """Sampling options that contradict each other, or a step that cannot be taken."""


class ContextTooLongError(GenerationError):
    """Prompt plus answer do not fit the context of the language model."""


class GrammarError(GenerationError):
    """A JSON schema, regular expression, list of choices or Lark grammar that cannot be used."""


class RequestError(GenerationError):
    """A request that an engine could not answer as it is: ids, spans, media or options."""


class BusyError(GenerationError):
    """As many requests as may wait are waiting: the same one may be asked again later."""


class ClosedError(GenerationError):
    """An engine or a server that takes no requests any more."""


class ModelFailedError(GenerationError):
    """The model or its engine failed in the middle of a step, whatever was asked."""
