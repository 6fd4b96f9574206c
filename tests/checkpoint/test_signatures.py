"""Finished models are signed in model-signing's own format, and signed inputs are checked before a merge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import hashing, signing

import alnico
from alnico.checkpoint.signatures import sign
from alnico.errors import AlnicoError, ModelError, UncheckedError, VerificationError
from alnico.installation import install_hint
from hub.stub import serving
from made import family, read_model, save_file
from made_tokenizers import save_family
from methods.sides import hashes

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
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *words], capture_output=True, text=True, timeout=120
    )


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
    assert (
        model_signing(
            "verify", "key", "out", "--signature", "out/model.sig", "--public_key", "k.pub"
        ).returncode
        == 0
    )
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
    assert message.startswith("out: its model.sig is not valid (k.pub: ValueError: Signature mismatch: ")
    assert expected in message
    assert message.endswith(
        "expected the files that were signed, and the signer's public key. Do not use this model, or download it again."
    )


def test_a_signature_of_another_key_or_of_none_is_no_pass() -> None:
    private, public = keys("k")
    _, other = keys("other")
    alnico.merge(PAIR, "out")
    assert told(lambda: alnico.verify("out", key=public), UncheckedError) == (
        "out: the signature could not be checked: there is no model.sig. `alnico sign` makes one."
    )
    alnico.sign("out", private)
    assert told(lambda: alnico.verify("out", key=other)).startswith(
        "out: its model.sig is not valid (other.pub: ValueError: Key mismatch"
    )
    Path("out/model.sig").write_text("{}")
    assert told(lambda: alnico.verify("out", key=public)).startswith(
        "out: its model.sig is not valid (k.pub: "
    )


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
    assert told(lambda: alnico.sign("out", "nowhere.pem"), UncheckedError) == (
        "nowhere.pem: could not be used for signing (No such file or directory). Check the path."
    )
    for wrong in (rsa_private, public):
        assert told(lambda w=wrong: alnico.sign("out", w), UncheckedError).startswith(
            f"out: could not be signed with {wrong} ("
        )
    assert not Path("out/model.sig").exists()
    alnico.sign("out", private)
    assert told(lambda: alnico.verify("out", key="nowhere.pub"), UncheckedError) == (
        "nowhere.pub: the public key cannot be read (No such file or directory). Check the path."
    )
    for wrong in (rsa_public, private):
        assert told(lambda w=wrong: alnico.verify("out", key=w), UncheckedError).startswith(
            f"{wrong}: is not a public key ("
        )


@pytest.mark.parametrize("kind", ["pipe", "large", "folder"])
def test_a_key_that_is_no_small_file_is_refused_at_once(kind: str) -> None:
    alnico.merge(PAIR, "out")
    private, _ = keys("k")
    alnico.sign("out", private)
    if kind == "pipe":
        os.mkfifo("key")
    elif kind == "large":
        with open("key", "wb") as file:
            file.truncate(1 << 40)
    else:
        os.mkdir("key")
    said = (
        "ValueError: larger than 65536 bytes"
        if kind == "large"
        else "cannot be read|could not be (signed|used for signing)"
    )
    for call in (
        lambda: alnico.verify("out", key="key"),
        lambda: alnico.sign("out", "key"),
        lambda: alnico.plan(PAIR, verify_inputs="key"),
    ):
        with pytest.raises(UncheckedError, match=said):
            call()


def sign_here(model: str, key: Path) -> None:
    """As the command of the package, which takes seconds to begin."""
    sign(Path(model), key)


def test_every_input_must_be_signed_but_those_that_are_named(run: Run) -> None:
    private, _ = keys("k")
    keys("other")
    Path("r.yml").write_text("merge_method: linear\nmodels: [tuned-0, tuned-1]\n")
    sign_here("tuned-0", private)
    verifying = ("merge", "r.yml", "out", "--verify-inputs", "other.pub", "--verify-inputs", "k.pub")
    refused = (
        11,
        "",
        "alnico: tuned-1: has no model.sig, and every input must be signed. Get the signed model, or use --allow-unsigned tuned-1 if you "
        "trust it without a signature.\n",
    )
    for more in ((), ("--require-signed",), ("--dry-run",), ("--allow-unsigned", "another")):
        assert run(*verifying, *more) == refused
        assert not Path("out").exists()
    for name in ("tuned-1", "./tuned-1", str(Path("tuned-1").absolute())):
        assert run(*verifying, "--allow-unsigned", name, "--overwrite")[0] == 0
    assert run("plan", "r.yml", "--verify-inputs", "k.pub")[0] == 11
    assert run("plan", "r.yml", "--verify-inputs", "k.pub", "--allow-unsigned", "tuned-1")[0] == 0
    assert not Path("out/model.sig").exists()  # a donor's signature is not the merge's
    sign_here("tuned-1", private)
    assert run(*verifying, "--overwrite", "--require-signed")[0] == 0
    shutil.rmtree("out")
    (Path("tuned-1") / "config.json").write_text("{}")
    assert run("merge", "r.yml", "out")[0] == 0  # nobody asked
    shutil.rmtree("out")
    for more in ((), ("--allow-unsigned", "tuned-1"), ("--dry-run",)):
        code, stdout, stderr = run("merge", "r.yml", "out", "--verify-inputs", "k.pub", *more)
        assert (code, stdout) == (10, "")
        assert stderr.startswith(
            "alnico: tuned-1: its model.sig is not valid (k.pub: ValueError: Signature mismatch: "
        )
        assert not Path("out").exists()


def tamper(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)


@pytest.mark.parametrize(
    "models",
    [["tuned-0/model.safetensors", "tuned-1"], ["tuned-1", "link.safetensors"], ["tuned-1", "linked"]],
)
def test_a_file_of_a_signed_folder_is_checked_by_the_folders_signature(models: list[str]) -> None:
    private, public = keys("k")
    for name in ("tuned-0", "tuned-1"):
        sign_here(name, private)
    Path("link.safetensors").symlink_to("tuned-0/model.safetensors")
    Path("linked").symlink_to("tuned-0")
    recipe = {"merge_method": "linear", "models": models}
    alnico.merge(recipe, "out", verify_inputs=public)
    tamper("tuned-0/model.safetensors")
    message = told(lambda: alnico.merge(recipe, "out2", verify_inputs=public))
    assert "its model.sig is not valid" in message
    assert not Path("out2").exists()
    Path("tuned-0/model.sig").unlink()
    assert "every input must be signed" in told(
        lambda: alnico.merge(recipe, "out2", verify_inputs=public), UncheckedError
    )


def test_a_folder_inside_a_signed_one_is_checked_by_the_signature_around_it() -> None:
    private, public = keys("k")
    Path("pipeline").mkdir()
    shutil.copytree("tuned-0", "pipeline/transformer")
    sign_here("pipeline", private)
    sign_here("tuned-1", private)
    recipe = {"merge_method": "linear", "models": ["pipeline/transformer", "tuned-1"]}
    alnico.merge(recipe, "out", verify_inputs=public)
    (Path("pipeline") / "added.py").touch()
    assert "Extra files found" in told(lambda: alnico.merge(recipe, "out2", verify_inputs=public))


def test_the_base_is_an_input() -> None:
    private, public = keys("k")
    for name in ("tuned-0", "tuned-1"):
        sign_here(name, private)
    recipe = {
        "merge_method": "task_arithmetic",
        "models": ["tuned-0", "tuned-1"],
        "base_model": "base",
        "parameters": {"weight": 0.5},
    }
    assert told(lambda: alnico.merge(recipe, "out", verify_inputs=public), UncheckedError).startswith(
        "base: has no model.sig"
    )
    assert told(lambda: alnico.plan(recipe, verify_inputs=public), UncheckedError).startswith(
        "base: has no model.sig"
    )


def test_the_model_that_a_tokenizer_is_taken_from_is_an_input() -> None:
    private, public = keys("k")
    save_family(Path("vocabularies"))
    os.chdir("vocabularies")
    key = Path("..") / public
    for name in ("base", "chat"):
        sign_here(name, Path("..") / private)
    recipe = {"merge_method": "linear", "models": ["chat", "base"], "tokenizer": {"source": "other"}}
    assert told(lambda: alnico.merge(recipe, "out", verify_inputs=key), UncheckedError).startswith(
        "other: has no model.sig"
    )
    alnico.merge(recipe, "out", verify_inputs=key, allow_unsigned="other")
    sign_here("other", Path("..") / private)
    Path("other/tokenizer.json").write_bytes(Path("other/tokenizer.json").read_bytes() + b" ")
    assert "tokenizer.json" in told(lambda: alnico.merge(recipe, "out2", verify_inputs=key))


def test_statistics_are_inputs() -> None:
    private, public = keys("k")
    sources = []
    for name in ("tuned-0", "tuned-1"):
        sign_here(name, private)
        told_of = {tensor: {"digest": digest, "mean": 1.0} for tensor, digest in hashes(Path(name)).items()}
        squares = {
            tensor: ("F32", np.ones(value.shape, np.float32))
            for tensor, value in read_model(Path(name)).items()
        }
        folder = Path(f"{name}-fisher")
        folder.mkdir()
        save_file(folder / "statistics.safetensors", squares)
        (folder / "statistics.json").write_text(
            json.dumps({"schema": 1, "kind": "fisher", "l2_norm": 1.0, "tensors": told_of})
        )
        sources.append({"model": name, "parameters": {"fisher": str(folder)}})
    recipe = {"merge_method": "fisher", "models": sources}
    said = told(lambda: alnico.merge(recipe, "out", verify_inputs=public), UncheckedError)
    assert said.startswith("tuned-0-fisher: has no model.sig")
    sign_here("tuned-0-fisher", private)
    alnico.merge(recipe, "out", verify_inputs=public, allow_unsigned="tuned-1-fisher")
    Path("tuned-0-fisher/statistics.json").write_bytes(
        Path("tuned-0-fisher/statistics.json").read_bytes() + b" "
    )
    assert "statistics.json" in told(
        lambda: alnico.merge(recipe, "out2", verify_inputs=public, allow_unsigned="tuned-1-fisher")
    )


def test_keys_are_read_whether_or_not_an_input_is_signed() -> None:
    names = ["tuned-0", "tuned-1"]
    said = told(lambda: alnico.plan(PAIR, verify_inputs="nowhere.pub", allow_unsigned=names), UncheckedError)
    assert said == "nowhere.pub: the public key cannot be read (No such file or directory). Check the path."
    private, public = keys("k")
    for name in names:
        sign_here(name, private)
    said = told(lambda: alnico.plan(PAIR, verify_inputs=[public, "nowhere.pub"]), UncheckedError)
    assert said.startswith("nowhere.pub: the public key cannot be read")


def test_analyses_that_weights_are_made_from_are_inputs() -> None:
    private, public = keys("k")
    for name in ("tuned-0", "tuned-1", "base"):
        sign_here(name, private)
    Path("told").mkdir()
    Path("told/summary.json").write_text(
        json.dumps(alnico.analyze(["tuned-0", "tuned-1"], base="base").data())
    )
    weight = {"from": "analysis", "path": "told"}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": weight}} for name in ("tuned-0", "tuned-1")],
    }
    assert told(lambda: alnico.merge(recipe, "out", verify_inputs=public), UncheckedError).startswith(
        "told: has no model.sig"
    )
    alnico.merge(recipe, "out", verify_inputs=public, allow_unsigned="told")


def odd_pipe(path: Path) -> None:
    os.mkfifo(path)


ODD: list[Callable[[Path], object]] = [
    odd_pipe,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.write_text("[" * 100_000),
    lambda path: path.write_text('{"dsseEnvelope": {"payload": 1e400}}'),
    lambda path: path.write_text('{"dsseEnvelope": {"payload": "!", "signatures": [NaN]}}'),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\xff\xfe"),
    lambda path: (path.touch(), os.truncate(path, 10 << 30)),
]


def test_a_signature_that_is_none_is_refused_at_once() -> None:
    _, public = keys("k")
    for i, made in enumerate(ODD):
        shutil.copytree("tuned-0", f"odd-{i}")
        made(Path(f"odd-{i}/model.sig"))
    code = (
        "import alnico; from alnico.errors import VerificationError, ModelError\n"
        f"for i in range({len(ODD)}):\n"
        "    try:\n"
        "        recipe = {'merge_method': 'linear', 'models': [f'odd-{i}', 'tuned-1']}\n"
        f"        alnico.merge(recipe, 'out', verify_inputs={str(public)!r}, allow_unsigned=[f'odd-{{i}}', 'tuned-1'])\n"
        "    except (VerificationError, ModelError) as error:\n"
        "        print(i)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == [str(i) for i in range(len(ODD))], ran.stderr


def test_what_is_no_file_is_not_signed() -> None:
    private, _ = keys("k")
    alnico.merge(PAIR, "out")
    os.mkfifo("out/.hidden")
    assert told(lambda: alnico.sign("out", private), ModelError).startswith(
        "out/.hidden: is a pipe, a socket, a device or a broken link"
    )
    assert not Path("out/model.sig").exists()


def test_a_signature_of_another_folder_or_over_less_than_all_files_does_not_hold() -> None:
    private, public = keys("k")
    for name in ("tuned-0", "tuned-1"):
        sign_here(name, private)
    shutil.copy("tuned-1/model.sig", "tuned-0/model.sig")
    assert "Signature mismatch" in told(lambda: alnico.merge(PAIR, "out", verify_inputs=public))
    for name in ("tuned-0", "tuned-1"):
        Path(name, "model.sig").unlink()
    files = hashing.Config().set_ignored_paths(paths=["model.sig", "model.safetensors"])
    signing.Config().set_hashing_config(files).use_elliptic_key_signer(private_key=private).sign(
        "tuned-0", "tuned-0/model.sig"
    )
    sign_here("tuned-1", private)
    assert "its model.sig is not valid (it does not cover model.safetensors)" in told(
        lambda: alnico.merge(PAIR, "out", verify_inputs=public)
    )


def test_parts_of_an_adapted_model_are_checked_each() -> None:
    private, public = keys("k")
    Path("adapter").mkdir()
    (Path("adapter") / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    )
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        Path("adapter/adapter_model.safetensors"),
        {
            f"{key}.lora_A.weight": ("F32", np.ones((1, 16))),
            f"{key}.lora_B.weight": ("F32", np.ones((16, 1))),
        },
    )
    sign_here("base", private)
    recipe = {"merge_method": "linear", "models": ["base+adapter"]}
    assert told(
        lambda: alnico.merge(recipe, "out", verify_inputs=public, require_signed=True), UncheckedError
    ).startswith("adapter: has no model.sig, ")
    sign_here("adapter", private)
    alnico.merge(recipe, "out", verify_inputs=public, require_signed=True)


def test_stages_need_no_signature_their_inputs_do() -> None:
    private, public = keys("k")
    text = "name: first\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\nmerge_method: linear\nmodels: [first, base]\n"
    for model in ("tuned-0", "tuned-1", "base"):
        sign_here(model, private)
    alnico.merge_documents(text, "out", verify_inputs=[public], require_signed=True)
    shutil.rmtree("out")
    Path("base/model.sig").unlink()
    with pytest.raises(UncheckedError, match=r"^base: has no model\.sig"):
        alnico.merge_documents(text, "out", verify_inputs=[public], require_signed=True)


def test_required_signatures_need_a_key(run: Run) -> None:
    Path("r.yml").write_text("merge_method: linear\nmodels: [tuned-0, tuned-1]\n")
    code, _, stderr = run("merge", "r.yml", "out", "--require-signed")
    assert code == 2
    assert "--require-signed needs a key to verify with. Give --verify-inputs KEY." in " ".join(
        stderr.split()
    )
    assert (
        run("merge", "r.yml", "out", "--allow-unsigned", "x")[0]
        == run("plan", "r.yml", "--allow-unsigned", "x")[0]
        == 2
    )
    assert (
        run("merge", "r.yml", "out", "--require-signed", "--verify-inputs", "k.pub", "--allow-unsigned", "x")[
            0
        ]
        == 2
    )
    with pytest.raises(AlnicoError, match="no public key is given"):
        alnico.merge("r.yml", "out", require_signed=True)
    with pytest.raises(AlnicoError, match="x need not be"):
        alnico.merge("r.yml", "out", require_signed=True, verify_inputs="k.pub", allow_unsigned="x")


def test_a_model_of_the_hub_is_not_said_to_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, public = keys("k")
    with serving(tmp_path / "home", monkeypatch) as hub:
        hub.add("org/one", Path("tuned-0"))
        with pytest.raises(UncheckedError, match=r"^org/one: is on the hub; a signature covers all files"):
            alnico.merge(
                {"merge_method": "linear", "models": ["org/one", "tuned-1"]}, "out", verify_inputs=public
            )


def test_without_the_package_it_is_said_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = keys("k")
    alnico.merge(PAIR, "out")
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    assert told(lambda: alnico.sign("out", private), AlnicoError) == (
        f"a signature needs model_signing, which is not installed. {install_hint('sign')}"
    )
