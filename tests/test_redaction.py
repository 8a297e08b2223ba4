"""d2v_scale.redaction: no secret that a run is given is in anything that it keeps, shows or sends."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_shards import image_samples

from d2v_scale.redaction import REDACTED, redact, redact_values
from d2v_scale.shards.writing import write_set

ROOT = Path(__file__).resolve().parents[1]
PLANTED = "pl4ntedS3cretValue"


@pytest.mark.parametrize(
    "text",
    [
        f"http://bob:{PLANTED}@host:5000/x",
        f"postgresql://u:{PLANTED}@h/db",
        f"https://{PLANTED}@github.com/x",
        f"https://b.s3.amazonaws.com/a-{{000..003}}.tar?X-Amz-Signature={PLANTED}&X-Amz-Date=1",
        f"https://b.s3.amazonaws.com/a.tar?X-Amz-Date=1&X-Amz-Credential={PLANTED}",
        f"https://a.blob.core.windows.net/c/a.tar?sv=2020&sig={PLANTED}%3D&se=2",
        f"pipe:curl -s -H 'Authorization: Bearer {PLANTED}' https://h/a.tar",
        f'pipe:curl -H "X-Auth-Token: {PLANTED}" https://h/a.tar',
        f"pipe:curl -H 'PRIVATE-TOKEN: {PLANTED}' https://h/a.tar",
        f"pipe:curl -u bob:{PLANTED} https://h/a",
        f"pipe:AWS_SECRET_ACCESS_KEY={PLANTED} aws s3 cp s3://b/a -",
        f"pipe:export TOKEN='{PLANTED}'; fetch",
        f"pipe:gsutil --token={PLANTED} cat x",
        f"pipe:x --password {PLANTED} y",
        f"curl: (22) https://h/a.tar?token={PLANTED}: 403",
        *(
            f"pipe:{command} https://h/a.tar"
            for command in (
                f"curl -H 'Ocp-Apim-Subscription-Key: {PLANTED}'",
                f'curl -H "Api-Key: {PLANTED}"',
                f"curl -sH 'Token: {PLANTED}'",
                f"curl --header=X-Auth:{PLANTED}",
                f"curl -b 'sid={PLANTED}'",
                f"curl -sSu me:{PLANTED}",
                f"curl -U proxy:{PLANTED}",
                f"curl --pass {PLANTED}",
                f"curl --cert c.pem:{PLANTED}",
                f'curl -d \'{{"token": "{PLANTED}"}}\'',
                f"sshpass -p {PLANTED} ssh h cat",
                f"sshpass -p{PLANTED} ssh h cat",
                f"SSHPASS={PLANTED} sshpass -e ssh h cat",
                f"PGPASSWORD={PLANTED} psql",
                f"AZURE_STORAGE_KEY={PLANTED} az",
                f"az --account-key {PLANTED}",
                f"az --connection-string 'AccountName=a;AccountKey={PLANTED};EndpointSuffix=x'",
                f"openssl enc -d -pass pass:{PLANTED} -in",
                f"openssl enc -d -k {PLANTED} -in",
                f"gpg --batch --passphrase {PLANTED} -d",
                f"echo {PLANTED} | gpg --passphrase-fd 0 -d",
                f"7z x -so -p{PLANTED}",
                f"unzip -P {PLANTED} -p",
                f"s3cmd --secret_key={PLANTED} get",
                f"rclone --sftp-pass {PLANTED} cat",
                f"smbclient -U u%{PLANTED}",
                f"lftp -e 'open -u user,{PLANTED} h'",
                f"curl -x me:{PLANTED}@proxy:80",
                f"curl -u :{PLANTED}",
                f"curl -u {PLANTED}:",
                f"http -a me:{PLANTED} GET",
                f"openssl enc -d -passin pass:{PLANTED} -in",
                f"davix-get --userlogin me --userpass {PLANTED}",
                f"aws s3 cp --sse-c-key {PLANTED}",
                f"aws configure set aws_secret_access_key {PLANTED} && aws s3 cp",
                f"mc alias set m https://h KEY {PLANTED} && mc cat",
                f"b2 authorize-account KEY {PLANTED} && b2 cat",
                f"ncftpget -u me -p {PLANTED}",
                f"redis-cli -a {PLANTED} get",
                f"kinit me <<< {PLANTED} && cat",
                f"echo {PLANTED} | kinit me && cat",
                f"rclone cat :s3,access_key_id=KEY,secret_access_key={PLANTED}:b/a",
                f"hdfs dfs -Dfs.s3a.secret.key={PLANTED} -cat",
                f"hadoop fs -Dfs.azure.account.key.x.blob.core.windows.net={PLANTED} -cat",
            )
        ),
        *(
            f"https://h/a.tar{query}"
            for query in (
                f"?key={PLANTED}",
                f"?secret_key={PLANTED}",
                f"?st={PLANTED}&e=1",
                f"?tok%65n={PLANTED}",
                f"#access_token={PLANTED}",
                f"?odbc_connect=UID%3Du%3BPWD%3D{PLANTED}",
            )
        ),
        f"postgresql://u:p@h/db?sslpassword={PLANTED}",
        f"sftp://u:pa/ss{PLANTED}@h/a",
        f"https://u:p#{PLANTED}@h/a",
        f'{{"api_key": "{PLANTED}"}}',
        f"password: {PLANTED}",
    ],
)
def test_a_secret_is_left_out_and_leaving_it_out_twice_changes_nothing(text: str) -> None:
    assert PLANTED not in redact(text)
    assert REDACTED in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://h/a.tar?id=3",
        "https://h/a.tar?token=$TOKEN",
        "https://user:$PW@h/x",
        'pipe:curl -H "Authorization: Bearer $TOKEN" https://h/{0..3}.tar',
        "pipe:fetch --token $TOKEN",
        "s3://bucket/in1k-{000000..000099}.tar",
        "sqlite:////data/ü %20#/mlflow.db",
        "data.text.tokenizer: x",
        "--batch_unit tokens",
        "tokens=5 tokens_per_second=7",
        "optim.lr=1e-3 key_bias=true",
        "https://h/a.tar?versionId=3/L4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY",
        "https://h/x?download=true&alt=media",
        "http://h:8080/a@2x.tar",
        "hdfs://nn:8020/a/b@c.tar",
        "mssql+pyodbc://u:$PW@h/db?driver=ODBC+Driver+17+for+SQL+Server",
        "pipe:curl -sL --retry 3 -H 'Range: bytes=0-' -b cookies.txt https://h/a.tar",
        'pipe:curl -u "$U:$P" -H "X-Api-Key: $KEY" https://h/a.tar',
        "pipe:docker run -u 1000:1000 x",
        "pipe:rsync -avu host:/a/b.tar .",
        "pipe:gpg --passphrase-file /k -d a",
        "pipe:openssl enc -d -pass file:/k -in a",
        "pipe:ssh -p 2222 h cat a | unzip -p /dev/stdin",
        "pipe:sshpass -f /k ssh h cat a",
        'pipe:curl -x proxy:3128 -u "$U:" https://h/a.tar',
        "pipe:openssl enc -d -passin env:PASS -in a",
        "pipe:aws configure set region eu-central-1 && aws s3 cp s3://b/a -",
        "pipe:mc cp m/bucket/a-{000..100}.tar /dev/stdout",
        "pipe:hdfs dfs -Dfs.block.size=134217728 -cat /a/b.tar",
        "pipe:rclone cat :s3,provider=AWS,env_auth=true:bucket/a.tar",
    ],
)
def test_what_holds_no_secret_is_left_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("value", ["true-horse-battery", "false.x1", "True/9", "true+y"])
def test_a_secret_that_begins_with_true_or_false_and_a_sign_is_left_out(value: str) -> None:
    assert redact(f"pipe:SSHPASS={value} fetch a") == f"pipe:SSHPASS={REDACTED} fetch a"


def test_values_of_secret_variables_are_left_out_and_paths_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", PLANTED)
    monkeypatch.setenv("SECRET", "/run/secrets")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-true")
    values = {"a": [f"x{PLANTED}y", "/run/secrets/x", "false-or-true"], PLANTED: 1}
    assert redact_values(values) == {"a": [f"x{REDACTED}y", "/run/secrets/x", "false-or-true"], REDACTED: 1}


def test_a_value_whose_key_names_a_secret_is_left_out_and_recipes_have_none() -> None:
    values = {"comet": {"enabled": True, "api_key": "shortkey", "project": "p"}, "token": "$TOKEN", "max_tokens": "5"}
    expected = {"comet": {"enabled": True, "api_key": REDACTED, "project": "p"}, "token": "$TOKEN", "max_tokens": "5"}
    assert redact_values(values) == expected
    for recipe in (ROOT / "d2v_scale" / "recipes").glob("*.yaml"):
        assert redact(recipe.read_text()) == recipe.read_text(), recipe
        loaded = yaml.safe_load(recipe.read_text())
        assert redact_values(loaded) == loaded, recipe


def holding(root: Path, secret: str) -> list[str]:
    return [str(p) for p in root.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.mark.slow
def test_a_run_keeps_shows_and_sends_no_secret_and_its_resume_asks_for_it(tmp_path: Path) -> None:
    """Planted in the data's command, the tracking address, the arguments and the environment."""
    store = tmp_path / "store"
    store.mkdir()
    write_set(tmp_path / "shards", "train", "image", image_samples(40), per_shard=20)
    secrets = [f"{PLANTED}{k}" for k in range(4)]
    (shard, *_) = sorted((tmp_path / "shards").glob("*.tar"))
    data = f"pipe:API_TOKEN={secrets[0]} cat {shard}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": secrets[1], "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_TRACKING_URI"] = f"http://bob:{secrets[2]}@127.0.0.1:9"  # nobody answers there
    run_dir = tmp_path / "run"
    small = ["--global_batch_size=4", "--evaluation.train=null", "--evaluation.test=null", "--tracking.log_every=1"]
    small += ["--tracking.finish_timeout=1", "--tracking.plot_every=null", "--data.workers=1"]
    said: list[str] = []

    def call(script: str, *arguments: str, **changed: str) -> int:
        command = [sys.executable, str(ROOT / script), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment | changed)
        said.append(ended.stdout + ended.stderr)
        return ended.returncode

    start = [f"--data={data}", f"--run_dir={run_dir}", f"--name=run-{secrets[1]}", *small]
    assert call("d2v_scale/train.py", "--recipe=demo_vision", *start, "--stop_at=1") == 0, said[-1]
    # The secret is asked for, and what is asked for continues the run.
    assert call("d2v_scale/train.py", f"--resume={run_dir}", "--stop_at=2") == 2
    assert "Give --data again" in said[-1]
    assert call("d2v_scale/train.py", f"--resume={run_dir}", f"--data={data}", "--stop_at=2") == 0, said[-1]
    # What fails, too.
    broken = f"pipe:echo https://h/x?sig={secrets[3]} >&2; false"
    assert call("d2v_scale/train.py", "--recipe=demo_vision", f"--data={broken}", f"--run_dir={tmp_path / 'b'}") != 0
    uri = f"sqlite:///{store}/mlflow.db"
    assert call("tools/sync_mlflow.py", str(run_dir)) == 1
    assert call("tools/sync_mlflow.py", str(run_dir), MLFLOW_TRACKING_URI=uri) == 0, said[-1]
    assert call("tools/report.py", str(run_dir), "--out", str(tmp_path / "report")) == 0, said[-1]
    assert call("tools/export.py", str(run_dir), str(tmp_path / "exported")) == 0, said[-1]
    with sqlite3.connect(store / "mlflow.db") as database:
        params = dict(database.execute("SELECT key, value FROM params"))
    assert REDACTED in params["data.sources"]
    assert json.loads((run_dir / "environment.json").read_text())["command"]
    for secret in secrets:
        assert holding(tmp_path, secret) == []
        assert not any(secret in text for text in said)
