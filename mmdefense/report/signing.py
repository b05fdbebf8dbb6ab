"""Sign the folder of a purification, evidence included, and verify it, by ``model_signing``.

What is signed is its own manifest: the SHA-256 of every file of the folder, ``purification.json``
among them, as an in-toto statement in a Sigstore bundle. With keys nothing leaves the machine.

References:
    OpenSSF, *Model Signing Specification*, version 1.0.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.outputs import SIGNATURE
from mmdefense.errors import BadInputError, one_line
from mmdefense.files import read_bytes
from mmdefense.libraries import needed

__all__ = ["PASSWORD", "sign", "signature_faults"]

PASSWORD = "MMDEFENSE_KEY_PASSWORD"
"""The environment variable that has the password of an encrypted private key."""
_UNSIGNED = (SIGNATURE, ".cache/huggingface")  # itself, and what a download from the hub adds
_LARGEST_KEY, _LARGEST_SIGNATURE = 1 << 16, 1 << 26  # bytes
_MISMATCH = "Signature mismatch: "


def sign(folder: Path, key: Path) -> Path:
    """Sign every file of a folder, and write the signature into it.

    Args:
        folder: The output of a purification.
        key: The private key in PEM; its password is taken from the environment.

    Returns:
        Where the signature was written; an earlier one is replaced.

    Raises:
        BadInputError: If this is no private key that will do, or a file cannot be signed.
        UnsupportedError: If ``model_signing`` is not installed.
    """
    if key.resolve().is_relative_to(folder.resolve()):
        raise BadInputError(f"key {key} lies in {folder}, which is handed on; keep it elsewhere")
    read_bytes(key, _LARGEST_KEY)
    with needed("signing", "model-signing", "pyopenssl"):
        from model_signing import hashing, signing
    password = os.environ.get(PASSWORD)
    try:
        config = signing.Config().use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
    except Exception as error:
        raise _no_key(key, "private", error) from error
    ignored = hashing.Config().set_ignored_paths(paths=_UNSIGNED)
    try:
        config.set_hashing_config(ignored).sign(folder, folder / SIGNATURE)
    except ValueError as error:  # such as a symbolic link
        raise BadInputError(f"{folder} cannot be signed: {one_line(error)}") from error
    return folder / SIGNATURE


def signature_faults(folder: Path, key: Path) -> list[str]:
    """Return what speaks against a folder being as the owner of a key has signed it.

    Args:
        folder: An output with its signature.
        key: The public key in PEM.

    Returns:
        A phrase for each fault; none where every file is as it was signed, and no other has come.

    Raises:
        BadInputError: If this is no public key, or there is no signature.
        UnsupportedError: If ``model_signing`` is not installed.
    """
    read_bytes(key, _LARGEST_KEY)
    read_bytes(folder / SIGNATURE, _LARGEST_SIGNATURE)
    with needed("verifying a signature", "model-signing", "pyopenssl"):
        from model_signing import verifying
    try:
        config: Any = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise _no_key(key, "public", error) from error
    try:
        config.verify(folder, folder / SIGNATURE)
    except OSError:
        raise
    except Exception as error:  # of a signature that is damaged, any
        return _faults(error, key)
    return []


def _no_key(key: Path, kind: str, error: Exception) -> BadInputError:
    if "assword" in str(error):
        return BadInputError(f"key {key}: {one_line(error).rstrip('.')}; {PASSWORD} holds it")
    return BadInputError(
        f"key {key} must be a {kind} key in PEM, of the curve P-256, P-384 or P-521"
    )


def _faults(error: Exception, key: Path) -> list[str]:
    text = str(error)
    if text.startswith(_MISMATCH):  # the signature is genuine, and some files are not
        try:
            found = ast.literal_eval(text.removeprefix(_MISMATCH))
        except (ValueError, SyntaxError):
            found = [text]
        return [fault.partition(": Expected ")[0] for fault in found]
    if text.startswith("Cannot use "):
        return [one_line(error)]
    return [f"{SIGNATURE} is not a signature by the owner of {key}, or was changed"]
