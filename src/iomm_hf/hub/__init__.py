"""Publishing checkpoints on the Hub, with their model cards."""

from huggingface_hub.errors import HfHubHTTPError


# What the Hub's client, of whichever library, raises where it gets no answer.
UNREACHED: type[Exception] = HfHubHTTPError.__bases__[0]
