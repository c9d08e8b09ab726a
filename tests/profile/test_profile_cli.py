"""The command on tiny models: file, report, terminal, refusals."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from vllm_l2kv.cli import main
from vllm_l2kv.profile import Profile, check_model
from vllm_l2kv.scorers.learned import HIDDEN, num_features
from vllm_l2kv.tools.profile.recommend import SCORERS

FEW = ("--samples", "4", "--tokens", "160", "--questions", "3")


def run(model: Path, path: Path, device: str = "cpu") -> tuple[str, Profile]:
    """Returns the output on the terminal, and the file."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        main(["profile", str(model), "-o", str(path), *FEW, "--device", device])
    return shown.getvalue(), Profile.read(path)


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory) -> tuple[str, Profile]:
    return run(llama, tmp_path_factory.mktemp("profile") / "new" / "tiny.safetensors")


def test_a_profile_is_made(made, llama):
    shown, profile = made
    check_model(profile, llama)
    assert profile.shape.layer_types == ("full_attention",) * 4
    assert (profile.rope.rotary_dim, profile.rope.interleaved) == (32, False)
    assert sorted(profile.layer_order) == [0, 1, 2, 3]
    for memory in (0.75, 0.5):
        for classes in ("layers", "heads"):
            full_layers, keep_ratio, _, full_heads, _ = profile.setting(memory, classes=classes)
            num_full = profile.shape.num_full(full_layers, full_heads)
            assert (num_full + (8 - num_full) * keep_ratio) / 8 == pytest.approx(memory)
            assert bool(full_heads) == (classes == "heads")
    by_scorer = {scorer: profile.setting(0.5, classes="layers", scorer=scorer).scorer for scorer in SCORERS}
    assert by_scorer == {scorer: scorer for scorer in SCORERS}
    measures = profile.measures()
    assert measures["retrieval"].shape == measures["repetition"].shape == measures["head_loss"].shape == (4, 2)
    assert measures["loss"].shape == (4,)
    assert profile.weights()["w1"].shape == (4, 2, num_features(32, 32, profile.rope), HIDDEN)
    assert profile.about["learned"]["overlap"]["0.5"] > 0.5
    search = profile.about["search"]
    assert search["questions"] == {"facts_in_prose": 1, "facts_in_noise": 1, "facts": 1}
    assert search["judged_by"] == {"facts_in_prose": 1, "facts_in_noise": 1}
    assert all(set(outcome["exact_by_kind"]) == set(search["judged_by"]) for outcome in search["outcomes"])
    assert not any(tensor.isnan().any() for tensor in measures.values())
    assert shown.rstrip().splitlines()[-3] == f"  vllm-l2kv serve {llama} --kv-profile {profile.path} --kv-memory 0.5"
    assert "Layers and heads were measured with 4 questions about facts; the model answers 0 exactly" in shown
    assert "Settings were searched with 3 other questions, and judged with 2 more." in shown
    assert len(re.findall(r"(?m)^ *0\.\d+ +0\.\d{3} ", shown)) == len(profile.recommended) < len(profile.memory)
    assert "share of exact answers to 2 questions that the search did not use" in shown
    (doubts,) = [line for line in shown.splitlines() if line.startswith("Warning: ")]
    assert doubts.startswith("Warning: 3 questions for the search and 2 to judge are few: ")
    assert "The model answers only 0.00 of the questions with its whole cache" in doubts
    report = Path(re.search(r"Report: (.*)", shown)[1])
    assert report == profile.path.parent / "tiny-report" / "report.html"
    text = report.read_text()
    assert f"<p>{doubts}" in text
    assert text.count("<img ") == text.count("<figcaption>") == 10
    for heading in (
        "Settings",
        "What was compared",
        "What fails",
        "What answers need",
        "Norms and attention",
        "How it was made",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "nan" not in re.sub('data:image/png;base64,[^"]*', "", text)
    assert str(llama) not in str(profile.about)


def test_of_layers_without_keys_nothing_is_measured(tiny_model, tmp_path):
    """Nemotron-H: Mamba 2 and feed-forward layers, and three attention layers without rotary embeddings."""
    model = tiny_model("nemotron_h")
    shown, profile = run(model, tmp_path / "hybrid.safetensors")
    check_model(profile, model)
    assert profile.shape.compressible == (3, 6, 9)
    assert sorted(profile.layer_order) == [3, 6, 9]
    for classes in ("layers", "heads"):
        full_layers, keep_ratio, _, full_heads, _ = profile.setting(0.75, classes=classes)
        num_full = profile.shape.num_full(full_layers, full_heads)
        assert (num_full + (6 - num_full) * keep_ratio) / 6 == pytest.approx(0.75)
        assert {*full_layers, *full_heads} <= {3, 6, 9}
    for name in ("retrieval", "repetition", "head_loss"):
        measured = profile.measures()[name].isfinite().all(-1).nonzero().flatten().tolist()
        assert measured == [3, 6, 9], name
    assert profile.weights()["w1"].shape == (10, 2, num_features(32, 32, profile.rope), HIDDEN)
    text = Path(re.search(r"Report: (.*)", shown)[1]).read_text()
    assert "nan" not in re.sub('data:image/png;base64,[^"]*', "", text)


def test_it_is_reproducible(made, llama, tmp_path):
    """Also if accelerate places the model, which changes nothing without a GPU."""
    device = "cpu" if torch.cuda.is_available() else "auto"
    first, (_, second) = made[1], run(llama, tmp_path / "again", device)
    assert second.about["dtype"] == "float32"
    assert second.layer_order == first.layer_order
    assert second.memory == first.memory
    once, again = first.measures(), second.measures()
    assert [name for name in once if not torch.equal(again[name], once[name])] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "100"), "num_tokens must be at least 128, got 100."),
        (("--tokens", "2000"), "tokens must be at most 1984 for this model, whose context is 4096, since"),
        (("--samples", "0"), "argument --samples"),
        (("-o", "."), "argument -o: . is a folder; give a file."),
        (("--text", "nowhere.txt"), "No such file or directory: 'nowhere.txt'"),
        (
            ("--tensor-parallel-size", "3"),
            "--tensor-parallel-size must be a divisor or a multiple of the model's 2 KV heads, got 3.",
        ),
        (("--device", "abacus"), "device must be cpu, cuda, cuda:N or auto, got abacus."),
        (("--device", "cuda:99"), "GPUs or cpu, got cuda:99."),
    ],
)
def test_what_is_refused(llama, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["profile", str(llama), "-o", str(tmp_path / "p"), *FEW, *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_its_parts_are_named_before_the_wait(llama, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main(["profile", str(llama), "-o", str(tmp_path / "p"), "--device", "abacus"])
    shown = capfd.readouterr().err
    assert "2. training the scorer learned; no option shortens it\n" in shown
    assert shown.index("Parts of this run") < shown.index("loading")
