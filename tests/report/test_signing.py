"""`mmdefense sign` and `mmdefense verify` on an output, with keys and without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from records import purification

from mmdefense.report.statement import differing, write_statement


@pytest.fixture
def out(tmp_path):
    """An output with its weights, one file in a folder, page and statement."""
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub" / "tool.jinja").write_text("{{ x }}")
    (folder / "report.html").write_text("made from the record")
    write_statement(purification(), folder, {})
    return folder


@pytest.fixture
def keys(tmp_path):
    """Return a function that writes a key pair in PEM, and gives the paths of its halves."""
    pytest.importorskip("model_signing", reason="needs the extra signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    def write(name, *, password=None, of_rsa=False):
        key = rsa.generate_private_key(65537, 2048) if of_rsa else None
        key = key or ec.generate_private_key(ec.SECP256R1())
        lock = serialization.NoEncryption()
        if password is not None:
            lock = serialization.BestAvailableEncryption(password.encode())
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        private.write_bytes(key.private_bytes(pem, form, lock))
        public.write_bytes(
            key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        return private, public

    return write


@pytest.fixture
def signed(out, keys, mmdefense):
    """The output, signed, and the public key that it is verified with."""
    private, public = keys("signer")
    assert mmdefense("sign", out, "--key", private).code == 0
    return out, public


def test_what_was_signed_is_verified_wherever_it_lies(signed, mmdefense, tmp_path):
    out, public = signed
    assert differing(out) == []
    moved = out.rename(tmp_path / "elsewhere")
    (moved / ".cache" / "huggingface").mkdir(parents=True)
    (moved / ".cache" / "huggingface" / ".gitignore").write_text("*")  # as a download leaves it
    outcome = mmdefense("verify", moved, "--key", public)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"{moved}: every file is as the owner of {public} signed it\n"


def change_a_byte(out, name="model.safetensors"):
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_a_byte, "Hash mismatch for 'model.safetensors'"),
        (lambda out: change_a_byte(out, "purification.json"), "mismatch for 'purification.json'"),
        (lambda out: (out / "sub" / "tool.jinja").unlink(), "Missing files in model 'out': sub/"),
        (lambda out: (out / "model.py").touch(), "Extra files found in model 'out': model.py"),
        (lambda out: (out / "more").symlink_to(out), "symlink"),
    ],
    ids=["weights", "evidence", "missing", "added", "link"],
)
def test_a_change_is_exit_1_and_named(signed, mmdefense, change, said):
    out, public = signed
    change(out)
    outcome = mmdefense("verify", out, "--key", public)
    assert (outcome.code, outcome.out) == (1, "")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Expected" not in outcome.err


def change_what_was_signed(bundle):
    payload = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = ("A" if payload[9] != "A" else "B").join(
        (payload[:9], payload[10:])
    )


@pytest.mark.parametrize(
    "change",
    [
        change_what_was_signed,
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle.pop("verificationMaterial"),
        lambda bundle: bundle.update(more=1),
        dict.clear,
    ],
)
def test_a_signature_that_was_changed_is_exit_1(signed, mmdefense, change):
    out, public = signed
    path = out / "model.sig"
    bundle = json.loads(path.read_text())
    change(bundle)
    path.write_text(json.dumps(bundle))
    outcome = mmdefense("verify", out, "--key", public)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        f"mmdefense: {out}: model.sig is not a signature by the owner of {public}, or was changed\n"
    )


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_what_is_no_signature_is_exit_1(signed, mmdefense, text):
    out, public = signed
    (out / "model.sig").write_text(text)
    outcome = mmdefense("verify", out, "--key", public)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)


def test_the_signature_of_another_is_exit_1(signed, keys, mmdefense):
    out, _ = signed
    _, other = keys("other")
    outcome = mmdefense("verify", out, "--key", other)
    assert outcome.code == 1
    assert f"not a signature by the owner of {other}" in outcome.err


def test_an_unsigned_output_is_bad_input(out, keys, mmdefense):
    _, public = keys("signer")
    outcome = mmdefense("verify", out, "--key", public)
    assert outcome.code == 2
    assert "model.sig cannot be read: it does not exist" in outcome.err


def test_an_output_that_differs_from_its_statement_is_not_signed(out, keys, mmdefense):
    private, _ = keys("signer")
    change_a_byte(out)
    outcome = mmdefense("sign", out, "--key", private)
    assert outcome.code == 1
    assert "model.safetensors is another file than the one that was written" in outcome.err
    assert not (out / "model.sig").exists()


def test_a_later_record_leaves_the_signature_out_and_is_signed_again(signed, keys, mmdefense):
    out, public = signed
    write_statement(purification("another.safetensors"), out, {})
    assert "model.sig" not in (out / "purification.json").read_text()
    assert mmdefense("verify", out, "--key", public).code == 1
    assert mmdefense("sign", out, "--key", public.with_suffix(".pem")).code == 0
    assert mmdefense("verify", out, "--key", public).code == 0


def test_keys_that_will_not_do_are_one_line(out, keys, mmdefense, tmp_path):
    private, public = keys("signer")
    of_rsa, of_rsa_public = keys("rsa", of_rsa=True)
    (tmp_path / "text.pem").write_text("no key")
    inside = shutil.copy(private, out / "mine.pem")
    for command, key, said in (
        ("sign", public, "must be a private key in PEM"),
        ("sign", of_rsa, "P-256, P-384 or P-521"),
        ("sign", tmp_path / "text.pem", "must be a private key in PEM"),
        ("sign", tmp_path / "none.pem", "does not exist"),
        ("sign", tmp_path, "is not a regular file"),
        ("sign", inside, "lies in"),
        ("verify", of_rsa_public, "must be a public key in PEM"),
    ):
        (out / "model.sig").touch()
        outcome = mmdefense(command, out, "--key", key)
        assert (outcome.code, outcome.out) == (2, ""), key
        assert said in outcome.err
        assert outcome.err.count("\n") == 1


def test_the_password_of_a_key_is_in_the_environment(out, keys, mmdefense, monkeypatch):
    private, public = keys("locked", password="a password")
    for given in (None, "another"):
        if given is not None:
            monkeypatch.setenv("MMDEFENSE_KEY_PASSWORD", given)
        outcome = mmdefense("sign", out, "--key", private)
        assert outcome.code == 2
        assert "MMDEFENSE_KEY_PASSWORD" in outcome.err
    monkeypatch.setenv("MMDEFENSE_KEY_PASSWORD", "a password")
    assert mmdefense("sign", out, "--key", private).code == 0
    assert mmdefense("verify", out, "--key", public).code == 0


def test_without_a_key_the_way_of_sigstore_is_said(out, mmdefense):
    signature = out / "model.sig"
    for verb, more in (
        ("sign", ""),
        ("verify", " --identity WHO --identity_provider ISSUER"),
    ):
        outcome = mmdefense(verb, out)
        command = f"model_signing {verb} sigstore {out} --signature {signature}{more}"
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            f"mmdefense: {verb} needs --key FILE; by Sigstore, with a login in place of a key: "
            f"{command}\n"
        )
    assert not signature.exists()


@pytest.mark.parametrize("verb", ["sign", "verify"])
def test_the_command_for_sigstore_is_one_that_model_signing_has(verb):
    pytest.importorskip("model_signing", reason="needs the extra signing")
    words = [sys.executable, "-m", "model_signing", verb, "sigstore", "--help"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    needed = {"sign": ["--signature"], "verify": ["--identity", "--identity_provider"]}
    assert all(option in said for option in ["--signature", *needed[verb]])


def test_others_verify_it_with_model_signing_alone(signed):
    out, public = signed
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(out)]
    command += ["--signature", str(out / "model.sig"), "--public_key", str(public)]
    run = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr
    change_a_byte(out)
    assert subprocess.run(command, **run).returncode != 0


def test_without_the_package_it_is_said_what_to_install(out, mmdefense, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    key = tmp_path / "key.pem"
    key.write_text("not looked at")
    (out / "model.sig").write_text("not looked at")
    for verb in ("sign", "verify"):
        outcome = mmdefense(verb, out, "--key", key)
        assert outcome.code == 3
        assert "needs the packages 'model-signing' and 'pyopenssl'" in outcome.err
        assert outcome.err.count("\n") == 1
