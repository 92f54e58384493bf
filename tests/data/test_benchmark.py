import json

from titans_pretrain.data import benchmark


def test_benchmark_measures_and_judges(tmp_path, capsys, monkeypatch):
    arguments = ["--tokens", "2000000", "--folder", str(tmp_path), "--json"]
    monkeypatch.setattr(benchmark, "TARGET", 1.0)
    assert benchmark.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["met"] is True and 0 < figures["seek_s"] < 1
    assert figures["stream_tokens_per_s"] > figures["stock_single_tokens_per_s"]
    monkeypatch.setattr(benchmark, "TARGET", 1e15)
    assert benchmark.main(arguments) == 1
