"""Norms of images in a tiny vision-language model with random weights, against plain loops."""

import re
import statistics

import pytest
import torch
from PIL import Image
from tiny_vision import FAMILIES, write

from vllm_l2kv.cli import main
from vllm_l2kv.profile import Profile
from vllm_l2kv.tools.profile.images import image_norms, processor_of
from vllm_l2kv.tools.profile.model import layout, load
from vllm_l2kv.tools.profile.pictures import drawn, of_folder
from vllm_l2kv.tools.progress import Progress

PARTS = "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
TEMPLATE = "{% for message in messages %}USER: " + PARTS + "{% endfor %}"
WORDS = list(range(1000, 1007))


@pytest.fixture(scope="module")
def llava(demo_model, tmp_path_factory):
    return write(tmp_path_factory.mktemp("llava") / "model", "llava", demo_model, TEMPLATE)


@pytest.fixture(scope="module")
def model(llava):
    return load(str(llava), "cpu")


def by_loops(model, prompt):
    """Returns for each layer and head: means, spreads, the image's share of rows in the half with the lowest norms."""
    cache = model(**prompt, use_cache=True).past_key_values
    ids = prompt["input_ids"][0].tolist()
    found = []
    for layer in cache.layers:
        for head in layer.keys[0]:
            norms = [row.norm().item() for row in head]
            image = [norm for norm, token in zip(norms, ids, strict=True) if token == model.config.image_token_id]
            text = [
                norm
                for place, (norm, token) in enumerate(zip(norms, ids, strict=True))
                if token != model.config.image_token_id and place >= 4
            ]
            half = sorted(range(len(ids)), key=lambda place, norms=norms: (norms[place], place))[: -(-len(ids) // 2)]
            kept = sum(ids[place] == model.config.image_token_id for place in half) / len(image)
            spreads = (statistics.pstdev(each) / statistics.mean(each) for each in (image, text))
            found.append([statistics.mean(image), statistics.mean(text), *spreads, kept])
    return torch.tensor(found).view(len(cache.layers), -1, 5)


@torch.inference_mode()
def test_norms(model, llava):
    shape, _ = layout(model)
    picture = drawn()[0]
    processor = processor_of(model, str(llava))
    found, num_tokens = image_norms(model, processor, shape, [picture], WORDS, Progress())
    assert num_tokens == 16
    places = [WORDS[place % 7] for place in range(16, 32)]
    before, after = (processor.tokenizer.decode(half) for half in (places[:8], places[8:]))
    prompt = processor(images=picture, text=f"USER: {before}<image>{after}", return_tensors="pt")
    expected = by_loops(model, prompt)
    names = ("image_norm", "text_norm", "image_variation", "text_variation", "kept")
    torch.testing.assert_close(torch.stack([found[name] for name in names], -1), expected)
    assert not torch.equal(found["image_norm"], found["text_norm"])


def test_layers_with_a_window_are_left_out(demo_model, tmp_path):
    image = FAMILIES["gemma3"].image
    folder = write(tmp_path / "model", "gemma3", demo_model, TEMPLATE.replace("<image>", image))
    model = load(str(folder), "cpu")
    shape, _ = layout(model)
    processor = processor_of(model, str(folder))
    found, num_tokens = image_norms(model, processor, shape, drawn()[:2], WORDS, Progress())
    assert num_tokens == 32
    for values in found.values():
        assert values.isnan().any(-1).nonzero().flatten().tolist() == [0, 1, 3, 4]


def test_pictures_are_reproducible(tmp_path):
    first, second = drawn(), drawn()
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in second]
    assert len({picture.tobytes() for picture in first}) == 4
    Image.new("L", (3, 2)).save(tmp_path / "b.png")
    first[0].save(tmp_path / "A.JPG")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [(picture.size, picture.mode) for picture in of_folder(tmp_path)] == [((448, 448), "RGB"), ((3, 2), "RGB")]


def profile(model, path, *words):
    main(["profile", str(model), "-o", str(path), "--samples", "4", "--tokens", "160", "--questions", "3", *words])


def test_the_command(llava, tmp_path):
    path = tmp_path / "p.safetensors"
    profile(llava, path, "--images", "drawn", "--device", "cpu")
    made = Profile.read(path)
    assert (made.about["pictures"], made.about["image_tokens"]) == (4, 64)
    images = made.measures("images.")
    assert set(images) == {"image_norm", "text_norm", "image_variation", "text_variation", "kept"}
    assert all(values.shape == (4, 2) for values in images.values())
    report = (tmp_path / "p-report" / "report.html").read_text()
    assert "<h2>Norms of images</h2>" in report
    assert "4 pictures, 64 tokens, each in the middle of as many tokens of text." in report
    assert "nan" not in re.sub('data:image/png;base64,[^"]*', "", report)


def test_a_model_without_chats(model, demo_model, tmp_path):
    write(tmp_path / "model", "llava", demo_model)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        processor_of(model, str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nowhere", "No such file or directory: 'nowhere'"),
        (".", "argument --images: . must have a file that ends in .jpeg, .jpg, .png, .webp."),
        ("drawn", "argument --images: LlamaForCausalLM does not take images; leave the option out."),
    ],
)
def test_what_is_refused(llama, tmp_path, monkeypatch, capsys, where, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        profile(llama, tmp_path / "p" / "p", "--images", where, "--device", "cpu")
    assert said in capsys.readouterr().err.splitlines()[-1]
