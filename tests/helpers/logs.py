"""What loggers say."""

import contextlib
import logging

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def recorded_warnings(name: str = "modeling_stablemoe.model.tensors_stablemoe"):
    """Messages of one logger, which transformers keeps from propagating; what `warning_once` has said is forgotten."""
    transformers_logging.warning_once.cache_clear()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
