"""Upload a folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line
from mmdefense.libraries import needed

__all__ = ["HubTarget"]

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class HubTarget:
    """A repository to upload to, checked at once, before hours of work."""

    def __init__(self, repo: str, *, given: str = "", force: bool = False) -> None:
        """Check the name, the library and the login.

        Args:
            repo: ``OWNER/NAME``.
            given: What the user called the given model, which is never uploaded over.
            force: Whether files of a repository that exists are replaced.

        Raises:
            BadInputError: If the name is invalid, nobody is logged in, or the repository is that of
                the given model, or exists and must not be replaced.
            UnsupportedError: If the library is not installed.
        """
        if not _ID.fullmatch(repo):
            raise BadInputError(f"a hub repository must be OWNER/NAME, got {repo!r}")
        if repo.casefold() == given.casefold():
            raise BadInputError(f"hub repository {repo} is the given model; choose another")
        with needed("the hub"):
            from huggingface_hub import HfApi
        self.repo = repo
        self._api: Any = HfApi()
        try:
            self._api.whoami()
        except Exception as error:  # the client raises many kinds: no token, a bad one, no network
            raise BadInputError(
                f"you are not logged in to the hub: {one_line(error)}; run `hf auth login`, or "
                "set HF_TOKEN"
            ) from error
        if not force and self._exists():
            raise BadInputError(
                f"hub repository {repo} exists; choose another, or give --force to replace its "
                "files"
            )

    def _exists(self) -> bool:
        try:
            return bool(self._api.repo_exists(self.repo))
        except Exception as error:  # the client raises many kinds
            raise BadInputError(
                f"cannot check whether hub repository {self.repo} exists: {one_line(error)}"
            ) from error

    def upload(self, folder: Path) -> str:
        """Upload all files of a folder, and return where they are; a new repository is private.

        Raises:
            BadInputError: If the upload fails.
        """
        try:
            url = self._api.create_repo(self.repo, private=True, exist_ok=True)
            self._api.upload_folder(
                repo_id=self.repo, folder_path=str(folder), commit_message="Purified with mmdefense"
            )
        except Exception as error:  # the client raises many kinds
            raise BadInputError(
                f"{folder} was written, but the upload to the hub failed: {one_line(error)}"
            ) from error
        return str(url)
