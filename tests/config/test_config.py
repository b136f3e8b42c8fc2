"""The config: one YAML file and overrides in, a checked RunConfig or one clear InputError out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import DataConfig, ModelConfig, ParallelConfig, PhaseChange, RunConfig, TrainConfig
from llm.config.parse import from_dict, parse_config, to_dict, to_yaml
from llm.errors import InputError

FP8 = "--train.fp8=tensorwise"
FP16 = ("--train.precision=fp16", "--parallel.zero_stage=1")
PRESETS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def refused(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(argv)
    return str(caught.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nmodel: {n_layer: 6, bias: false}\noptim: {lr: 4e-4}\n")
    config = parse_config(["--config", path, "--model.n_layer=8", "--optim.betas", "[0.8, 0.9]"])
    expected = RunConfig(
        name="a",
        model=ModelConfig(n_layer=8, bias=False),
        optim=dataclasses.replace(RunConfig().optim, lr=4e-4, betas=(0.8, 0.9)),
    )
    assert config == expected


def test_no_arguments_are_the_defaults_and_an_empty_file_too(tmp_path: Path) -> None:
    assert parse_config([]) == RunConfig()
    assert parse_config([f"--config={write(tmp_path, '')}"]) == RunConfig()


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_parse_and_are_named_after_their_file(path: Path) -> None:
    assert parse_config([f"--config={path}"]).name == path.stem


def test_gpt2_preset_is_gpt2() -> None:
    config = parse_config([f"--config={next(p for p in PRESETS if p.stem == 'gpt2-124m')}"])
    model = config.model
    assert (model.n_layer, model.n_head, model.d_model, model.ff_dim) == (12, 12, 768, 3072)
    assert (model.vocab_size, model.max_seq_len, model.tie_embeddings) == (50257, 1024, True)
    assert config.optim.lr == 6e-4
    assert config.optim.min_lr == 6e-5


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.n_layr=3", ["model.n_layr", "model.n_layer"]),
        ("--lr=3", ["'lr'", "optim.lr"]),
        ("--model.lr=1", ["model.lr", "optim.lr"]),
        ("--zero_stage=1", ["parallel.zero_stage"]),
        ("--model=3", ["'model'"]),
        ("--model.n_layer=abc", ["model.n_layer", "'abc'", "int"]),
        ("--model.n_layer=2.5", ["model.n_layer", "2.5", "int"]),
        ("--model.n_kv_head=x", ["model.n_kv_head", "'x'", "int | null"]),
        ("--model.bias=maybe", ["model.bias", "'maybe'", "bool"]),
        ("--optim.lr=", ["optim.lr", "float"]),
        ("--optim.lr=.inf", ["optim.lr", "inf", "finite"]),
        ("--optim.betas=[0.9]", ["optim.betas", "[0.9]", "tuple[float, float]"]),
        ("--train.precision=bf61", ["train.precision", "'bf61'", "nearest: bf16"]),
        ("--parallel.zero_stage=2.0", ["parallel.zero_stage", "2.0"]),
        ("--model.n_layer=0", ["model.n_layer", "0", "at least 1"]),
        ("--profile.steps=[1,3]", ["profile.steps", "[1, 3]", "2 <= first"]),
        ("--profile.steps=[5,4]", ["profile.steps", "[5, 4]", "first <= last"]),
        ("--profile.steps=[5,1000]", ["profile.steps", "1000", "train.max_steps 1000"]),
        ("--name=../x", ["name", "../x", "folder"]),
        ("--seed", ["--seed", "value"]),
        ("junk", ["'junk'", "--key=value"]),
        ("--config=/nowhere.yaml", ["/nowhere.yaml"]),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(argument: str, words: list[str]) -> None:
    message = refused(argument)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {n_layr: 3}", ["model.n_layr", "model.n_layer"]),
        ("modle: {n_layer: 3}", ["'modle'", "'model'"]),
        ("model: 3", ["model", "3"]),
        ("model: null", ["model", "None"]),
        ("- 1", ["list"]),
        ("name: 5", ["name", "5", "str"]),
        ("name: null", ["name", "None", "str"]),
        ("optim: {lr: null}", ["optim.lr", "None", "float"]),
        ("a: b: c", ["not valid YAML"]),
        ("seed: 1\nseed: 2", ["'seed'", "twice"]),
        ("parallel: {zero_stage: true}", ["parallel.zero_stage", "True"]),
        ("parallel: {zero_stage: 2.0}", ["parallel.zero_stage", "2.0"]),
        ("optim: {lr: yes}", ["optim.lr", "True", "float"]),
        ("deepspeed: 3", ["deepspeed", "3"]),
        ("deepspeed: {1: 2}", ["deepspeed", "text"]),
        ("deepspeed: &a {b: *a}", ["alias", "in the value that it names"]),
        ("x: !!python/object/apply:os.system [ls]", ["not valid YAML"]),
        ("x: !!bool maybe", ["not valid YAML"]),
        ("x: 2020-13-45", ["not valid YAML"]),
        ("x: " + "[" * 5000, ["not valid YAML"]),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(f"--config={write(tmp_path, text)}")
    assert all(word in message for word in words), message


def test_one_config_file_only(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1")
    assert "2 times" in refused(f"--config={path}", f"--config={path}")


def test_deepspeed_keys_nest_and_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, "deepspeed: {zero_optimization: {reduce_bucket_size: 5e8}}")
    config = parse_config([f"--config={path}", "--deepspeed.zero_optimization.overlap_comm=false", "--deepspeed.x=1"])
    assert config.deepspeed == {
        "zero_optimization": {"reduce_bucket_size": 5e8, "overlap_comm": False},
        "x": 1,
    }


def test_a_class_path_is_data_and_nothing_is_imported_or_called(tmp_path: Path) -> None:
    call = "{class_path: pathlib.Path.touch, init_args: {self: %s}}" % (tmp_path / "called")
    section = parse_config([f"--config={write(tmp_path, f'deepspeed: {{x: {call}}}')}"]).deepspeed
    assert section["x"]["class_path"] == "pathlib.Path.touch"
    assert not (tmp_path / "called").exists()


def test_help_lists_every_field_with_its_docstring_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"], prog="pretrain.py")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, value in to_dict(RunConfig()).items():
        for name in value if isinstance(value, dict) else ():
            assert f"--{key}.{name} " in text
    assert "Steps of linear warm-up from 0. (type: int, default: 50)" in text
    assert "--seed SEED" in text
    assert "--deepspeed.KEY" in text


def test_print_config_prints_what_parses_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--model.n_layer=7", "--print-config"])
    assert caught.value.code == 0
    path = write(tmp_path, capsys.readouterr().out)
    assert parse_config([f"--config={path}"]) == parse_config(["--model.n_layer=7"])


def test_the_launcher_s_local_rank_is_ignored() -> None:
    assert parse_config(["--local_rank=1", "--local_rank", "0"]) == RunConfig()


@given(
    name=st.from_regex(r"[a-c1e][a-c1e._-]{0,9}", fullmatch=True),
    prompt=st.text(),
    path=st.none() | st.text(min_size=1) | st.sampled_from(["null", "~", "010", "1:30", "1e3"]),
    kv=st.sampled_from([None, 1, 2, 4]),
    lr=st.floats(1e-300, 1e300),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    extra=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.text()),
)
@settings(deadline=None, max_examples=25)
def test_a_written_config_reads_back_equal(tmp_path_factory, name, prompt, path, kv, lr, betas, extra) -> None:
    base = RunConfig()
    config = RunConfig(
        name=name,
        model=ModelConfig(n_kv_head=kv),
        data=dataclasses.replace(base.data, path=path),
        optim=dataclasses.replace(base.optim, lr=lr, min_lr=0.0, betas=betas),
        logging=dataclasses.replace(base.logging, sample_prompt=prompt),
        deepspeed={"x": extra},
    )
    assert from_dict(to_dict(config)) == config
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert parse_config([f"--config={file}"]) == config


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = RunConfig(name="1e3")
    assert parse_config([f"--config={write(tmp_path, to_yaml(config))}"]) == config


def test_the_last_of_two_overrides_wins() -> None:
    assert parse_config(["--seed=1", "--seed=2"]).seed == 2


@pytest.mark.parametrize("key", ["onwards", "quick", "x.y"])
def test_a_key_that_is_near_none_gets_no_suggestion(key: str) -> None:
    assert refused(f"--{key}=1") == f"unknown key {key!r} (--help lists all)"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.init_std=0"], ["model.init_std is 0.0", "above 0"]),
        (["--model.n_head=512", "--model.d_model=512"], ["model.n_head is 512", "at most 256"]),
        (["--data.seq_len=129"], ["data.seq_len 129", "model.max_seq_len 128"]),
        (["--train.precision=bf16"], ["bf16", "use parallel.zero_stage=1"]),
        (["--train.engine=plain", "--parallel.zero_stage=1"], ["plain", "parallel.zero_stage=0"]),
        (["--train.engine=plain", "--parallel.tensor_parallel=2"], ["tensor_parallel=1"]),
        (
            ["--model.n_kv_head=2", "--parallel.tensor_parallel=4"],
            ["TP degree above the key/value heads", "n_kv_head is 2", "tensor_parallel=2"],
        ),
        (
            ["--model.n_head=4", "--parallel.tensor_parallel=3"],
            ["n_kv_head 4", "tensor_parallel=2"],
        ),
        (["--model.d_ff=6", "--parallel.tensor_parallel=4"], ["d_ff 6", "tensor_parallel=2"]),
        (["--parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "tensor_parallel of 2 or more", "1"]),
        (
            ["--parallel.sequence_parallel=true", "--parallel.tensor_parallel=4", "--data.seq_len=30"],
            ["data.seq_len 30", "tensor_parallel 4", "use data.seq_len=28"],
        ),
        (["--train.engine=fsdp"], ["fsdp", "found parallel.zero_stage 0", "use parallel.zero_stage=3"]),
        (["--train.engine=fsdp", "--parallel.zero_stage=1"], ["found parallel.zero_stage 1"]),
        (["--parallel.offload=optimizer"], ["offload optimizer", "zero_stage 1 or more", "found 0"]),
        (["--parallel.offload=all", "--parallel.zero_stage=2"], ["offload all", "zero_stage 3", "found 2"]),
        (
            ["--train.engine=fsdp", "--parallel.zero_stage=3", "--parallel.offload=optimizer"],
            ["use parallel.offload=all"],
        ),
        (["--train.engine=plain", "--deepspeed.steps_per_print=1"], ["plain", "steps_per_print"]),
        (["--train.checkpoint_every=2"], ["checkpoint_every is 2", "use train.activation_checkpointing=full"]),
        (["--train.z_loss=-1"], ["train.z_loss is -1", "at least 0"]),
        ([FP8, "--model.d_model=40"], ["multiples of 16", "model.d_model is 40"]),
        ([FP8, "--model.d_ff=136"], ["model.d_ff is 136"]),
        ([FP8, "--model.d_model=48", "--model.n_kv_head=1"], ["queries, keys and values is 72"]),
        ([FP8, "--model.d_model=32", "--parallel.tensor_parallel=4"], ["d_model / parallel.tensor_parallel 4 is 8"]),
        ([FP8, "--train.micro_batch_size=1", "--data.seq_len=24"], ["16 tokens", "is 24", "fp8_weight_grad=high"]),
        ([FP8, "--train.micro_batch_size=2", "--data.phases=[{samples: 320, seq_len: 20}]"], ["is 40"]),
        ([FP8, "--lora.rank=4", "--train.init_from=runs/a"], ["train.fp8 tensorwise", "lora.rank 4"]),
        ([FP8, "--model.family=lstm"], ["train.fp8 tensorwise", "model.family lstm"]),
        (["--train.fp8=rowwise"], ["gives bf16", "found train.precision fp32", "train.precision=bf16"]),
        ([*FP16, "--train.fp8=rowwise"], ["gives bf16", "found train.precision fp16"]),
        (["--train.z_loss=.inf"], ["train.z_loss", "finite"]),
        (["--train.guard_interval=-1"], ["train.guard_interval is -1", "at least 0"]),
    ],
)
def test_impossible_combinations_name_the_nearest_choice(argv: list[str], words: list[str]) -> None:
    message = refused(*argv)
    assert all(word in message for word in words), message


BLEND = "{data/web: 3, data/code: 1.0}"
PHASES = "[{samples: 320, seq_len: 64}, {samples: 640, global_batch_size: 64, blend: {data/code: 1e0}}]"


def test_blends_and_phases_are_read_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, f"data: {{blend: {BLEND}, phases: {PHASES}}}")
    for argv in ([f"--config={file}"], [f"--data.blend={BLEND}", f"--data.phases={PHASES}"]):
        data = parse_config(argv).data
        assert data.blend == {"data/web": 3.0, "data/code": 1.0}
        assert data.phases == (
            PhaseChange(320, seq_len=64),
            PhaseChange(640, global_batch_size=64, blend={"data/code": 1.0}),
        )


def test_a_config_with_blends_and_phases_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config([f"--data.blend={BLEND}", f"--data.phases={PHASES}", "--data.damaged=skip"])
    assert from_dict(to_dict(config)) == config
    assert parse_config([f"--config={write(tmp_path, to_yaml(config))}"]) == config


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--data.blend={}", ["data.blend", "empty"]),
        ("--data.blend=3", ["data.blend", "3"]),
        ("--data.blend=[a, b]", ["data.blend"]),
        ("--data.blend={a: 0}", ["data.blend", "'a' is 0", "above 0"]),
        ("--data.blend={a: -1}", ["data.blend", "'a' is -1"]),
        ("--data.blend={a: .inf}", ["data.blend.a: found inf", "finite"]),
        ("--data.blend={a: .nan}", ["data.blend.a: found nan", "finite"]),
        ("--data.blend={a: true}", ["data.blend.a: found True", "float"]),
        ("--data.blend={a: x}", ["data.blend", "x"]),
        ("--data.blend={1: 2}", ["data.blend", "1"]),
        ("--data.phases=3", ["data.phases", "3"]),
        ("--data.phases=[{seq_len: 3}]", ["data.phases", "samples"]),
        ("--data.phases=[{samples: 0}]", ["data.phases", "samples is 0", "at least 1"]),
        ("--data.phases=[{samples: 32, seq_len: 0}]", ["data.phases", "seq_len is 0"]),
        ("--data.phases=[{samples: 32, seq_lne: 5}]", ["data.phases", "seq_lne"]),
        ("--data.phases=[{samples: 32, blend: {a: 0}}]", ["data.phases", "'a' is 0"]),
        ("--data.phases=[{samples: 33}]", ["data.phases", "within a step of 32", "use 32"]),
        ("--data.phases=[{samples: 64}, {samples: 32}]", ["data.phases", "rising"]),
        ("--data.phases=[{samples: 32, seq_len: 129}]", ["data.seq_len 129", "model.max_seq_len 128"]),
        ("--data.packing=best_fit", ["data.packing best_fit", "data.document_masks=true"]),
        ("--data.packing=bestfit", ["data.packing", "nearest: best_fit"]),
        ("--data.damaged=ignore", ["data.damaged", "'ignore'"]),
        ("--data.verify=yes", ["data.verify"]),
    ],
)
def test_a_wrong_blend_or_phase_is_named_with_what_was_expected(argument: str, words: list[str]) -> None:
    message = refused(argument)
    assert all(word in message for word in words), message


def test_every_phase_must_suit_the_layout() -> None:
    message = refused(
        "--parallel.sequence_parallel=true",
        "--parallel.tensor_parallel=4",
        "--data.phases=[{samples: 320, seq_len: 30}]",
    )
    assert "data.seq_len 30" in message and "use data.seq_len=28" in message
    data = DataConfig(phases=(PhaseChange(320, global_batch_size=40),))
    with pytest.raises(InputError, match="global_batch_size 40 is not a multiple of 2 data-parallel ranks"):
        dataclasses.replace(layout(), data=data).check_world(2)


def test_bf16_is_allowed_with_zero_1_and_with_the_plain_engine() -> None:
    parse_config(["--train.precision=bf16", "--parallel.zero_stage=1"])
    parse_config(["--train.precision=bf16", "--train.engine=plain"])


def test_layouts_that_are_allowed() -> None:
    parse_config(["--parallel.sequence_parallel=true", "--parallel.tensor_parallel=4", "--parallel.zero_stage=3"])
    for stage in (2, 3):
        parse_config(["--train.engine=fsdp", f"--parallel.zero_stage={stage}", "--train.precision=bf16"])
    parse_config(["--parallel.offload=all", "--parallel.zero_stage=3"])
    parse_config(["--train.activation_checkpointing=selective", "--train.checkpoint_every=3", "--train.z_loss=1e-4"])


def test_fp8_of_every_kind() -> None:
    bf16 = ["--train.precision=bf16", "--parallel.zero_stage=1"]
    for fp8 in ("tensorwise", "rowwise"):
        for grad in ("fp8", "high"):
            parse_config([f"--train.fp8={fp8}", f"--train.fp8_weight_grad={grad}", *bf16])
    parse_config([FP8, "--train.fp8_weight_grad=high", "--train.micro_batch_size=1", "--data.seq_len=24"])
    parse_config(["--model.d_model=40"])


def layout(tp: int = 1, batch: int = 32, micro: int = 16) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(tensor_parallel=tp),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro),
    )


def test_check_world_accepts_what_divides() -> None:
    for tp, world in [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]:
        layout(tp).check_world(world)


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        (layout(tp=2), 3, ["3 ranks", "tensor_parallel 2", "use parallel.tensor_parallel=1"]),
        (layout(), 4, ["32", "4 data-parallel", "16 = 64", "use train.micro_batch_size=8"]),
        (layout(micro=5), 2, ["use train.micro_batch_size=4"]),
        (layout(), 3, ["use train.global_batch_size=48"]),
        (layout(batch=2, micro=1), 8, ["use train.global_batch_size=8"]),
    ],
)
def test_check_world_names_the_nearest_choice(config: RunConfig, world: int, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        config.check_world(world)
    assert all(word in str(caught.value) for word in words), caught.value
