"""Uploading a checkpoint to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from fractal_rm.errors import reason

# The model card of a folder: what the hub shows first.
CARD = "README.md"


def upload(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload a folder as a model.

    Args:
        folder: What is uploaded.
        repo_id: Where to; it is made if it is not there.
        private: Make it private; default: that of the organization.
        token: Access token; default: the one that is stored.

    Returns:
        The address of the commit.

    Raises:
        ConnectionError: If the hub cannot be reached or refuses.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            f"{repo_id} was not uploaded: HF_HUB_OFFLINE is set. Unset it where there is a network, or save the model "
            "and upload its folder later with `hf upload`."
        )
    api = huggingface_hub.HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload a reward model"))
    except Exception as error:  # of the HTTP library, which is another one in older versions of huggingface_hub
        raise ConnectionError(
            f"{repo_id} was not uploaded ({reason(error)}). Check the name, the network and `hf auth login`, or save "
            "the model and upload its folder later with `hf upload`."
        ) from error
