"""The model card of a run, and of the bertarized and unpacked forms of its model."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import ModelCard, constants
from tiny import SHORT

import bertarize
import masked_run_squad
import saving_prunebert
from emmental.checkpoints.counts import remaining_weights
from emmental.checkpoints.loading import load_masked


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert, squad_dir):
    out = tmp_path_factory.mktemp("card") / "movement"
    flags = f"""--model_type masked_bert --model_name_or_path {tiny_bert} --data_dir {squad_dir}
        --teacher_type bert --teacher_name_or_path {tiny_bert} --output_dir {out} --do_lower_case
        --do_train --do_eval --max_steps 4 --save_steps 0 --pruning_method topK
        --final_threshold 0.3 --cache_dir {out}.cache""".split()
    results = masked_run_squad.main([*flags, *SHORT])
    return out, flags, results


def facts(folder):
    """The metadata of a card that every form of the model must have, and the card's text."""
    card = ModelCard.load(folder / "README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    return card.data, metrics, card.text


def test_the_card_of_a_run(run):
    out, flags, results = run
    data, metrics, text = facts(out)
    assert data.pipeline_tag == "question-answering" and data.datasets == ["rajpurkar/squad"]
    assert metrics == {name: results[name] for name in ("exact", "f1")}
    percent = remaining_weights(load_masked(str(out))).linear_percent
    assert f"{percent:.1f}% of the weights of its encoder's linear layers remain" in text
    assert (
        "movement pruning (`topK` at threshold 0.3, granularity weight, " in text
        and "| data | SQuAD v1.1 |" in text
    )
    assert f"| teacher | `{flags[3]}` |" in text
    command = text.split("```bash\n")[1].split("\n```")[0].split()
    assert command[:2] == ["python", "masked_run_squad.py"]
    parser = masked_run_squad.get_parser()
    given = parser.parse_args([*flags, *SHORT])
    assert parser.parse_args(command[2:]) == given


def test_the_card_says_how_to_load(run):
    text = facts(run[0])[2]
    code = text.split("```python\n")[1].split("\n```")[0].replace('"movement"', repr(str(run[0])))
    space = {}
    exec(code, space)
    assert type(space["model"]).__name__ == "MaskedBertForQuestionAnswering"


@pytest.fixture(scope="module")
def forms(run, tmp_path_factory):
    """Folders of the bertarized model, and of a packed one that is unpacked again."""
    place = tmp_path_factory.mktemp("forms")
    bertarized = bertarize.main(
        ["--model_name_or_path", str(run[0]), "--target_model_path", str(place / "plain")]
    )
    saving_prunebert.main(["pack", str(run[0]), str(place / "file.packed")])
    saving_prunebert.main(["unpack", str(place / "file.packed"), str(place / "unpacked")])
    return {"bertarized": bertarized, "unpacked": place / "unpacked"}


@pytest.mark.parametrize("form, origin", [("bertarized", "movement"), ("unpacked", "file.packed")])
def test_the_cards_of_other_forms(run, forms, form, origin):
    _, metrics, text = facts(forms[form])
    assert metrics == facts(run[0])[1]
    assert "A plain `BertForQuestionAnswering`" in text and f"`{origin}`" in text
    made = facts(run[0])[2].split("## How it was made")[1]
    assert made.strip() in text
    percent = text.split("% of the weights")[0].split()[-1]
    assert float(percent) == pytest.approx(30, abs=0.5)


def test_a_model_without_a_card(run, tmp_path):
    (run[0] / "README.md").rename(tmp_path / "card")
    target = bertarize.main(
        ["--model_name_or_path", str(run[0]), "--target_model_path", str(tmp_path / "plain")]
    )
    (tmp_path / "card").rename(run[0] / "README.md")
    card = ModelCard.load(target / "README.md")
    assert card.data.library_name == "transformers" and "`movement`" in card.text


class Hub(BaseHTTPRequestHandler):
    """What `create_repo` and `upload_folder` ask of the hub."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            self.answer({"error": "Invalid username or password."}, status=401)
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": file["path"]} | modes for file in files]}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{self.url}/me/pruned/commit/0", "commitOid": "0" * 40}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "me/x", "sha": "0" * 40, "siblings": [], "tags": []})

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.refuses = {}, False
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(run, target):
    flags = ["--target_model_path", str(target), "--push_to_hub", "me/pruned"]
    bertarize.main(["--model_name_or_path", str(run[0]), *flags])


def test_push_to_hub(run, hub, tmp_path, capsys):
    push(run, tmp_path / "plain")
    assert "/me/pruned" in capsys.readouterr().out
    assert set(hub.files) == {path.name for path in (tmp_path / "plain").iterdir()}
    for name, content in hub.files.items():
        assert content == (tmp_path / "plain" / name).read_bytes()
    assert 'from_pretrained("me/pruned")' in hub.files["README.md"].decode()


def test_a_hub_that_refuses(run, hub, tmp_path, capsys):
    hub.refuses = True
    with pytest.raises(SystemExit) as stop:
        push(run, tmp_path / "plain")
    assert stop.value.code == 1
    assert "is written, but cannot be pushed to me/pruned" in capsys.readouterr().err
    assert (tmp_path / "plain" / "model.safetensors").exists()
