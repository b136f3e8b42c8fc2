"""Secrets do not leave a config for what is printed, kept or sent; what is left out is asked for again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm.config import RunConfig
from llm.config.parse import from_dict, parse_config, to_dict, to_yaml
from llm.config.redact import HIDDEN, hidden_keys, hide, redacted
from llm.config.sections import CheckpointConfig, DataConfig, TrainConfig
from llm.errors import InputError
from llm.train.resume import kept_config, resume_report

SECRET = "hunter2"
NAMES = (
    "token", "hf_token", "api_key", "apiKey", "API_KEY", "secret", "aws_secret_access_key", "password", "passwd",
    "wandb_key", "token_file", "accessKeyId", "client-secret", "TOKEN",
)  # fmt: skip
OPEN = ("tokens", "tokenizer", "num_tokens", "tokenizer_name", "project", "team", "enabled")
URLS = {
    f"https://me:{SECRET}@host/x": f"https://{HIDDEN}@host/x",
    f"https://{SECRET}@host/x": f"https://{HIDDEN}@host/x",
    f"s3://a:{SECRET}@b@host:9000/x": f"s3://{HIDDEN}@host:9000/x",
    f"https://host/x?sig={SECRET}&y=1": f"https://host/x?{HIDDEN}",
    f"simplecache::ftp://u:{SECRET}@host": f"simplecache::ftp://{HIDDEN}@host",
    f"https://{SECRET}@a/x, https://{SECRET}@b/y?k={SECRET}": f"https://{HIDDEN}@a/x, https://{HIDDEN}@b/y?{HIDDEN}",
}
PLAIN = ("s3://bucket/x", "hf://datasets/a/b@main/c", "/data/a@b", "is it? yes", "a:b@c", "https://host/a@b")


def with_deepspeed(section: dict) -> RunConfig:
    return replace(RunConfig(), train=TrainConfig(engine="deepspeed"), deepspeed=section)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_numbers_under_a_secret_name_are_hidden(name: str) -> None:
    section = {"wandb": {name: SECRET, "project": "x", "many": [{name: [SECRET, 5]}]}, name: {"deep": SECRET}}
    found = redacted(to_dict(with_deepspeed(section)))["deepspeed"]
    hidden = {"wandb": {name: HIDDEN, "project": "x", "many": [{name: [HIDDEN, HIDDEN]}]}, name: {"deep": HIDDEN}}
    assert found == hidden


@pytest.mark.parametrize("name", OPEN)
def test_other_names_stay(name: str) -> None:
    config = with_deepspeed({"x": {name: "seen", "b": [1, None, True]}})
    assert redacted(to_dict(config)) == to_dict(config)


def test_a_config_without_secrets_is_the_same() -> None:
    assert redacted(to_dict(RunConfig())) == to_dict(RunConfig()) and kept_config(RunConfig()) == to_dict(RunConfig())


@pytest.mark.parametrize("url", URLS)
def test_urls_have_no_user_and_no_query(url: str) -> None:
    assert hide(url) == URLS[url]
    config = replace(
        RunConfig(), data=DataConfig(path=url, source=url, blend={url: 1.0}), checkpoint=CheckpointConfig(copy_to=url)
    )
    assert SECRET not in to_yaml(config)
    kept = kept_config(config)
    assert kept["checkpoint"]["copy_to"] == kept["data"]["source"] == URLS[url]
    assert kept["data"]["path"] == url  # a corpus is numbered by the order of its name


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text: str) -> None:
    assert hide(text) == text


def test_every_place_of_what_was_hidden_is_known() -> None:
    url = f"https://me:{SECRET}@host/x"
    found = {"deepspeed": {"a": {"key": SECRET, "open": 1}, "b": [1, url], "c": url, url: 2}, "name": "x"}
    hidden = hide(url)
    assert sorted(hidden_keys(redacted(found))) == [f"deepspeed.{key}" for key in ("a.key", "b", "c", hidden)]
    assert hidden_keys(found) == []


SECRETS = with_deepspeed({"wandb": {"api_key": SECRET}})


def test_a_config_that_was_written_asks_for_its_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(SECRETS))
    with pytest.raises(InputError, match=r"deepspeed\.wandb\.api_key: the value was left out .* give it again"):
        parse_config([f"--config={tmp_path / 'config.yaml'}"])
    given = [f"--config={tmp_path / 'config.yaml'}", f"--deepspeed.wandb.api_key={SECRET}"]
    assert parse_config(given) == SECRETS
    with pytest.raises(SystemExit):
        parse_config([*given, "--print-config"])
    assert SECRET not in capsys.readouterr().out


def test_a_run_goes_on_with_its_secrets_and_says_nothing_of_them() -> None:
    saved = from_dict(kept_config(SECRETS))
    assert saved.deepspeed == {"wandb": {"api_key": HIDDEN}} and hidden_keys(to_dict(saved)) != []
    assert resume_report(saved, SECRETS, 1) == resume_report(SECRETS, SECRETS, 1) == "resumed from step 1 of 1000"
    moved = replace(SECRETS, data=DataConfig(path=f"s3://u:{SECRET}@host/y"))
    assert SECRET not in resume_report(saved, moved, 1) and "data.path" in resume_report(saved, moved, 1)
