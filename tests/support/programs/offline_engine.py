"""`sglang.Engine`: tokens of an answer, and our layers' forwards.

Given: a model, a prompt, and how many tokens. A file, for the host's child processes import their
parent's main module.
"""

import sglang
from program_io import emit, given


def main():
    """Start, ask, and end."""
    model, prompt, tokens = given()
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        max_total_tokens=8192,
        context_length=2048,
        disable_radix_cache=True,
        random_seed=0,
        log_level="warning",
    )
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    answer = engine.generate(prompt, sampling, return_logprob=True)
    (state,) = [s["moe_plugin"] for s in engine.get_server_info()["internal_states"]]
    engine.shutdown()
    pairs = answer["meta_info"]["output_token_logprobs"]
    emit([[pair[1] for pair in pairs], state["layer_forwards"]])


if __name__ == "__main__":
    main()
