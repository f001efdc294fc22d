"""The offline engine: a decode worker's scheduler and model in this process, with vLLM's names.

    from kvrelay import LLM, SamplingParams

    llm = LLM("Qwen/Qwen3-0.6B")
    for output in llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32)):
        print(output.outputs[0].text)

`llm` holds the class; `engine` turns requests into steps; `prompts`, `answer`, `tokenizer` are the
text on both sides; `arguments` and `memory` are about start-up. Only `engine` and what `LLM` imports
when it is constructed need torch.
"""
