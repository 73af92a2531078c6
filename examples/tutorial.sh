#!/usr/bin/env bash
# The commands of the tutorial (docs/tutorial.md shows its parts). Run it in a clone, after `make setup`:
#
#     . .venv/bin/activate && bash examples/tutorial.sh
#
# It needs no GPU and writes what it makes to dist/.
set -euo pipefail

# [start:look]
amoeba doctor
amoeba targets
# [end:look]

# [start:calibrate]
amoeba calibrate demo --recipe quick --out dist/strategy.safetensors
amoeba inspect dist/strategy.safetensors
# [end:calibrate]

# [start:data]
head -n 500 calibration/dolly/dolly.jsonl > dist/train.jsonl
head -c 60000 calibration/wikitext2/wikitext2.txt > dist/valid.txt
# [end:data]

# [start:finetune]
amoeba finetune demo --strategy dist/strategy.safetensors --data dist/train.jsonl --out dist/adapter \
    --max-steps 60 --batch-size 2 --max-length 256 --rank 8 --learning-rate 0.001
# [end:finetune]

# [start:evaluate]
amoeba evaluate demo --strategy dist/strategy.safetensors --adapter dist/adapter --text dist/valid.txt \
    --window 256 --windows 8 --grid --depths 30,27,24 --widths 1,0.875,0.75 --plot dist/quality.png
# [end:evaluate]

# [start:search]
amoeba search demo --strategy dist/strategy.safetensors --adapter dist/adapter --target cpu --latency 70% --dtype fp32
# [end:search]

# [start:export]
amoeba export demo --strategy dist/strategy.safetensors --adapter dist/adapter --target cpu --latency 70% --dtype fp32 \
    --refit fast --out dist/small
# [end:export]

# [start:verify]
amoeba verify dist/small --model demo --strategy dist/strategy.safetensors --adapter dist/adapter
# [end:verify]

# [start:compare]
amoeba export demo --adapter dist/adapter --shape 30x1 --target cpu --dtype fp32 --out dist/whole
amoeba bench dist/whole dist/small --plot dist/bench.png
# [end:compare]

# [start:run]
python - << 'END'
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("dist/small/safetensors")
tokenizer = AutoTokenizer.from_pretrained("dist/small/safetensors")
prompt = tokenizer("The three largest cities in France are", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True))
END
# [end:run]
