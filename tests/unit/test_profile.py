"""Files of profiles: writing, reading, refusals; fingerprints; the ratio for a memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weights import judged

from vllm_l2kv.profile import (
    METADATA_KEY,
    VERSION,
    WORTH_HEADS,
    Profile,
    Rope,
    Shape,
    Target,
    check_model,
    fingerprint,
    local_folder,
    ratio_for,
    setting_of,
)

TYPES = ("sliding_attention", "full_attention") * 5
TARGETS = (Target(0.5, (1, 3), 0.166667, "l2"), Target(0.25, (3,), 0.0625, "learned"))
MADE = Profile(
    model="some/model",
    fingerprint="0123456789abcdef" * 6,
    shape=Shape(10, 2, 64, TYPES),
    rope=Rope(64, interleaved=False, slow_pairs=8),
    layer_order=(3, 1, 9, 5, 7),
    memory=TARGETS,
    about={"texts": ["prose"], "seconds": 1.5},
)
HEADS_MADE = replace(
    MADE,
    memory=(
        Target(0.5, (), 0.285714, "learned", {3: (0, 1), 9: (1,)}),
        *TARGETS,
        Target(0.25, (), 0.166667, "l2", {7: (0,)}),
    ),
)
BY_SCORER = replace(
    MADE,
    memory=(
        *TARGETS,
        Target(0.5, (), 0.285714, "learned", {3: (0, 1), 9: (1,)}),
        Target(0.5, (5, 7), 0.166667, "learned"),
        Target(0.5, (), 0.375, "l2", {5: (0, 1)}),
        Target(0.5, (9,), 0.375, "keydiff_value"),
    ),
)
"""Settings of other scorers follow the recommended ones; at 0.25 there is none."""
TENSORS = {
    "retrieval": torch.rand(10, 2),
    "learned.w1": torch.rand(10, 2, 6, 64).bfloat16(),
    "learned.b": torch.rand(10, 2),
}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "profile.safetensors"
    MADE.write(path, TENSORS)
    return path


def test_what_was_written_is_read(path):
    read = Profile.read(path)
    assert read == replace(
        MADE, path=path, tensors={"retrieval": (10, 2), "learned.w1": (10, 2, 6, 64), "learned.b": (10, 2)}
    )
    assert [target.memory for target in read.memory] == [0.25, 0.5]
    assert set(read.weights()) == {"w1", "b"}
    assert torch.equal(read.weights()["w1"], TENSORS["learned.w1"])
    assert torch.equal(read.measures()["retrieval"], TENSORS["retrieval"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_metadata_is_read_without_torch(path):
    code = (
        "import sys; from vllm_l2kv.profile import Profile; Profile.read(sys.argv[1]).setting(0.5); "
        "print([m for m in ('torch', 'safetensors', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_weights_there_is_no_learned_scorer(tmp_path):
    written = MADE.write(tmp_path / "p", {"retrieval": TENSORS["retrieval"]})
    with pytest.raises(ValueError, match="no weights of the scorer learned"):
        written.weights()


class TestSettings:
    @pytest.mark.parametrize(
        ("memory", "full_layers", "scorer"),
        [
            (1, (1, 3), "l2"),
            (0.5, (1, 3), "l2"),
            (0.49, (3,), "learned"),
            (0.25, (3,), "learned"),
            (0.22, (3,), "learned"),
        ],
    )
    def test_the_next_memory_below_gives_layers_and_the_whole_cache_costs_what_was_asked(
        self, memory, full_layers, scorer
    ):
        setting = MADE.setting(memory)
        assert (setting.full_layers, setting.scorer) == (full_layers, scorer)
        num_full = len(full_layers)
        assert (num_full + (5 - num_full) * setting.keep_ratio) / 5 == pytest.approx(memory, abs=1e-6)

    def test_a_rounded_memory_counts_as_listed(self):
        assert MADE.setting(0.1 + 0.4 - 1e-12).full_layers == (1, 3)

    @pytest.mark.parametrize("memory", [0, -1, 1.01, float("nan")])
    def test_a_memory_out_of_bounds(self, memory):
        with pytest.raises(ValueError, match=r"memory must be in \(0, 1\], got"):
            MADE.setting(memory)

    @pytest.mark.parametrize("memory", [0.2, 0.1])
    def test_full_layers_that_cost_more(self, memory):
        with pytest.raises(ValueError, match=r"memory must be more than 0\.200, which the 1 full layers"):
            MADE.setting(memory)

    def test_given_layers_replace_the_listed_ones(self):
        """Layer 2 has a window, so it costs nothing."""
        assert MADE.setting(0.6, (1, 2)) == ((1, 2), 0.5, "l2", {}, "token")
        assert MADE.setting(0.25, ()) == ((), 0.25, "learned", {}, "token")
        with pytest.raises(ValueError, match=r"memory must be more than 0\.600, which the 3 full layers cost, got 0.5"):
            MADE.setting(0.5, (1, 3, 5))
        with pytest.raises(ValueError, match="must not name every layer of full attention"):
            MADE.setting(0.5, (1, 3, 5, 7, 9))

    def test_what_commands_read(self, path):
        assert setting_of(path, None) == MADE.setting(0.5)
        assert setting_of(path, 0.25) == MADE.setting(0.25)
        assert setting_of(path, 0.25, (), has_ratio=False) == MADE.setting(0.25, ())
        assert setting_of(path, 0.25, None, has_ratio=True) == MADE.setting(0.25)
        assert setting_of(path, None, (1, 3, 5), has_ratio=True) is None
        assert setting_of(None, None, (1, 3), has_ratio=False) is None

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ((None, 0.5), r"memory \(--kv-memory\) needs a profile; give its file too"),
            ((None, None, None, False, None, "heads"), r"classes \(--kv-classes\) needs a profile"),
            (("PATH", 0.5, (1,), True), "leave one of the three out"),
            (("nothing.here", 0.5), "cannot read the profile nothing.here: No such file or directory"),
        ],
    )
    def test_what_commands_refuse(self, path, asked, message):
        with pytest.raises(ValueError, match=message):
            setting_of(*(path if word == "PATH" else word for word in asked))

    def test_heads_cost_their_share_of_the_whole_cache(self):
        """Three of ten heads; layer 2 has a window, and layers have two heads."""
        assert HEADS_MADE.setting(0.5, classes="heads") == ((), 0.285714, "learned", {3: (0, 1), 9: (1,)}, "token")
        assert HEADS_MADE.setting(0.9, classes="heads").keep_ratio == pytest.approx((9 - 3) / 7, abs=1e-6)
        assert HEADS_MADE.setting(0.5) == MADE.setting(0.5)
        assert HEADS_MADE.setting(0.49, classes="heads").full_heads == {7: (0,)}

    def test_given_heads_are_full_beside_the_listed_layers(self):
        setting = MADE.setting(0.6, full_heads={5: (0,), 2: (0, 1)})
        assert setting == ((1, 3), 0.2, "l2", {5: (0,), 2: (0, 1)}, "token")

    def test_heads_that_are_not_there_or_cost_more(self):
        with pytest.raises(ValueError, match="has no settings with full heads; make it again"):
            MADE.setting(0.5, classes="heads")
        with pytest.raises(ValueError, match=r"more than 0\.100, which the 1 full heads of the smallest setting"):
            HEADS_MADE.setting(0.1, classes="heads")
        with pytest.raises(ValueError, match="must not name every layer of full attention"):
            MADE.setting(0.5, (1, 3, 5, 7), {9: (0, 1)})

    def test_commands_read_heads(self, tmp_path):
        path = tmp_path / "heads"
        HEADS_MADE.write(path, TENSORS)
        assert Profile.read(path).memory == HEADS_MADE.memory
        assert setting_of(path, 0.25, classes="heads") == HEADS_MADE.setting(0.25, classes="heads")
        assert setting_of(path, 0.5) == setting_of(path, 0.5, classes="layers") == MADE.setting(0.5)
        assert setting_of(path, 0.9, full_heads={5: (1,)}).full_layers == (1, 3)
        for given in ({"full_layers": (1,)}, {"full_heads": {5: (0,)}}):
            with pytest.raises(ValueError, match="are set by the profile with --kv-classes heads; leave them out"):
                setting_of(path, 0.5, classes="heads", **given)

    def test_none_listed(self):
        with pytest.raises(ValueError, match="has no settings"):
            replace(MADE, memory=()).setting(0.5)

    def test_the_demo_model_at_half(self):
        """14 of 30 layers full and a ratio of 0.0625 for the others make half of the cache."""
        assert ratio_for(0.5, 30, 14) == 0.0625

    def test_nothing_left_to_compress(self):
        assert ratio_for(0.5, 2, 2) == 0


class TestScorers:
    """Settings of other scorers than the recommended one."""

    def test_the_best_setting_of_a_scorer(self):
        assert BY_SCORER.setting(0.5, classes="layers", scorer="learned") == ((5, 7), 0.166667, "learned", {}, "token")
        assert BY_SCORER.setting(0.5, classes="layers", scorer="keydiff_value").full_layers == (9,)
        assert BY_SCORER.setting(0.5, classes="heads", scorer="l2").full_heads == {5: (0, 1)}
        assert BY_SCORER.setting(0.6, classes="layers", scorer="learned") == ((5, 7), 0.333333, "learned", {}, "token")
        assert BY_SCORER.setting(0.5, (1, 3), scorer="learned") == ((1, 3), 0.166667, "learned", {}, "token")

    @pytest.mark.parametrize("scorer", [None, "l1", "random"])
    def test_the_recommended_one_without_a_scorer_or_with_another(self, scorer):
        for memory in (0.25, 0.4, 0.5, 0.9):
            assert BY_SCORER.setting(memory, classes="layers", scorer=scorer) == MADE.setting(memory)
        heads = BY_SCORER.setting(0.5, classes="heads", scorer=scorer)
        assert heads == HEADS_MADE.setting(0.5, classes="heads")

    def test_the_memory_matters_more(self):
        """At 0.25 only `learned` has a setting, which has fewer full layers than that of l2 at 0.5."""
        assert BY_SCORER.setting(0.4, classes="layers", scorer="l2") == MADE.setting(0.4)

    def test_the_recommended_ones(self, path):
        BY_SCORER.write(path, TENSORS)
        read = Profile.read(path)
        assert read.memory == BY_SCORER.memory
        assert read.recommended == (TARGETS[1], TARGETS[0], BY_SCORER.memory[4])
        assert setting_of(path, 0.5, classes="layers", scorer="learned").full_layers == (5, 7)

    def test_older_files_have_recommended_ones_only(self, path):
        """Whatever the scorer, they give what they gave."""
        assert Profile.read(path).recommended == MADE.memory
        for memory in (0.25, 0.5):
            assert setting_of(path, memory, scorer="keydiff_value") == MADE.setting(memory)

    def test_a_granularity_is_kept(self, path):
        replace(MADE, memory=(TARGETS[1]._replace(granularity="neighbors"),)).write(path, TENSORS)
        assert setting_of(path, 0.25).granularity == "neighbors"

    def test_older_files_rank_by_neighbors_with_learned_alone(self, path):
        with safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()[METADATA_KEY])
        for target in fields["memory"]:
            del target["granularity"]
        save_file(load_file(path), path, {METADATA_KEY: json.dumps(fields)})
        assert [each.ranking for each in Profile.read(path).memory] == [("learned", "neighbors"), ("l2", "token")]

    def test_a_granularity_goes_with_its_scorer(self):
        setting = MADE.setting(0.25)._replace(granularity="neighbors")
        ranking = {"scorer": "learned", "granularity": "neighbors"}
        assert setting.ranking(None) == setting.ranking("learned") == ranking
        assert setting.ranking("l2") == {}

    def test_classes_are_judged_with_the_scorer(self):
        outcomes = [
            ("recommended", 0.7),
            ("recommended heads", 0.8),
            ("best with l2", 0.7),
            ("best heads with l2", 0.6),
        ]
        rows = [{"name": name, "memory": 0.5, "exact": (share, share)} for name, share in outcomes]
        profile = replace(BY_SCORER, about={"search": {"outcomes": rows}})
        chosen = {scorer: profile.default_classes(0.5, 1, scorer) for scorer in (None, "l1", "l2", "learned")}
        # What was not judged counts as the recommended setting.
        assert chosen == {None: "heads", "l1": "heads", "l2": "layers", "learned": "heads"}
        assert profile.setting(0.5, scorer="l2") == MADE.setting(0.5)
        rows += [{"name": "best with learned", "memory": 0.5, "exact": (0.9, 0.9)}]
        assert profile.setting(0.5, scorer="learned").full_layers == (5, 7)
        assert profile.setting(0.5).full_heads


class TestDefaultClasses:
    """Heads or layers, if nothing says which."""

    def judged(self, **exact: tuple[float, float]) -> Profile:
        """`HEADS_MADE`, with shares of exact answers by classes and memory in percent, such as `heads_50`."""
        outcomes = [
            (target, exact[name])
            for target in HEADS_MADE.memory
            if (name := f"{target.classes}_{target.memory:.0%}".rstrip("%")) in exact
        ]
        assert len(outcomes) == len(exact)
        return replace(HEADS_MADE, about=judged(outcomes))

    def test_the_better_judged_at_each_memory(self):
        profile = self.judged(layers_50=(0.8, 0.9), heads_50=(0.8, 0.8), layers_25=(0.5, 0.6), heads_25=(0.7, 0.8))
        chosen = {memory: profile.default_classes(memory, 1) for memory in (1, 0.5, 0.49, 0.25, 0.22)}
        assert chosen == {1: "layers", 0.5: "layers", 0.49: "heads", 0.25: "heads", 0.22: "heads"}
        assert profile.setting(0.5) == MADE.setting(0.5)
        assert profile.setting(0.25) == ((), 0.166667, "l2", {7: (0,)}, "token")

    @pytest.mark.parametrize(
        ("heads", "classes"),
        [
            ((0.5, 0.5 + 2 * WORTH_HEADS), "layers"),
            ((0.5, 0.51 + 2 * WORTH_HEADS), "heads"),
            ((0.4, 0.7), "heads"),
            ((0.7, 0.3), "layers"),
        ],
    )
    def test_layers_unless_heads_are_worth_their_time(self, heads, classes):
        """Hidden and seen questions count alike."""
        assert self.judged(layers_50=(0.5, 0.5), heads_50=heads).default_classes(0.5, 1) == classes

    def test_what_is_given_wins(self):
        profile = self.judged(layers_50=(0.1, 0.1), heads_50=(0.9, 0.9))
        assert profile.setting(0.5).full_heads
        assert profile.setting(0.5, classes="layers") == MADE.setting(0.5)
        assert profile.setting(0.5, (1, 3)) == MADE.setting(0.5)
        assert profile.setting(0.9, full_heads={5: (1,)}) == MADE.setting(0.9, full_heads={5: (1,)})

    def test_ranks_share_heads_or_layers_are_full(self):
        """At 0.5 head 1 of layer 9 would be on one rank alone; with one head for each, only whole layers can be."""
        profile = self.judged(layers_50=(0.1, 0.1), heads_50=(0.9, 0.9))
        assert [profile.default_classes(0.5, num_ranks) for num_ranks in (1, 2, 4)] == ["heads", "layers", "layers"]
        assert profile.setting(0.5, num_ranks=2) == MADE.setting(0.5)
        even = Target(0.5, (), 0.375, "l2", {3: (0, 1)})
        evenly = replace(MADE, memory=(*TARGETS, even), about=judged([(TARGETS[0], (0, 0)), (even, (1, 1))]))
        assert evenly.setting(0.5, num_ranks=2).full_heads == {3: (0, 1)}

    def test_heads_that_cost_more_than_the_memory(self):
        """The lowest setting of heads costs 0.3; that of layers, 0.2, is left."""
        heads = Target(0.35, (), 0.071429, "l2", {3: (0, 1), 9: (1,)})
        about = judged([(TARGETS[1], (0, 0)), (heads, (1, 1))])
        profile = replace(MADE, memory=(*TARGETS, heads), about=about)
        assert profile.default_classes(0.31, 1) == "heads"
        assert profile.setting(0.3) == MADE.setting(0.3)

    @pytest.mark.parametrize(
        "profile",
        [
            HEADS_MADE,
            replace(HEADS_MADE, about={"search": {"outcomes": []}}),
            replace(MADE, about=judged((target, (0.0, 0.0)) for target in TARGETS)),
        ],
        ids=["no search", "no outcomes", "no heads"],
    )
    def test_what_was_not_judged(self, profile):
        assert profile.setting(0.5) == MADE.setting(0.5)

    def test_a_file_holds_what_was_judged(self, tmp_path):
        path = tmp_path / "judged"
        profile = self.judged(layers_50=(0.8, 0.8), heads_50=(0.9, 0.9))
        profile.write(path, TENSORS)
        assert setting_of(path, None) == profile.setting(0.5, classes="heads")
        assert setting_of(path, None, num_ranks=2) == setting_of(path, None, classes="layers") == MADE.setting(0.5)

    def test_the_profiles_of_configs(self):
        folder = Path(__file__).parents[2] / "configs"
        smollm2, gemma = (
            Profile.read(folder / f"{name}.profile.safetensors") for name in ("smollm2-135m", "gemma-3-270m")
        )
        chosen = {memory: smollm2.default_classes(memory, 1) for memory in (0.75, 0.5, 0.35, 0.25, 0.15)}
        assert chosen.pop(0.75) == "layers"
        assert set(chosen.values()) == {"heads"}
        assert {gemma.default_classes(memory, 1) for memory in (0.75, 0.5, 0.25)} == {"layers"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_order": (3, 1, 9, 5)}, "layer_order must name each compressible layer once"),
        ({"layer_order": (3, 1, 9, 5, 0)}, "layer_order must name each compressible layer once"),
        ({"fingerprint": "0123"}, "fingerprint has the wrong length"),
        ({"shape": Shape(9, 2, 64, TYPES)}, "layer_types must have one of each layer"),
        ({"shape": Shape(2, 2, 64, ("sliding_attention",) * 2)}, "no layer has full attention"),
        ({"rope": Rope(65, interleaved=False)}, "rotary_dim must be in"),
        ({"rope": Rope(64, False, slow_pairs=33)}, "slow_pairs must be in"),
        ({"memory": (Target(0.5, (0,), 0.5, "l2"),)}, "full_layers of memory 0.5 must be some"),
        ({"memory": (Target(0.5, (1, 3, 5, 7, 9), 0.5, "l2"),)}, "full_layers of memory 0.5 must be some"),
        ({"memory": (Target(0.5, (), 0.5, "l2", {0: (1,)}),)}, "full_heads of memory 0.5 must be of layers of full"),
        ({"memory": (Target(0.5, (), 0.5, "l2", {1: (2,)}),)}, "full_heads of memory 0.5 must be .* less than 2"),
        (
            {"memory": (Target(0.5, (1, 3), 0.5, "l2", dict.fromkeys((5, 7, 9), (0, 1))),)},
            "full_heads of memory 0.5 must leave a head",
        ),
        ({"memory": (Target(0.5, (), 0.0, "l2"),)}, "keep_ratio must be in"),
        ({"memory": (Target(1.5, (), 0.5, "l2"),)}, "memory must be in"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MADE, **changes)


class TestRefusedFiles:
    def refused(self, path: Path) -> str:
        with pytest.raises(ValueError, match=r"\.$") as refusal:
            Profile.read(path)
        return str(refusal.value).replace(str(path), "FILE")

    def rewritten(self, path: Path, metadata: object) -> str:
        save_file({"x": torch.zeros(1)}, path, {METADATA_KEY: json.dumps(metadata)})
        return self.refused(path)

    @pytest.mark.parametrize("content", [b"", b"not a profile at all", b"\xff" * 32, b"\x02\0\0\0\0\0\0\0[]"])
    def test_something_else(self, tmp_path, content):
        (tmp_path / "x").write_bytes(content)
        assert self.refused(tmp_path / "x") == "FILE is not a safetensors file."

    def test_weights_of_a_model(self, tmp_path):
        save_file({"x": torch.zeros(1)}, tmp_path / "x")
        assert self.refused(tmp_path / "x").startswith("FILE is not a profile of vllm-l2kv; make one with")

    def test_another_version(self, path):
        assert self.rewritten(path, {"version": 1}).startswith(f"FILE must be a profile of version {VERSION}, got")

    @pytest.mark.parametrize("size", [1, 1000])
    def test_a_file_whose_end_is_missing(self, path, size):
        path.write_bytes(path.read_bytes()[:-size])
        assert self.refused(path) == "FILE is damaged: its end is missing."

    def test_a_missing_field(self, path):
        assert self.rewritten(path, {"version": VERSION}) == "FILE is damaged: it has no model."

    def test_bad_fields(self, path):
        assert self.rewritten(path, []) == "FILE is damaged: expected an object, got list."
        fields = {"model": "m", "fingerprint": "", "shape": {"num_layers": 1, "layer_types": ["x"]}}
        assert "missing 2 required" in self.rewritten(path, {"version": VERSION} | fields)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Profile.read(tmp_path / "nowhere")


CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "rope_theta": 1e4, "torch_dtype": "float32"}


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(40, 40, generator=generator) for name in "abc"}
    save_file(weights, folder / "model.safetensors")
    return folder


def shards(model: Path) -> None:
    """The same weights in two files, and a third file that the index does not name."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file({"c": weights["c"], "a": weights["a"]}, model / "1.safetensors")
    save_file({"b": weights["b"]}, model / "2.safetensors")
    save_file({"b": weights["b"] + 1}, model / "consolidated.safetensors")
    places = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def configure(model: Path, **changes: object) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | changes))


def change_weight(at: int):
    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        weights["b"].view(-1)[at] += 1
        save_file(weights, model / "model.safetensors")

    return change


def rename(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({"a": weights["a"], "b": weights["b"], "d": weights["c"]}, model / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        shards,
        lambda model: configure(model, torch_dtype="bfloat16"),
        lambda model: (model / "config.json").write_text(json.dumps({"text_config": CONFIG})),
    ],
    ids=["shards", "dtype", "nested"],
)
def test_the_same_model_in_another_form(model, change):
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda model: configure(model, num_hidden_layers=3), "shape of"),
        (lambda model: configure(model, rope_theta=5e5), "RoPE of"),
        (change_weight(0), "weights of"),
        (change_weight(800), "weights of"),
        (change_weight(-1), "weights of"),
        (rename, "weights of"),
        (lambda model: (change_weight(0)(model), configure(model, head_dim=3)), "shape and weights of"),
    ],
)
def test_another_model_is_refused_and_the_difference_named(model, tmp_path, change, part):
    profile = replace(MADE, fingerprint=fingerprint(model), path=tmp_path / "p")
    check_model(profile, model)
    change(model)
    with pytest.raises(ValueError, match=f"was made for another model, some/model: {part} {model} differ"):
        check_model(profile, model)


def test_a_model_without_safetensors(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights in safetensors"):
        fingerprint(model)


def test_where_a_model_is(model):
    assert local_folder(str(model)) == model
    with pytest.raises(ValueError, match="The files of no/such-model are not on this machine"):
        local_folder("no/such-model")
