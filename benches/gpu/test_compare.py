"""The report of compare.py on results made up here: run by .ci/run."""

import json
import pathlib
import tempfile

from compare import report, shapes


def record(op, symbol, case, us, size, flops=0):
    return {
        "problem": {"op": op, "case": case, "bytes": size, "flops": flops},
        "variant": {"symbol": symbol},
        "time": {"us": [us, us, us], "gb_per_s": size / us / 1e3, "tflop_per_s": flops / us / 1e6},
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
        lines = [
            record("copy", None, "4 rows", 1.0, 10**6),
            record("gemm", "gemm_n64_k128_bf16_upto8__sm_90a", "8 rows", 10.0, 10**7, 2 * 10**9),
            record("paged_attention", "paged_attention_h4_v2__sm_90a",
                   "3 sequences of 5 tokens", 5.0, 10**6),
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "records.jsonl").write_text(text)
        table = report(folder)
        assert "memcheck: FAILED" in table and "sanitizer: skipped" in table, table
        gemm = next(line for line in table if line.startswith("gemm_n64")).split()
        # A microsecond for a thousand bytes is a gigabyte a second.
        assert gemm[-5:] == ["10.0", "1000", "50.0", "200.0", "3.00"], gemm
        assert table[-1] == "bench-a, 8 at once: 123.5 tokens/s", table
    print("the report is as expected")


if __name__ == "__main__":
    main()
