"""The report of compare.py on results made up here: run by .ci/run."""

import json
import pathlib
import tempfile

from compare import report, shapes


def record(spec, case, symbol, us, vs_default, limit_us):
    return {
        "v": 2,
        "problem": {"spec": spec, "target": "sm_90a", "case": case},
        "variant": {"symbol": symbol},
        "kind": "time",
        "result": {"us": [us, us, us], "vs_default": vs_default, "limit_us": limit_us},
    }


def main():
    models = pathlib.Path(__file__).parent / "models"
    names = {name: linears for name, linears, _ in shapes(models)}
    assert names["square-8192"]["o"] == (8192, 8192), names
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        peers = [{"n": 64, "k": 128, "rows": 8, "us": 30.0}]
        torch = {"read_gb_per_s": 2000, "copy_gb_per_s": 1800, "gemm": peers}
        parts = {
            "verify": {"exit_code": 0, "output": {}},
            "memcheck": {"exit_code": 1, "output": None},
            "sanitizer": {"exit_code": None, "output": None},
            "torch": {"exit_code": 0, "output": torch},
            "bench-a": {"exit_code": 0, "output": {
                "points": [{"concurrency": 8, "decode_tokens_per_s": 123.5}]}},
        }
        (path / "results.json").write_text(json.dumps({"parts": parts}))
        assert len(report(folder)) == len(parts), "nothing was measured"
        gemm, decode = "gemm_n64_k128_bf16", "paged_attention_h4_v2"
        lines = [
            record(gemm, "rows 16", "many", 30.0, 1.0, 5.0),
            record(gemm, "rows 8", "default", 20.0, 1.0, 5.0),
            record(gemm, "rows 8", "fast", 10.0, 0.5, 5.0),
            record(decode, "decode 3x5", "decode", 5.0, 1.0, None),
            {"kind": "certificate", "problem": {"spec": gemm, "case": "all"}},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + "{\"kind\": \"ti"
        (path / "records" / "gpu").mkdir(parents=True)
        (path / "records" / "gpu" / "1.jsonl").write_text(text)
        table = report(folder)
        assert "memcheck: FAILED" in table and "sanitizer: skipped" in table, table
        rows = [line.split() for line in table if line.startswith(gemm)]
        assert [row[2] for row in rows] == ["8", "16"], rows
        # 2 · 64 · 128 · 8 operations in 10 µs.
        assert rows[0][3:] == ["20.0", "10.0", "0.500", "50.0", "0.0", "3.00", "fast"], rows
        assert rows[1][3:] == ["30.0", "30.0", "1.000", "16.7", "0.0", "many"], rows
        assert any(line.startswith(decode) and line.endswith("decode") for line in table), table
        assert table[-1] == "bench-a, 8 at once: 123.5 tokens/s", table
    print("the report is as expected")


if __name__ == "__main__":
    main()
