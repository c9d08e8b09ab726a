"""The command line of the server, and the arguments that vLLM gets."""

import gc
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_l2kv_server import serve
from vllm_l2kv_server.last_line import LastLine
from vllm_l2kv_server.profile_line import profile_line
from vllm_l2kv_server.screen import NOTICE
from vllm_l2kv_server.serve import load_routes, make_parser, name_plugin, parse, use_demo_model
from vllm_l2kv_server.start_signals import Stopped
from weights import judged, made_up_weights, write_profile

import vllm_l2kv
from vllm_l2kv import cli, engine_args
from vllm_l2kv.cli import main
from vllm_l2kv.params import FIELDS_WITH_DEFAULTS, CompressionParams
from vllm_l2kv.profile import Target
from vllm_l2kv.settings import CONFIG_KEY, Settings


@pytest.fixture(scope="module")
def parser():
    return make_parser()


def test_defaults(parser):
    args = parse(parser, ["some/model"])
    ours = vllm_l2kv.engine_args(metrics=True)
    assert args.model == "some/model"
    assert (args.scheduler_cls, args.worker_cls) == (ours["scheduler_cls"], ours["worker_cls"])
    assert args.block_size == ours["block_size"]
    assert args.additional_config == ours["additional_config"]
    # docs/choosing.md has the reasons.
    config = args.additional_config[CONFIG_KEY]
    assert (config["kv_protect_first"], config["kv_protect_last"], config["kv_scorer"]) == (4, 64, "l2")


def test_own_options(parser):
    words = ["--kv-full-layers=3,1", "--kv-default-keep-ratio=0.5", "--kv-protect-first", "4", "--kv-protect-last", "8"]
    words += ["--kv-scorer", "keydiff", "--kv-default-max-tokens", "500", "--kv-prompt-interval", "64"]
    words += ["--kv-answer-interval", "32", "--kv-full-heads", "7:0,2", "12:1"]
    assert parse(parser, words).additional_config["l2kv"] == {
        **{field.name: field.default for field in FIELDS_WITH_DEFAULTS},
        "full_layers": [1, 3],
        "full_heads": {"7": [0, 2], "12": [1]},
        "metrics": True,
        "kv_keep_ratio": 0.5,
        "kv_protect_first": 4,
        "kv_protect_last": 8,
        "kv_scorer": "keydiff",
        "kv_max_tokens": 500,
        "prompt_interval": 64,
        "answer_interval": 32,
        "profile": None,
        "evaluation_scorers": [],
    }


class TestProfile:
    @pytest.fixture
    def profile(self, tmp_path) -> Path:
        """A profile of 10 layers: 2 full layers and a ratio of 0.375 take a half; 1 and a ratio of 1 / 6 a quarter."""
        memory = (Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.25, (2,), 0.166667, "learned", {}, "neighbors"))
        write_profile(tmp_path / "p.safetensors", made_up_weights(10, 2, 32), memory=memory)
        return tmp_path / "p.safetensors"

    def settings(self, parser, *words) -> Settings:
        return Settings.from_config(parse(parser, ["m", *map(str, words)]).additional_config)

    def test_it_sets_layers_ratio_and_scorer(self, parser, profile):
        settings = self.settings(parser, "--kv-profile", profile)
        assert (settings.full_layers, settings.profile) == ((2, 7), str(profile))
        assert settings.defaults == CompressionParams(0.375, scorer="keydiff")
        quarter = self.settings(parser, "--kv-profile", profile, "--kv-memory", 0.25)
        assert quarter.full_layers == (2,)
        assert quarter.defaults == CompressionParams(0.166667, scorer="learned", granularity="neighbors")

    def test_explicit_options_win(self, parser, profile):
        words = ["--kv-profile", profile, "--kv-memory", 0.4]
        layers = self.settings(parser, *words, "--kv-full-layers", "0,1,2")
        assert layers.full_layers == (0, 1, 2)
        assert layers.defaults.keep_ratio == pytest.approx(1 / 7, abs=1e-6), "so that the whole cache costs 0.4"
        ratio = self.settings(parser, *words, "--kv-default-keep-ratio", 1, "--kv-scorer", "l2")
        assert (ratio.full_layers, ratio.defaults) == ((2,), CompressionParams(1, scorer="l2"))
        learned = "--kv-profile", profile, "--kv-memory", 0.25
        token = self.settings(parser, *learned, "--kv-granularity", "token")
        assert (token.defaults.scorer, token.defaults.granularity) == ("learned", "token")
        same = self.settings(parser, *learned, "--kv-scorer", "learned")
        assert (same.defaults.scorer, same.defaults.granularity) == ("learned", "neighbors")
        other = self.settings(parser, *learned, "--kv-scorer", "keydiff")
        assert (other.defaults.scorer, other.defaults.granularity) == ("keydiff", "token"), "they go together"
        both = self.settings(parser, *words[:2], "--kv-full-layers=", "--kv-default-keep-ratio=0.1")
        assert (both.full_layers, both.defaults, both.profile) == ((), CompressionParams(0.1), str(profile))

    def test_heads_in_place_of_layers(self, parser, tmp_path):
        memory = (Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.5, (), 0.411765, "l2", {2: (0, 1), 7: (1,)}))
        write_profile(tmp_path / "p", made_up_weights(10, 2, 32), memory=memory)
        words = ["--kv-profile", tmp_path / "p"]
        heads = self.settings(parser, *words, "--kv-classes", "heads")
        assert (heads.full_layers, heads.full_heads) == ((), {2: (0, 1), 7: (1,)})
        assert heads.defaults == CompressionParams(0.411765, scorer="l2")
        layers = self.settings(parser, *words, "--kv-classes", "layers")
        assert layers == self.settings(parser, *words)
        assert (layers.full_layers, layers.full_heads) == ((2, 7), {})
        both = self.settings(parser, *words, "--kv-full-heads", "1:0", "--kv-memory", 0.6)
        assert (both.full_layers, both.full_heads) == ((2, 7), {1: (0,)})
        assert both.defaults.keep_ratio == pytest.approx((12 - 5) / 15, abs=1e-6)
        (tmp_path / "c.yaml").write_text("kv-profile: p\nkv-classes: heads\n")
        assert self.settings(parser, "--config", tmp_path / "c.yaml") == heads

    def test_a_scorer_takes_what_was_best_with_it(self, parser, tmp_path):
        memory = (Target(0.5, (2, 7), 0.375, "learned"), Target(0.5, (4,), 0.444444, "l2"))
        write_profile(tmp_path / "p", made_up_weights(10, 2, 32), memory=memory)
        words = ["--kv-profile", tmp_path / "p"]
        settings = self.settings(parser, *words, "--kv-scorer", "l2")
        assert (settings.full_layers, settings.defaults) == ((4,), CompressionParams(0.444444))
        offline = engine_args(profile=tmp_path / "p", metrics=True, scorer="l2")
        assert Settings.from_config(offline["additional_config"]) == settings
        for others in ((), ("--kv-scorer", "learned"), ("--kv-scorer", "l1")):
            assert self.settings(parser, *words, *others).full_layers == (2, 7)
        assert self.settings(parser, *words, "--kv-scorer", "l2", "--kv-full-layers", "0,1").full_layers == (0, 1)

    def test_the_better_judged_by_default(self, parser, tmp_path):
        layers, heads = Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.5, (), 0.411765, "l2", {2: (0, 1), 7: (1,)})
        about = judged([(layers, (0.6, 0.7)), (heads, (0.7, 0.7))])
        write_profile(tmp_path / "p", made_up_weights(10, 2, 32), memory=(layers, heads), about=about)
        words = ["--kv-profile", tmp_path / "p"]
        taken = self.settings(parser, *words)
        assert taken == self.settings(parser, *words, "--kv-classes", "heads")
        assert taken.full_heads == {2: (0, 1), 7: (1,)}
        assert f"With profile {tmp_path / 'p'}: 3 full heads of 20; by default" in profile_line(taken)
        two = self.settings(parser, *words, "--tensor-parallel-size", 2)
        assert two == self.settings(parser, *words, "--kv-classes", "layers")
        assert "full layers 2, 7; by default" in profile_line(two)
        offline = engine_args(profile=tmp_path / "p", metrics=True, tensor_parallel_size=2)
        assert offline["tensor_parallel_size"] == 2
        assert Settings.from_config(offline["additional_config"]) == two
        offline = engine_args(profile=tmp_path / "p", metrics=True)
        assert "tensor_parallel_size" not in offline
        assert Settings.from_config(offline["additional_config"]) == taken

    def test_offline_it_is_the_same(self, parser, profile, monkeypatch):
        monkeypatch.chdir(profile.parent)
        ours = engine_args(profile=profile.name, memory=0.25, scorer="l2", metrics=True)
        words = ["--kv-profile", profile, "--kv-memory", 0.25, "--kv-scorer", "l2"]
        assert Settings.from_config(ours["additional_config"]) == self.settings(parser, *words)

    def test_a_line_says_what_it_sets(self, parser, profile):
        assert profile_line(self.settings(parser)) is None
        words = ["--kv-profile", profile]
        line = profile_line(self.settings(parser, *words))
        assert line == (
            f"vllm-l2kv: With profile {profile}: full layers 2, 7; by default a request keeps 0.375 of the others by "
            "scorer keydiff, in all 0.5 of the whole cache.\n"
        )
        assert NOTICE.search(line), "a quiet screen shows it"
        learned = profile_line(self.settings(parser, *words, "--kv-memory", 0.25))
        assert "of the others by scorer learned and granularity neighbors, in all 0.25 of" in learned
        own = profile_line(self.settings(parser, *words, "--kv-full-layers=", "--kv-default-keep-ratio=0.1"))
        assert "full layers none; by default a request keeps 0.1 of the others by scorer l2, in all 0.1 of" in own
        heads = profile_line(self.settings(parser, *words, "--kv-full-heads", "1:0", "2:0,1", "--kv-memory", 0.6))
        assert "full layers 2, 7, 1 full head of 20; " in heads
        assert heads.endswith(", in all 0.6 of the whole cache.\n")

    def test_a_config_file_names_a_profile_beside_itself(self, parser, profile):
        config = profile.parent / "config.yaml"
        config.write_text(f"kv-profile: {profile.name}\nkv-memory: 0.25\nkv-scorer: l2\n")
        settings = self.settings(parser, "--config", config)
        assert (settings.profile, settings.full_layers, settings.defaults.scorer) == (str(profile), (2,), "l2")
        assert self.settings(parser, "--config", config, "--kv-memory", 0.5).full_layers == (2, 7)
        config.write_text(f"kv-profile: {profile}\n")
        assert self.settings(parser, "--config", config).profile == str(profile)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--kv-memory", "0.5"], "give its file too (--kv-profile FILE)."),
            (["--kv-profile", "PROFILE", "--kv-memory", "0"], "--kv-memory: M must satisfy 0 < M <= 1, got 0"),
            (["--kv-profile", "PROFILE", "--kv-memory", "2"], "--kv-memory: M must satisfy 0 < M <= 1, got 2"),
            (["--kv-profile", "PROFILE", "--kv-memory", "0.1"], "memory must be more than 0.100, which the 1 full"),
            (["--kv-classes", "heads"], "classes (--kv-classes) needs a profile; give its file too"),
            (["--kv-profile", "PROFILE", "--kv-classes", "heads"], "has no settings with full heads; make it again"),
            (["--kv-profile", "no/such"], "cannot read the profile no/such: No such file or directory."),
            (["--kv-profile", __file__], "is not a safetensors file."),
        ],
    )
    def test_refusals(self, parser, profile, capsys, words, message):
        with pytest.raises(SystemExit) as ended:
            self.settings(parser, *(profile if word == "PROFILE" else word for word in words))
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.parametrize("module", ["app", "routes"])
def test_routes_that_cannot_be_imported_end_the_start(monkeypatch, module):
    load_routes()
    monkeypatch.setitem(sys.modules, f"vllm_l2kv_server.{module}", None)
    with pytest.raises(ImportError):
        load_routes()


def test_granularity(parser):
    assert parse(parser, ["m", "--kv-granularity", "block"]).additional_config["l2kv"]["kv_granularity"] == "block"


def test_no_full_layers(parser):
    assert parse(parser, ["m", "--kv-full-layers", ""]).additional_config["l2kv"]["full_layers"] == []
    assert parse(parser, ["m", "--kv-full-layers="]).additional_config["l2kv"]["full_layers"] == []


def test_vllms_options_pass_through(parser):
    words = [
        "m",
        "--middleware",
        "a.b",
        "--middleware",
        "c.d",
        "--api-key",
        "k1",
        "k2",
        "--served-model-name",
        "x",
        "y",
    ]
    words += ["--api-server-count", "2", "--block-size", "64", "--max_model_len", "2048", "--no-enable-prefix-caching"]
    args = parse(parser, words)
    assert args.middleware == ["a.b", "c.d"]
    assert args.api_key == ["k1", "k2"]
    assert args.served_model_name == ["x", "y"]
    assert args.api_server_count == 2
    assert args.block_size == 64
    assert args.max_model_len == 2048
    assert args.enable_prefix_caching is False


def test_additional_config_is_merged(parser):
    args = parse(parser, ["m", "--additional-config", '{"theirs": 1}'])
    assert args.additional_config["theirs"] == 1
    assert args.additional_config["l2kv"]["kv_keep_ratio"] == 1.0


def test_max_body(parser):
    assert parse(parser, ["m"]).max_body_mib == 64
    assert parse(parser, ["m", "--max-body-mib", "3"]).max_body_mib == 3


def test_playground(parser, tmp_path):
    assert parse(parser, ["m"]).playground is True
    assert parse(parser, ["m", "--no-playground"]).playground is False
    config = tmp_path / "c.yaml"
    config.write_text("playground: false\n")
    assert parse(parser, ["m", "--config", str(config)]).playground is False


@pytest.mark.parametrize(
    ("words", "is_offline"),
    [
        ([], True),
        (["--no-enable-offline-docs"], False),
        (["--root-path", "/llm"], False),
        (["--root-path", "/llm", "--enable-offline-docs"], True),
    ],
)
def test_docs_work_offline(parser, words, is_offline):
    assert parse(parser, ["m", *words]).enable_offline_docs is is_offline


def test_model_option(parser):
    assert parse(parser, ["--model", "m"]).model == "m"
    assert parse(parser, []).model is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-default-keep-ratio", "0"], "--kv-default-keep-ratio: R must satisfy 0 < R <= 1, got 0"),
        (["--kv-default-keep-ratio", "1.5"], "0 < R <= 1, got 1.5"),
        (["--kv-default-keep-ratio", "nan"], "0 < R <= 1, got nan"),
        (["--kv-default-keep-ratio", "half"], "0 < R <= 1, got 'half'"),
        (["--kv-protect-first", "-1"], "--kv-protect-first: N must satisfy 0 <= N"),
        (["--kv-protect-last", "1.5"], "--kv-protect-last: N must be an integer >= 0, got 1.5"),
        (["--max-body-mib", "0"], "--max-body-mib: N must satisfy 1 <= N <= 2147483647, got 0"),
        (["--max-body-mib", "-1"], "--max-body-mib: N must satisfy 1 <= N <= 2147483647, got -1"),
        (["--max-body-mib", "many"], "--max-body-mib: N must be an integer"),
        (["--kv-default-max-tokens", "0"], "--kv-default-max-tokens: N must satisfy 1 <= N <= 2147483647, got 0"),
        (["--kv-default-max-tokens", "many"], "--kv-default-max-tokens: N must be an integer >= 1, got 'many'"),
        (["--kv-default-max-tokens", "10"], "at least kv_protect_first + kv_protect_last = 68, got 10"),
        (
            ["--kv-default-max-tokens", "500", "--kv-scorer", "random"],
            "kv_scorer 'random' is defined for a single compaction",
        ),
        (["--kv-default-max-tokens=500", "--kv-granularity=block"], "set kv_granularity to 'token' or 'neighbors'"),
        (["--kv-prompt-interval", "0"], "--kv-prompt-interval: N must satisfy 1 <= N <= 2147483647, got 0"),
        (["--kv-answer-interval", "0"], "--kv-answer-interval: N must satisfy 1 <= N <= 2147483647, got 0"),
        (["--kv-answer-interval", "1.5"], "--kv-answer-interval: N must be an integer >= 1, got 1.5"),
        (["--kv-full-layers", "0,x"], "--kv-full-layers: must be layer indices >= 0"),
        (["--kv-full-layers", "-1"], "--kv-full-layers"),
        (["--scheduler-cls", "a.B"], "--scheduler-cls: set by vllm-l2kv itself"),
        (["--worker-cls", "a.B"], "--worker-cls: set by vllm-l2kv itself"),
        (["--additional-config", '{"l2kv": {}}'], "--additional-config: set 'l2kv' by the --kv- options"),
        (["--kv-granularity", "page"], "--kv-granularity: invalid choice: 'page' (choose from "),
        (["--grpc"], "--grpc"),
        (["--no-such-option"], "--no-such-option"),
        (["--config", "none.yaml"], "--config: cannot read none.yaml"),
        (["--config=none.yaml"], "--config: cannot read none.yaml"),
    ],
)
def test_bad_options(parser, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        parse(parser, ["m", *words])
    assert caught.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("vllm-l2kv serve: error: ")
    assert message in last_line


def test_rust_front_end_is_refused(parser, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SystemExit):
        parse(parser, ["m"])
    assert "VLLM_USE_RUST_FRONTEND" in capsys.readouterr().err


class TestConfigFile:
    @pytest.fixture
    def config(self, tmp_path) -> str:
        path = tmp_path / "c.yaml"
        path.write_text("model: from-file\nkv-default-keep-ratio: 0.5\nkv-full-layers: [2]\nport: 8123\n")
        return str(path)

    @pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
    def test_read(self, parser, config, form):
        args = parse(parser, [word.format(config) for word in form])
        assert (args.model, args.port) == ("from-file", 8123)
        assert args.additional_config["l2kv"]["kv_keep_ratio"] == 0.5
        assert args.additional_config["l2kv"]["full_layers"] == [2]

    def test_command_line_wins(self, parser, config):
        words = ["mine", "--port", "9000", "--kv-default-keep-ratio", "0.25", "--config", config]
        args = parse(parser, words)
        assert (args.model, args.port) == ("mine", 9000)
        assert args.additional_config["l2kv"]["kv_keep_ratio"] == 0.25
        assert args.additional_config["l2kv"]["full_layers"] == [2]

    def test_a_list_at_the_end_of_the_file_does_not_take_the_model(self, parser, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text("served-model-name: [a, b]\n")
        args = parse(parser, ["mine", "--config", str(path)])
        assert (args.model, args.served_model_name) == ("mine", ["a", "b"])

    def test_bad_value_names_the_option(self, parser, tmp_path, capsys):
        path = tmp_path / "c.yaml"
        path.write_text("kv-protect-last: -1\n")
        with pytest.raises(SystemExit) as caught:
            parse(parser, ["--config", str(path)])
        assert caught.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        said = f"argument --config: {path}: argument --kv-protect-last: N must satisfy 0 <= N <= 2147483647, got -1."
        assert line.endswith(said)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("kv-full-layers: 0,x", "argument --kv-full-layers: must be layer indices >= 0"),
            ("kv-default-keep-ratio: .nan", "argument --kv-default-keep-ratio: R must satisfy 0 < R <= 1, got nan"),
        ],
    )
    def test_a_bound_of_the_parser_is_reported_with_the_file(self, parser, tmp_path, capsys, text, message):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(SystemExit) as caught:
            parse(parser, ["--config", str(path)])
        assert caught.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"argument --config: {path}: {message}" in line
        assert parse(parser, ["m"]).model == "m"


class TestPlugins:
    def test_unset(self):
        environ: dict[str, str] = {}
        name_plugin(environ)
        assert set(environ["VLLM_PLUGINS"].split(",")) >= {"l2kv", "lora_filesystem_resolver"}

    @pytest.mark.parametrize(
        ("before", "after"), [("", "l2kv"), ("a", "a,l2kv"), ("a,l2kv,b", "a,l2kv,b"), ("a,,b", "a,b,l2kv")]
    )
    def test_set(self, before, after):
        environ = {"VLLM_PLUGINS": before}
        name_plugin(environ)
        assert environ == {"VLLM_PLUGINS": after}


class TestDemoModel:
    @pytest.fixture(autouse=True)
    def no_download(self, monkeypatch):
        monkeypatch.setattr("vllm_l2kv.tools.demo_model.ensure_demo_model", lambda: Path("/cache/demo"))
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def test_settings_for_an_ordinary_machine(self, parser):
        args = parse(parser, [])
        use_demo_model(args)
        assert args.model == "/cache/demo"
        assert args.served_model_name == ["SmolLM2-135M-Instruct"]
        assert args.kv_cache_memory_bytes == 2 * 2**30
        assert (args.dtype, args.enforce_eager) == ("float32", True)

    def test_the_user_wins(self, parser, monkeypatch):
        args = parse(parser, ["--served-model-name", "x", "--kv-cache-memory-bytes", "1G", "--dtype", "bfloat16"])
        use_demo_model(args)
        assert args.served_model_name == ["x"]
        assert args.kv_cache_memory_bytes == 2**30
        assert args.dtype == "bfloat16"
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        args = parse(parser, [])
        use_demo_model(args)
        assert args.kv_cache_memory_bytes is None


class TestMain:
    def test_a_bad_kv_option_is_refused_before_vllm_is_imported(self, capsys, monkeypatch):
        monkeypatch.setattr(serve, "name_plugin", lambda environ: pytest.fail("too late"))
        with pytest.raises(SystemExit) as caught:
            main(["serve", "--kv-default-keep-ratio", "7"])
        assert caught.value.code == 2
        assert capsys.readouterr().err == (
            "vllm-l2kv serve: error: argument --kv-default-keep-ratio: R must satisfy 0 < R <= 1, got 7.\n"
        )

    def test_help_of_serve(self, parser):
        text = parser.format_help()
        for option in (
            "--max-body-mib",
            "--no-playground",
            "--kv-full-layers",
            "--kv-default-keep-ratio",
            "--kv-default-max-tokens",
            "--kv-protect-first",
            "--kv-protect-last",
            "--kv-prompt-interval",
            "--kv-answer-interval",
        ):
            assert option in text
        assert "Every option of `vllm serve` works too" in text

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"vllm-l2kv {vllm_l2kv.__version__}\n"

    @pytest.mark.parametrize("words", [[], ["server"], ["demo-model", "x"]])
    def test_bad_command(self, words):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2

    def test_demo_model_prints_its_folder_last(self, capsys, monkeypatch):
        monkeypatch.setattr("vllm_l2kv.tools.demo_model.ensure_demo_model", lambda: Path("/cache/demo"))
        main(["demo-model"])
        assert capsys.readouterr().out.splitlines()[-1] == "/cache/demo"

    def test_demo_model_out_of_reach(self, monkeypatch):
        from vllm_l2kv.tools.demo_model import DemoModelError

        def fail():
            raise DemoModelError("no network")

        monkeypatch.setattr("vllm_l2kv.tools.demo_model.ensure_demo_model", fail)
        with pytest.raises(SystemExit, match="no network"):
            main(["demo-model"])


@pytest.fixture
def ends(monkeypatch) -> Iterator[list[tuple[int, str]]]:
    """Collects exit statuses and last lines, in place of ending this process."""
    ends = []

    class Recorded(LastLine):
        def _write(self):
            """Does nothing at the end of these tests."""

        def end(self, status, sentence):
            ends.append((status, sentence))
            super().end(status, sentence)

    monkeypatch.setattr(serve, "LastLine", Recorded)
    monkeypatch.setattr(serve, "check_parsed", lambda args: None)
    monkeypatch.setenv("VLLM_PLUGINS", "l2kv")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield ends
    for number, handler in before.items():
        signal.signal(number, handler)


def test_serve_hands_over_to_vllm(monkeypatch, ends):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    handed = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(handed.append))
    with pytest.raises(SystemExit) as ended:
        main(["serve", "some/model", "--port", "8123"])
    assert ended.value.code == 0
    assert ends == [(0, "stopped.")]
    assert gc.isenabled()
    (args,) = handed
    assert (args.model, args.model_tag, args.port) == ("some/model", None, 8123)
    assert json.dumps(args.additional_config)


def test_serve_prints_what_it_takes_from_a_profile(monkeypatch, ends, tmp_path, capsys):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def cmd(args):
        assert "vllm-l2kv: With profile" in capsys.readouterr().out, "before the engine starts"

    write_profile(tmp_path / "p", made_up_weights(10, 2, 32), memory=(Target(0.5, (2, 7), 0.375, "l2"),))
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(cmd))
    with pytest.raises(SystemExit):
        main(["serve", "some/model", "--kv-profile", str(tmp_path / "p")])
    assert ends == [(0, "stopped.")]


def raising(error):
    def cmd(args):
        raise error

    return cmd


@pytest.mark.parametrize(
    ("cmd", "status", "said"),
    [
        (lambda args: setattr(args.outcome, "engine_lost", True), 1, "the engine ended by itself"),
        (raising(RuntimeError("Engine core initialization failed. See root")), 1, "the first ERROR in the log above"),
        (
            raising(TimeoutError("Timed out waiting\nfor engine")),
            1,
            "failed: TimeoutError: Timed out waiting for engine",
        ),
        (raising(ValueError("long " * 200)), 1, "failed: ValueError: long long "),
        (raising(Stopped(signal.SIGINT)), 130, "stopped by SIGINT before it was ready."),
        (raising(KeyboardInterrupt("terminated")), 143, "stopped by SIGTERM before it was ready."),
        (raising(SystemExit()), 0, "stopped."),  # as with several API servers
    ],
)
def test_a_server_ends_with_a_sentence(monkeypatch, ends, cmd, status, said):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(cmd))
    with pytest.raises(SystemExit) as caught:
        main(["serve", "some/model", "--port", "0"])
    ((told_status, sentence),) = ends
    assert caught.value.code == told_status == status
    assert said in sentence
    assert len(sentence) < 350
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--max-body-mb", "3"], "--max-body-mb; did you mean --max-body-mib?"),
        (["--keep-ratio=0.5"], "--keep-ratio; did you mean --kv-default-keep-ratio?"),
        (["--no-playgrond"], "--no-playgrond; did you mean --playground?"),
    ],
)
def test_an_unknown_option_is_reported_with_the_nearest_in_one_line(parser, capsys, words, nearest):
    with pytest.raises(SystemExit) as caught:
        parse(parser, ["m", *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"vllm-l2kv serve: error: unrecognized option {nearest}\n"


@pytest.mark.parametrize(
    ("command", "package", "said"),
    [
        ("serve", "vllm", "the package vllm is missing; install vllm-l2kv[cpu], or with [cuda] on"),
        ("eval ruler", "lm_eval", "the package lm_eval is missing; install vllm-l2kv[eval]."),
        ("eval passkey", "matplotlib", "the package matplotlib is missing; install vllm-l2kv[eval]."),
        ("bench", "httpx", "the package httpx is missing; install vllm-l2kv[bench]."),
    ],
)
def test_a_missing_package_is_reported_with_its_extra(monkeypatch, capsys, command, package, said):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "m"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"vllm-l2kv {command.split()[0]}: error: {said}")


def test_a_report_needs_no_engine(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("vllm", "lm_eval") else object())
    with pytest.raises(SystemExit):
        main(["eval", "report", "none.jsonl", "--out", "none"])
    assert "argument ROWS" in capsys.readouterr().err
