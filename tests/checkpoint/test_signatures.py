"""Finished models are signed in model-signing's own format, and signed inputs are checked before a merge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import alnico
from alnico.errors import AlnicoError, UncheckedError, VerificationError
from hub.stub import serving
from made import family, save_file

Run = Callable[..., tuple[int, str, str]]
PAIR = {"merge_method": "linear", "models": ["tuned-0", "tuned-1"]}
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def keys(name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """Write a pair of keys, ``NAME.pem`` and ``NAME.pub``."""
    return write_keys(name, ec.generate_private_key(curve or ec.SECP256R1()))


def write_keys(name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    private, public = Path(f"{name}.pem"), Path(f"{name}.pub")
    private.write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def model_signing(*words: str) -> subprocess.CompletedProcess[str]:
    """The command of the package itself."""
    return subprocess.run([sys.executable, "-m", "model_signing", *words], capture_output=True, text=True, timeout=120)


def signed_by_others(model: str, key: Path) -> None:
    made = model_signing("sign", "key", model, "--private_key", str(key), "--signature", f"{model}/model.sig")
    assert made.returncode == 0, made.stderr


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)


def told(call: Callable[[], object], kind: type[AlnicoError] = VerificationError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_a_signed_merge_verifies_here_and_with_model_signing_itself(curve: ec.EllipticCurve) -> None:
    private, public = keys("k", curve)
    alnico.merge(PAIR, "out")
    assert alnico.sign("out", private) == Path("out/model.sig")
    found = alnico.verify("out", key=public)
    assert (found.signed_by, found.unchecked) == ("k.pub", ())
    assert model_signing("verify", "key", "out", "--signature", "out/model.sig", "--public_key", "k.pub").returncode == 0
    alnico.sign("out", private)  # anew, over the old one
    assert alnico.verify("out", key=public).signed_by == "k.pub"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: Path("out/README.md").write_text("# Another"), "Hash mismatch for 'README.md'"),
        (lambda: Path("out/.hidden").write_text("new"), "Extra files found in model 'out': .hidden"),
        (lambda: Path("out/README.md").unlink(), "Missing files in model 'out': README.md"),
    ],
)
def test_what_the_lock_does_not_hold_the_signature_does(change: Callable[[], object], expected: str) -> None:
    private, public = keys("k")
    alnico.merge(PAIR, "out")
    alnico.sign("out", private)
    change()
    assert alnico.verify("out").unchecked == ()
    message = told(lambda: alnico.verify("out", key=public))
    assert message.startswith("out: its model.sig does not hold (k.pub: ValueError: Signature mismatch: ")
    assert expected in message
    assert message.endswith(
        "expected the files that were signed, and the signer's public key. Do not use this model, or get it anew."
    )


def test_a_signature_of_another_key_or_of_none_is_no_pass() -> None:
    private, public = keys("k")
    _, other = keys("other")
    alnico.merge(PAIR, "out")
    assert told(lambda: alnico.verify("out", key=public), UncheckedError) == (
        "out: could not check its signature: it has no model.sig. `alnico sign` makes one."
    )
    alnico.sign("out", private)
    assert told(lambda: alnico.verify("out", key=other)).startswith(
        "out: its model.sig does not hold (other.pub: ValueError: Key mismatch"
    )
    Path("out/model.sig").write_text("{}")
    assert told(lambda: alnico.verify("out", key=public)).startswith("out: its model.sig does not hold (k.pub: ")


def test_a_signature_with_another_payload_does_not_hold() -> None:
    private, public = keys("k")
    alnico.merge(PAIR, "out")
    alnico.sign("out", private)
    bundle = json.loads(Path("out/model.sig").read_text())
    Path("out/README.md").write_text("# Another")
    alnico.sign("out", keys("mine")[0])
    forged = json.loads(Path("out/model.sig").read_text())
    forged["dsseEnvelope"]["signatures"] = bundle["dsseEnvelope"]["signatures"]
    forged["verificationMaterial"] = bundle["verificationMaterial"]
    Path("out/model.sig").write_text(json.dumps(forged))
    assert "InvalidSignature" in told(lambda: alnico.verify("out", key=public))


def test_a_damaged_merge_is_not_signed() -> None:
    private, _ = keys("k")
    alnico.merge(PAIR, "out")
    Path("out/config.json").write_text("{}")
    assert told(lambda: alnico.sign("out", private)).startswith("out/config.json: has the hash ")
    assert not Path("out/model.sig").exists()


def test_keys_that_cannot_be_used_are_named() -> None:
    alnico.merge(PAIR, "out")
    private, public = keys("k")
    rsa_private, rsa_public = write_keys("rsa", rsa.generate_private_key(65537, 2048))
    assert told(lambda: alnico.sign("out", "nowhere.pem"), AlnicoError) == (
        "nowhere.pem: could not be signed with (No such file or directory). Check the path."
    )
    for wrong in (rsa_private, public):
        assert told(lambda w=wrong: alnico.sign("out", w), AlnicoError).startswith(f"out: could not be signed with {wrong} (")
    assert not Path("out/model.sig").exists()
    alnico.sign("out", private)
    assert told(lambda: alnico.verify("out", key="nowhere.pub"), UncheckedError) == (
        "nowhere.pub: the public key cannot be read (No such file or directory). Check the path."
    )
    for wrong in (rsa_public, private):
        assert told(lambda w=wrong: alnico.verify("out", key=w), UncheckedError).startswith(f"{wrong}: is no public key (")


def test_signed_inputs_are_checked_before_a_merge_and_unsigned_ones_where_that_is_asked_for(run: Run) -> None:
    private, _ = keys("k")
    keys("other")
    Path("r.yml").write_text("merge_method: linear\nmodels: [tuned-0, tuned-1]\n")
    signed_by_others("tuned-0", private)
    verifying = ("merge", "r.yml", "out", "--verify-inputs", "other.pub", "--verify-inputs", "k.pub")
    assert run(*verifying)[0] == 0
    assert not Path("out/model.sig").exists()  # a donor's signature is not the merge's
    assert run(*verifying, "--overwrite", "--require-signed") == (
        11,
        "",
        "alnico: tuned-1: has no model.sig, and every input must be signed. Get the signed model, or merge without --require-signed.\n",
    )
    signed_by_others("tuned-1", private)
    assert run(*verifying, "--overwrite", "--require-signed")[0] == 0
    shutil.rmtree("out")
    (Path("tuned-1") / "config.json").write_text("{}")
    assert run("merge", "r.yml", "out")[0] == 0  # nobody asked
    shutil.rmtree("out")
    code, stdout, stderr = run("merge", "r.yml", "out", "--verify-inputs", "k.pub")
    assert (code, stdout) == (10, "")
    assert stderr.startswith("alnico: tuned-1: its model.sig does not hold (k.pub: ValueError: Signature mismatch: ")
    assert not Path("out").exists()


def test_parts_of_an_adapted_model_are_checked_each() -> None:
    private, public = keys("k")
    Path("adapter").mkdir()
    (Path("adapter") / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        Path("adapter/adapter_model.safetensors"),
        {f"{key}.lora_A.weight": ("F32", np.ones((1, 16))), f"{key}.lora_B.weight": ("F32", np.ones((16, 1)))},
    )
    signed_by_others("base", private)
    recipe = {"merge_method": "linear", "models": ["base+adapter"]}
    assert told(lambda: alnico.merge(recipe, "out", verify_inputs=public, require_signed=True), UncheckedError).startswith(
        "adapter: has no model.sig, "
    )
    signed_by_others("adapter", private)
    alnico.merge(recipe, "out", verify_inputs=public, require_signed=True)


def test_stages_need_no_signature_their_inputs_do() -> None:
    private, public = keys("k")
    text = "name: first\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\nmerge_method: linear\nmodels: [first, base]\n"
    for model in ("tuned-0", "tuned-1", "base"):
        signed_by_others(model, private)
    alnico.merge_all(text, "out", verify_inputs=[public], require_signed=True)
    shutil.rmtree("out")
    Path("base/model.sig").unlink()
    with pytest.raises(UncheckedError, match=r"^base: has no model\.sig"):
        alnico.merge_all(text, "out", verify_inputs=[public], require_signed=True)


def test_required_signatures_need_a_key(run: Run) -> None:
    Path("r.yml").write_text("merge_method: linear\nmodels: [tuned-0, tuned-1]\n")
    code, _, stderr = run("merge", "r.yml", "out", "--require-signed")
    assert code == 2
    assert "--require-signed needs a key to verify with. Give --verify-inputs KEY." in " ".join(stderr.split())
    with pytest.raises(AlnicoError, match="no public key is given"):
        alnico.merge("r.yml", "out", require_signed=True)


def test_a_model_of_the_hub_is_not_said_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, public = keys("k")
    with serving(tmp_path / "home", monkeypatch) as hub:
        hub.add("org/one", Path("tuned-0"))
        with pytest.raises(UncheckedError, match=r"^org/one: is on the hub, of which not every file is fetched"):
            alnico.merge({"merge_method": "linear", "models": ["org/one", "tuned-1"]}, "out", verify_inputs=public)


def test_without_the_package_it_is_said_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = keys("k")
    alnico.merge(PAIR, "out")
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    assert told(lambda: alnico.sign("out", private), AlnicoError) == (
        "signatures need model_signing, which is not installed. Say: pip install 'alnico[sign]'"
    )
