"""What is published is what others get: from a hub, or rebuilt from a genome file."""
import base64
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import by, made_up, short_config, small_model, small_pools, word_tokenizer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from evoprune_nb.candidates import materialize
from evoprune_nb.data import load_pools
from evoprune_nb.history import History
from evoprune_nb.machine.files import write_json
from evoprune_nb.models import model_fingerprint
from evoprune_nb.search import Search
from evoprune_nb.ship import publish
from evoprune_nb.ship.cards import Card
from evoprune_nb.ship.export import export_hf, load_exported
from evoprune_nb.ship.publish import GenomeFile, differing_units, genome_file, publish_genome, push_to_hub, rebuild, save_masks
from evoprune_nb.source import Source
from evoprune_nb.ui.cli import main


class Hub(BaseHTTPRequestHandler):
    "As much of a model hub as an upload needs: repositories, and commits of files that travel in the request."

    def log_message(self, *_):
        pass

    def _answer(self, row: dict, status: int = 200):
        body = json.dumps(row).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = "/".join(self.path.split("/")[3:5])
        self._answer({"id": name, "sha": "0" * 40, "siblings": []}, 200 if name in self.server.repos else 404)

    def do_POST(self):
        body, repos, address = self.rfile.read(int(self.headers["Content-Length"] or 0)), self.server.repos, f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != "Bearer good":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            row = json.loads(body)
            name = f"{row['organization']}/{row['name']}"
            repos[name] = {"private": row.get("private") or row.get("visibility") == "private", "files": {}}
            self._answer({"url": f"{address}/{name}"})
        elif "/preupload/" in self.path:
            self._answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            files = repos[name]["files"]
            rows = [row["value"] for row in map(json.loads, body.splitlines()) if row["key"] == "file"]
            files.update({row["path"]: base64.b64decode(row["content"]) for row in rows})
            self._answer({"commitUrl": f"{address}/{name}/commit/0", "commitOid": "0" * 40, "success": True, "pullRequestUrl": None})
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch):
    "A hub on this machine."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.api = lambda token="good": HfApi(f"http://127.0.0.1:{server.server_address[1]}", token=token)
    monkeypatch.setattr(publish, "HfApi", server.api)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    "A search of a small model that says what it is made of, and its database."
    root = tmp_path_factory.mktemp("published")
    model = small_model("llama-gqa")
    model.save_pretrained(root / "dense")
    word_tokenizer("none").save_pretrained(root / "dense")
    source = Source(str(root / "dense"), text=str(corpus), seq_len=16, calibration_tokens=512, calibration_seed=3, multiple=16)
    dense, tokenizer = source.load_model()
    pools = load_pools(corpus, tokenizer, 16, {"calibration": 512}, progress=False)
    database = source.build_database(dense, pools, root / "run" / "database", progress=False)
    search = Search(root / "run", dense, database, small_pools(), short_config(), by(made_up), source)
    winner = search.run(progress=False)
    return root / "run", materialize(dense, database, winner), tokenizer, database


def test_a_genome_file_rebuilds_every_weight(run, tmp_path, capsys):
    "Two kilobytes, the dense model and the text give the winner, bit for bit; by command, too."
    run_dir, winner, _, database = run
    path = genome_file(History(run_dir), database).save(tmp_path / "genome.json")
    assert path.stat().st_size < 2048
    rebuilt, _, again = rebuild(GenomeFile.load(path), tmp_path / "database")
    assert model_fingerprint(rebuilt) == model_fingerprint(winner) and again.fingerprint == database.fingerprint
    assert main(["rebuild", str(path), str(tmp_path / "out"), "--database", str(tmp_path / "database")]) == 0
    assert model_fingerprint(load_exported(tmp_path / "out")[0]) == model_fingerprint(winner)
    assert "rebuilt from" in (tmp_path / "out" / "README.md").read_text() and (tmp_path / "out" / "genome.png").exists()


def test_a_pool_of_all_text_is_found_again(run, corpus, tmp_path):
    "Where the search drew its calibration blocks from more text than it needed, so does the rebuild."
    run_dir, _, tokenizer, database = run
    source = replace(History(run_dir).source, calibration_tokens=256)
    pools = load_pools(corpus, tokenizer, 16, {"calibration": None}, progress=False)
    blocks = pools["calibration"].draw(256, seed=3)
    data = publish.hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16]
    assert torch.equal(publish._calibration_blocks(source, tokenizer, data), blocks)


@pytest.mark.parametrize("change, message", [
    (dict(model="0" * 16), "name the dense model"), (dict(data="0" * 16), "name the text"), (dict(database="0" * 16), "rounds otherwise.*masks")])
def test_what_is_not_the_same_is_named(run, tmp_path, change, message):
    "Another model, text or database is an error that says which."
    file = replace(genome_file(History(run[0]), run[3]), **change)
    with pytest.raises(ValueError, match=message):
        rebuild(file, tmp_path / "database")


def test_masks_tell_rounding_from_another_model(run, tmp_path):
    "With another fingerprint, equal masks are a warning, and other masks an error that names the unit."
    run_dir, winner, _, database = run
    masks, file = save_masks(database, tmp_path / "masks.safetensors"), genome_file(History(run_dir), database)
    genome = History(run_dir).winner
    assert differing_units(database, genome, load_file(masks)) == [] and masks.stat().st_size < 4096
    with pytest.warns(UserWarning, match="same structures"):
        rebuilt, *_ = rebuild(replace(file, database="0" * 16), tmp_path / "database", masks)
    assert model_fingerprint(rebuilt) == model_fingerprint(winner)
    thin = next(unit.name for unit, level, removed in zip(database.units, genome.levels, database.space.removed) if 0 < removed[level] < unit.n_structures)
    orders = load_file(masks)
    save_file(orders | {thin: orders[thin].flip(0).contiguous()}, masks)
    with pytest.raises(ValueError, match=thin):
        rebuild(replace(file, database="0" * 16), tmp_path / "database", masks)


@pytest.mark.parametrize("row", [{}, {"format": 2}, {"format": 1, "genome": "00/00", "model": "a", "data": "b", "database": "c", "source": []}])
def test_other_files_are_no_genome_files(tmp_path, row, capsys):
    "Refused by name, before any work."
    write_json(tmp_path / "genome.json", row)
    assert main(["rebuild", str(tmp_path / "genome.json"), str(tmp_path / "out")]) == 2
    assert "is no genome file" in capsys.readouterr().err


def test_a_run_without_a_source_cannot_be_rebuilt(small, tmp_path):
    "The error says what is missing."
    Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    with pytest.raises(ValueError, match="does not say its source"):
        genome_file(History(tmp_path / "run"), small[1])


def test_what_is_pushed_is_the_directory(run, hub, tmp_path):
    "Every file arrives as it was; the card's lines name the repository, its metadata base model, relation, dataset, scores, paper."
    _, winner, tokenizer, _ = run
    card = Card("their/model", "mit", scores={"held-out perplexity": 12.5, "arc_easy acc": 0.5}, provenance={"text of calibration, tuning and scoring": "their/text:en"})
    export_hf(winner, tokenizer, tmp_path / "out", card)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    url = push_to_hub(tmp_path / "out", "you/small", private=True)
    there = hub.repos["you/small"]
    assert url.endswith("you/small") and there["private"] and there["files"].keys() == before.keys()
    assert {name for name in before if there["files"][name] != before[name]} == {"README.md"}
    found = ModelCard(there["files"]["README.md"].decode())
    data = found.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["datasets"], data["license"]) == ("their/model", "finetune", ["their/text"], "mit")
    assert "arxiv:2502.07780" in data["tags"] and 'from_pretrained("you/small"' in found.text
    assert {(row.dataset_name, row.metric_type, row.metric_value) for row in found.data.eval_results} == {("held-out", "perplexity", 12.5), ("arc_easy", "acc", 0.5)}
    for name, content in there["files"].items():
        (tmp_path / "down" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    assert model_fingerprint(load_exported(tmp_path / "down")[0]) == model_fingerprint(winner)


def test_push_command(run, hub, tmp_path, capsys):
    "Of a run: its winner, picture, genome file and masks; with --only genome, no weights; of a checkpoint: the checkpoint."
    run_dir = str(run[0])
    assert main(["push", run_dir, "you/winner"]) == main(["push", run_dir, "you/genome", "--only", "genome"]) == 0
    whole, alone = hub.repos["you/winner"]["files"], hub.repos["you/genome"]["files"]
    assert set(alone) == {"README.md", "genome.json", "masks.safetensors", "genome.png"} < set(whole) and "model.safetensors" in whole
    assert sum(map(len, alone.values())) - len(alone["genome.png"]) < 8192
    assert "evoprune rebuild" in alone["README.md"].decode() and "you/genome" in alone["README.md"].decode()
    (tmp_path / "genome.json").write_bytes(alone["genome.json"])
    assert main(["rebuild", str(tmp_path / "genome.json"), str(tmp_path / "out")]) == 0
    assert main(["push", str(tmp_path / "out"), "you/rebuilt"]) == 0 and "model.safetensors" in hub.repos["you/rebuilt"]["files"]


def test_push_refuses_in_one_line(run, hub, tmp_path, capsys, monkeypatch):
    "No owner, no card, no run, no right to write."
    export_hf(run[1], run[2], tmp_path / "out")
    for arguments, message in [((str(run[0]), "small"), "owner/name"), ((str(run[0]), "a/b/c"), "repository"), ((str(tmp_path), "you/small"), "no model card"),
                               ((str(tmp_path / "out"), "you/small", "--only", "genome"), "only a run has a genome")]:
        assert main(["push", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(publish, "HfApi", lambda: hub.api("bad"))
    assert main(["push", str(tmp_path / "out"), "you/small"]) == 2
    assert "hf auth login" in capsys.readouterr().err and not hub.repos


def test_links_out_of_a_directory_are_not_uploaded(run, hub, tmp_path):
    "A link to somebody's file stays here."
    (tmp_path / "secret").write_text("mine")
    export_hf(run[1], run[2], tmp_path / "out")
    (tmp_path / "out" / "notes.txt").symlink_to(tmp_path / "secret")
    push_to_hub(tmp_path / "out", "you/small")
    assert "notes.txt" not in hub.repos["you/small"]["files"]


def test_a_published_genome_is_a_directory_of_kilobytes(run, tmp_path):
    "Genome file, masks and card, and a used directory is refused."
    file = genome_file(History(run[0]), run[3])
    publish_genome(file, run[3], tmp_path / "genome", Card("their/model"))
    assert {path.name for path in Path(tmp_path / "genome").iterdir()} == {"README.md", "genome.json", "masks.safetensors"}
    with pytest.raises(ValueError, match="empty|exists"):
        publish_genome(file, run[3], tmp_path / "genome")
