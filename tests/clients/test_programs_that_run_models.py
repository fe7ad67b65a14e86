"""Programs that evaluate, serve or run a frozen model compute what it computes itself. Run: `make test-clients`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from frozen import IDS, TEXTS, WITHOUT_PACKAGE, run, save_frozen, words
from torch.testing import assert_close

from helpers.trainers import tiny_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model, tokenizer = save_frozen(tmp_path_factory.mktemp("frozen")), tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model.folder)
    return model


TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.parametrize("where", ["with the package", "without it"])
def test_lm_eval(source, tmp_path, where):
    pytest.importorskip("lm_eval")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    (tmp_path / "words.yaml").write_text(TASK % rows)
    start = "import modeling_stablemoe; " if where == "with the package" else WITHOUT_PACKAGE
    code = start + "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    model = f"pretrained={source.folder},trust_remote_code={where == 'without it'},dtype=float32"
    options = ["--model", "hf", "--model_args", model, "--tasks", "words", "--include_path", tmp_path]
    run(code, "run", *options, "--device", "cpu", "--output_path", tmp_path / "results", cwd=tmp_path)
    (results,) = (tmp_path / "results").rglob("results*.json")
    bits_per_byte = json.loads(results.read_text())["results"]["words"]["bits_per_byte,none"]

    bits = 0.0
    for row in TEXTS:
        ids = torch.tensor([[0, *tiny_tokenizer()(row["text"])["input_ids"]]])
        with torch.no_grad():
            scores = source(ids).logits.log_softmax(-1)
        bits -= scores[0, :-1].gather(-1, ids[0, 1:, None]).sum().item() / torch.log(torch.tensor(2.0)).item()
    assert_close(bits_per_byte, bits / sum(len(row["text"]) for row in TEXTS), rtol=1e-4, atol=0)


SERVE = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(params=["with the package", "without it"])
def server(request, source, tmp_path):
    """The address of `transformers serve` on the model."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    port = free_port()
    is_package = request.param == "with the package"
    code = ("import modeling_stablemoe; " if is_package else WITHOUT_PACKAGE) + SERVE
    command = [sys.executable, "-c", code, "serve", str(source.folder), "--port", str(port), "--device", "cpu"]
    command += [] if is_package else ["--trust-remote-code"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    url = f"http://127.0.0.1:{port}"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until_healthy(url, process, tmp_path / "log")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(url: str, process: subprocess.Popen, log, seconds: int = 240):
    for _ in range(seconds):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:  # it is starting
            time.sleep(1)
    pytest.fail(log.read_text())


def ask(server, kind: str, **body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/{kind}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=240) as answer:
        return json.load(answer)["choices"][0]


def test_transformers_serve(server, source):
    tokenizer, prompt = tiny_tokenizer(), words(3)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    generated = source.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(generated, skip_special_tokens=True)
    options = {"model": str(source.folder), "max_tokens": 6, "temperature": 0}
    assert ask(server, "completions", prompt=prompt, **options)["text"] == expected != ""
    messages = [{"role": "user", "content": prompt}]
    assert ask(server, "chat/completions", messages=messages, **options)["message"]["content"] == expected


class Experts(torch.nn.Module):
    """What a program gets that wants tensors alone: logits, and the expert of each token."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        outputs = self.model(input_ids, use_cache=False, output_router_logits=True)
        return outputs.logits, torch.stack(outputs.expert_indices)


def test_onnxruntime(source, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source.set_experts_implementation("batched_mm")  # the default sorts, for which there is no operator in ONNX
    module = Experts(source).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(module, (IDS,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=dynamic)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for ids in (IDS, IDS[:2, :5]):
        logits, experts = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        expected_logits, expected_experts = module(ids)
        assert (torch.from_numpy(experts) == expected_experts).all()
        assert_close(torch.from_numpy(logits), expected_logits, rtol=1e-4, atol=1e-4)
