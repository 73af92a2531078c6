"""What `amoeba init` writes: a file that builds as it is, and says what else could stand in it."""

from amoeba_export.builds.config import SCHEMA_URL

TEMPLATE = f"""\
#:schema {SCHEMA_URL}

# One artifact per [[build]]. 'amoeba build' builds missing and outdated artifacts and writes amoeba.lock:
# commit both files. 'amoeba build --locked' rebuilds the same bytes without searching.

out = "dist" # artifacts, logs and reports go here

[model]
id = "demo"             # a model on the Hugging Face hub, or demo
# path = "models/mine"  # or a folder

[workload] # latencies are measured with it
prompt_tokens = 128
generate_tokens = 128
batch = 1

[defaults] # for every entry that does not set them
metric = "decode"        # decode, prefill or e2e
percentile = 50          # or 90
policy = "uniform"       # or adaptive: each layer its own counts
recipe = "quick"         # how to calibrate if no strategy is given
seed = 0
# strategy = "strategy.safetensors" # from 'amoeba calibrate'; commit it, and --locked need not calibrate again
# adapters = ["adapters/mine"]      # LoRA or SMoL, merged in
# quality_floor = 4.5               # worst accepted value of the calibrated metric
# require_measured = true           # refuse targets whose latency is an estimate

[[build]]
name = "jetson"
target = "jetson-orin-nano" # 'amoeba targets' lists them; a TOML file of your own works too
latency = "80%"             # of the full model on that target; or 50ms
formats = ["safetensors"]

# [[build]]
# name = "cpu"
# target = "cpu"
# throughput = "30tok/s"
# formats = ["onnx", "safetensors"]
# dtype = "int4"

# [[build]]
# name = "half"
# shape = "15x1" # no search: depth x width
"""
