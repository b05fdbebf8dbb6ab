"""``mmdefense sign`` and ``mmdefense verify``: sign an output, and verify it later."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mmdefense.cli.arguments import say
from mmdefense.errors import BadInputError

__all__ = ["sign", "verify"]

Out = Annotated[Path, typer.Argument(metavar="OUT", help="An output of purify.")]


def sign(
    out: Out,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your private key in PEM, on the curve P-256, P-384 or P-521; for an encrypted "
            "key, set MMDEFENSE_KEY_PASSWORD.",
        ),
    ] = None,
) -> None:
    """Sign an output and its evidence with a key; without one, show the Sigstore command.

    The signature, model.sig, covers every file of the folder. Needs the extra signing.
    """
    from mmdefense.report.signing import sign as signed
    from mmdefense.report.statement import differing

    faults = differing(out)
    if key is None:
        raise BadInputError(f"sign needs --key FILE; {_by_sigstore('sign', out)}")
    _say_faults(out, faults)
    say(f"wrote {signed(out, key)}")


def verify(
    out: Out,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The signer's public key in PEM, from a trusted source."),
    ] = None,
) -> None:
    """Verify that an output is exactly as signed: no file changed, added or removed.

    Exits with 1 if it is not. Needs the extra signing.
    """
    from mmdefense.report.signing import signature_faults

    if key is None:
        raise BadInputError(
            f"verify needs --key FILE; {_by_sigstore('verify', out)} --identity WHO "
            "--identity_provider ISSUER"
        )
    _say_faults(out, signature_faults(out, key))
    say(f"{out}: every file is as the owner of {key} signed it")


def _by_sigstore(verb: str, out: Path) -> str:
    """Return the Sigstore command; it needs the network and an account, so it is not run."""
    signature = out / "model.sig"
    words = ["model_signing", verb, "sigstore", str(out), "--signature", str(signature)]
    return f"by Sigstore, with a login in place of a key: {shlex.join(words)}"


def _say_faults(out: Path, faults: list[str]) -> None:
    """If there are faults, print them and exit with code 1."""
    for fault in faults:
        say(f"mmdefense: {out}: {fault}", err=True)
    if faults:
        raise typer.Exit(1)
