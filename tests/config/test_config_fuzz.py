"""No text, in a file or on the command line, leads to anything but a config or one clear InputError."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.errors import InputError
from llm.typed import dotted_keys

KEYS = st.sampled_from(["name", "seed", "model", "optim", "deepspeed", "n_layer", "lr", "betas"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary()
TREES = st.recursive(
    SCALARS,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS | st.text() | SCALARS, t, max_size=3),
)


@given(TREES)
@settings(deadline=None, max_examples=50)
def test_any_yaml_gives_a_config_or_an_input_error(tmp_path_factory, tree) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="replace")
    with contextlib.suppress(InputError):
        assert isinstance(parse_config([f"--config={path}"]), RunConfig)


@given(st.text("abc:{}[]-!&*#|>'\"%@`?,. \n01eE+~<<=/\\\x00\t"))
@settings(deadline=None, max_examples=50)
def test_any_text_gives_a_config_or_an_input_error(tmp_path_factory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text)
    with contextlib.suppress(InputError):
        parse_config([f"--config={path}", f"--deepspeed.x={text}"])


KEYS_OF_VALUES = [*dotted_keys(RunConfig), "deepspeed.x", "deepspeed.x.y"]


@given(st.sampled_from(KEYS_OF_VALUES), st.text() | st.from_regex(r"0x[0-9a-f]{4000,6000}|[\[{]*|[0-9:_.e+-]*"))
@settings(deadline=None, max_examples=120)
def test_any_value_gives_a_config_or_an_input_error(key: str, value: str) -> None:
    with contextlib.suppress(InputError):
        parse_config([f"--{key}={value}"])


ARGUMENTS = st.builds(
    "--{}{}{}".format,
    st.sampled_from(KEYS_OF_VALUES) | st.text(max_size=8),
    st.sampled_from(["=", ""]),
    st.text(max_size=8) | st.sampled_from(["1", "null", "{a: 1}", "[1]"]),
) | st.sampled_from(
    ["--help", "--print-config", "--config", "--config=/", "--", "-", "1", "--local_rank=0", "--deepspeed"]
)


@given(st.lists(ARGUMENTS, max_size=4))
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_arguments_give_a_config_a_printed_text_or_an_input_error(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    try:
        assert isinstance(parse_config(argv), RunConfig)
    except InputError:
        assert "--help" not in argv
    except SystemExit:
        assert capsys.readouterr().out
