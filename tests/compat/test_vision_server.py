"""The image example of docs/compatibility.md, on a real server with a tiny vision-language model."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from http_server import Server, expected_usage
from usages import TINY_SHARE

pytestmark = pytest.mark.slow  # a server
pytest.importorskip("torchvision")

from tiny_vision import QWEN_IMAGE, VisionReference, picture, write  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
NAME = "Qwen/Qwen2.5-VL-7B-Instruct"
PARTS = "{% for part in message.content %}{{ part.text if part.type == 'text' else IMAGE }}{% endfor %}"
TEMPLATE = "{% for message in messages %}USER " + PARTS.replace("IMAGE", repr(QWEN_IMAGE)) + "{% endfor %} ANSWER"


@pytest.fixture(scope="module")
def model(demo_model, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("vision") / "model", "qwen2.5-vl", demo_model, TEMPLATE)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    words = f"--served-model-name {NAME} --dtype float32 --enforce-eager --max-model-len 2048 --kv-full-layers 0"
    with Server(log, str(model), *words.split(), "--skip-mm-profiling") as server:
        yield server


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_example(server, model, tmp_path):
    (command,) = re.findall(r"```bash\n(curl (?:(?!```).)*image_url.*?)```", PAGE.read_text(), re.DOTALL)
    chart = picture(3, 532, 560)
    chart.save(tmp_path / "chart.png")
    command = command.replace("localhost:8000", f"127.0.0.1:{server.port}")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    answer = json.loads(done.stdout)
    reference = VisionReference(model)
    prompt = reference.see(f"USER {QWEN_IMAGE}Which year was the best one? ANSWER", [chart])
    assert prompt.count(reference.model.config.image_token_id) == 19 * 20
    num_tokens = answer["usage"]["completion_tokens"]
    usage = expected_usage(len(prompt), num_tokens, full_share=TINY_SHARE, keep_ratio=0.5, protect_first=300)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["kv_cache"] == usage
    assert usage["kept_tokens"] == 300 + num_tokens - 1
    expected = reference.generate(prompt, num_tokens, ratio="0.5", first=300, full_layers=(0,))
    text = reference.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text
