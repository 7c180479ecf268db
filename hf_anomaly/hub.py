"""To the Hub, in one commit."""

import os

# What a run leaves in its folder that is no part of the result.
_NOT_SHARED = ["checkpoint-*", "*-training", ".*", "training_args.*"]


def push_folder(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | None = None, message: str = "Upload model"
) -> str:
    """Uploads a saved detector or dissolver in one commit, without checkpoints.

    Args:
        repo_id: "name" or "organisation/name"; created if it does not exist.
        private: whether a new repository is private.

    Returns:
        The commit's URL.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    patterns = [pattern for name in _NOT_SHARED for pattern in (name, f"{name}/**")]
    return api.upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), ignore_patterns=patterns, commit_message=message).commit_url
