"""What freezing does to a model: against plain loops, and scripts/freeze_moe.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.moe_families import tiny_moe
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer
from helpers.workplaces import load_script
from modeling_stablemoe.tables import (
    count_routes,
    freezing,
    freezing_json,
    install_tables,
    installed_layers,
    load_tables,
    mean_loss,
    measure_freezing,
    remove_tables,
)


def some_batches(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 40, (3, 9), generator=generator)} for _ in range(number)]


def test_loss_is_the_mean_over_real_tokens():
    model = tiny_moe("olmoe")
    batches = some_batches(2, 0)
    batches[1]["attention_mask"] = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 9])
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones(3, 9))
        logits = model(**batch).logits.double().log_softmax(-1)
        for row in range(3):
            for place in range(1, int(mask[row].sum())):
                total -= logits[row, place - 1, batch["input_ids"][row, place]].item()
                count += 1
    loss, tokens = mean_loss(model, batches)
    assert tokens == count
    assert loss == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        mean_loss(model, [])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4"])
def test_report_tells_agreement_and_perplexity_of_each_set_of_layers(family):
    model, counted, held_out = tiny_moe(family), some_batches(6, 0), some_batches(2, 1)
    before = model(**held_out[0]).logits
    report, made = measure_freezing(model, counted, held_out, 1.5)
    assert torch.equal(model(**held_out[0]).logits, before)
    layers = [row.layer for row in report.layers]
    assert layers == (
        [2, 3] if family == "deepseek_v4" else [0, 2]
    )  # those with a hash or without experts are left out
    counts = count_routes(model, counted, layers, with_first=True)
    seen = count_routes(model, held_out, layers)
    assert (report.counted_tokens, report.held_out_tokens, report.k, report.num_experts) == (162, 48, 2, 8)
    for place, row in enumerate(report.layers):
        table = made.tables[place]
        assert row.first == pytest.approx(counts.first[place].amax(-1).sum().item() / 162)
        assert row.chosen == pytest.approx(counts.chosen[place].topk(2).values.sum().item() / 324)
        assert row.kept == pytest.approx(counts.chosen[place].gather(1, table).sum().item() / 324)
        assert row.held_out == pytest.approx(seen.chosen[place].gather(1, table).sum().item() / 108)
        assert row.kept <= row.bound <= row.chosen
        load = torch.zeros(8).index_add(0, table.flatten(), counts.tokens.repeat_interleave(2).float())
        assert row.load_after == pytest.approx((load.max() / load.mean()).item())
        assert row.load_before == pytest.approx((counts.chosen[place].sum(0).max() / (324 / 8)).item())
        for perplexity, frozen in ((row.perplexity_alone, [place]), (row.perplexity_up_to, list(range(place + 1)))):
            install_tables(model, made.tables[frozen], [layers[each] for each in frozen])
            assert perplexity == pytest.approx(torch.tensor(mean_loss(model, held_out)[0]).exp().item(), rel=1e-6)
            remove_tables(model)
    install_tables(model, made.tables, layers)
    with pytest.raises(ValueError, match="Tables are installed in this model already"):
        measure_freezing(model, counted, held_out, 1.5)


def test_interrupted_measurement_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    model, counted, held_out = tiny_moe("olmoe"), some_batches(6, 0), some_batches(2, 1)
    measured, whole = [], measure_freezing(model, counted, held_out, 1.5)[0]

    def interrupted(*args):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(installed_layers(model))
        return mean_loss(*args)

    monkeypatch.setattr(freezing, "mean_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_freezing(model, counted, held_out, 1.5, tmp_path)
    assert installed_layers(model) == []
    measured.clear()
    monkeypatch.setattr(
        freezing, "mean_loss", lambda *args: (measured.append(installed_layers(model)), mean_loss(*args))[1]
    )
    report, _ = measure_freezing(model, counted, held_out, 1.5, tmp_path)
    assert measured == [[2], [0, 1], [0, 1, 2]]
    assert report == whole
    measure_freezing(model, counted, some_batches(2, 2), 1.5, tmp_path)
    assert len(measured) == 3 + 6  # all of another text


def test_script_writes_table_json_figure_card_and_tables(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = tiny_moe("olmoe", vocab_size=BYTE_LEVEL_SIZE)
    model.save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat and the dog and the script, the end of it. " * 30)
    script, folder = load_script("freeze_moe"), str(tmp_path)
    options = ["--text_files", f"{folder}/text.txt", "--block_size", "32", "--batch_size", "4", "--max_load", "1.5"]
    files = ["--json", f"{folder}/report.json", "--figure", f"{folder}/report.svg", "--card", f"{folder}/card.md"]
    files += ["--tables_dir", f"{folder}/tables", "--work_dir", f"{folder}/work"]
    script.main([f"{folder}/model", *options, *files])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    assert f"perplexity {report['perplexity']:.4g}" in printed
    assert printed.strip() in (tmp_path / "card.md").read_text()
    assert "<svg" in (tmp_path / "report.svg").read_text()
    assert load_file(tmp_path / "tables" / "routing_tables.safetensors")["tables"].shape == (3, BYTE_LEVEL_SIZE, 2)
    load_tables(model, tmp_path / "tables")
    script.main([f"{folder}/model", *options, *files])
    assert capsys.readouterr().out == printed
    # Under no limit each id keeps the experts that it had most often.
    script.main([f"{folder}/model", *options[:-2], "--json", f"{folder}/free.json"])
    assert "without a limit of load" in capsys.readouterr().out
    free = json.loads((tmp_path / "free.json").read_text())
    assert all(row["kept"] == row["chosen"] for row in free["layers"])
    for wrong, message in (
        (["--block_size", "5000"], "too short; give more, or lower --block_size"),
        (["--json", f"{folder}/nowhere/report.json"], "--json: there is no folder"),
        (["--max_load", "0.5"], "`max_load` is 0.5; pass a finite number >= 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([f"{folder}/model", *options, *wrong])


def test_json_names_every_number():
    report, _ = measure_freezing(tiny_moe("mixtral"), some_batches(3, 0), some_batches(1, 1), 1.5)
    assert json.loads(freezing_json(report))["layers"][0].keys() == vars(report.layers[0]).keys()
