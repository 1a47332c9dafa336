"""What is compared between vLLM and transformers."""

from __future__ import annotations

from ocvtp.serving.vllm_check import Found, compare


def test_what_differs_is_told_by_request():
    found = [Found("?", [144], [16], 30, [5, 2]), Found("?", [144], [16], 31, [7, 2])]
    compare(found, [(30, [5, 2]), (31, [7, 2])], "prompts at once")
    assert [one.differs for one in found] == [[], []]
    compare(found, [(30, [6, 2]), (159, [7, 2])], "in chunks of 64")
    assert found[0].differs == [
        "request 0 (in chunks of 64): vLLM answers [6, 2], and transformers [5, 2] (tokens)"
    ]
    assert found[1].differs == [
        "request 1 (in chunks of 64): its prompt has 159 tokens in vLLM, and 31 in transformers"
    ]
