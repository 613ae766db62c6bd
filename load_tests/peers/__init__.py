"""`make bench-peers`: ours against llama.cpp, vLLM-CPU and transformers, each in a process of its own.

environments   makes the peers' virtual environments
convert        the model as a transformers directory, for the peers that read no GGUF
protocol       how the bench talks to a worker: JSON lines over its standard input and output
worker_*       one contender each; only the standard library and the contender itself are imported there
workloads      what is run, on which prompts, and the targets; contenders: who is compared
engine_runs    engine level and memory; http_runs: through HTTP
http_client    one open-loop client for every server; servers starts them
memory         what a process tree holds
record         tables, and the table of record in docs/benchmarks.md; chart draws the picture
"""
