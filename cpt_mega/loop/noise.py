"""Keeps what libraries say to their own developers off a user's screen."""

import logging
import warnings

# By the module that warns: a user of this trainer can do nothing about any of them.
_NOISY = (
    (UserWarning, r"megatron\.core"),
    (FutureWarning, r"torch\.|megatron\.core"),
    (DeprecationWarning, r"torch\.|megatron\.core"),
)


def quieten() -> None:
    """Entry points call it before they import the engine; tests do not call it."""
    for category, module in _NOISY:
        warnings.filterwarnings("ignore", category=category, module=module)
    # Some name their caller as the place of the warning.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(is deprecated|we are deprecating)")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
