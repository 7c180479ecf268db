"""Names of repositories on the Hub."""

import re


def is_hub_id(name: str) -> bool:
    """Whether a repository of the Hub may be called so: name, or organisation/name."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
