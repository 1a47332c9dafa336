# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo
SCENE := outputs/data/demo_kept/easy/val2017/000000000001.jpg

.PHONY: install demo test test-fast test-oldest test-before test-lmms test-trl test-vllm lint format type-check all-checks bench bench-gpu accuracy photo-vlm photo-accuracy hosts plots pictures readme docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# One thread: models this small gain little from more, and lose much beside other work.
demo: export OMP_NUM_THREADS := 1
demo: install
	$(BIN)/ocvtp train --config configs/train/demo_kept.yaml --trainer.max_epochs 4
	$(BIN)/ocvtp export --checkpoint outputs/train/demo_kept/checkpoints/best.ckpt --output $(DEMO)/oc-pruner
	$(BIN)/ocvtp answer --model checkpoints/demo-vlm --pruner ocvtp --checkpoint $(DEMO)/oc-pruner \
		--num-keep 16 --image $(SCENE) --prompt "How many circles are there in the image?"
	rm -rf $(DEMO)/accuracy
	$(BIN)/ocvtp evaluate --model checkpoints/demo-vlm --dtype float32 --task scenes --num-images 40 \
		--pruners ocvtp divprune fopru visionzip ridge --checkpoint $(DEMO)/oc-pruner \
		--num-keep 16 --batch-size 64 --output $(DEMO)/accuracy
	$(BIN)/ocvtp show --model checkpoints/demo-vlm --checkpoint $(DEMO)/oc-pruner --num-keep 16 \
		--pruner ocvtp fopru visionzip hiprune:object_block=2 divprune scope zspaprune ridge \
		trim tome "fastv:stages=[[1,16]]" random --text-tower checkpoints/demo-vlm/clip \
		--prompt "How many circles are there in the image?" --image $(SCENE) --output $(DEMO)/kept.png

# One thread a process: there are two.
test test-fast test-oldest test-before: export OMP_NUM_THREADS := 1

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: install
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

# Environments on top of the other one: the oldest transformers that is supported; the last one before
# `past_key_values` was renamed `cache`; lmms-eval, which pins what others need newer; TRL's trainers; what
# builds the documentation.

OLDEST := $(VENV)/oldest
BEFORE := $(VENV)/before
LMMS := $(VENV)/lmms
TRL := $(VENV)/trl
DOCS := $(VENV)/docs
$(OLDEST)/.installed: EXTRA := "transformers==5.17.*"
$(BEFORE)/.installed: EXTRA := "transformers==5.23.*"
$(LMMS)/.installed: EXTRA := "lmms-eval>=0.7.3" "filelock<4"
$(TRL)/.installed: EXTRA := "trl>=1.16"
$(DOCS)/.installed: EXTRA := --editable ".[docs]"

$(OLDEST)/.installed $(BEFORE)/.installed $(LMMS)/.installed $(TRL)/.installed $(DOCS)/.installed: $(STAMP)
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(EXTRA)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# On older versions, of the slow tests those that every host has for every feature, and calls that keep all.
HOSTS_SLOW := tests/hosts/test_matrix.py tests/hosts/test_cache_names.py tests/hosts/test_keep_all.py tests/hosts/families \
	-k "not test_keep_all or none" -m slow

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist worksteal $(HOSTS_SLOW)
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" tests/hosts tests/bench tests/evaluation tests/encoders tests/training/test_training_layouts.py tests/commands/test_cli.py tests/demo_vlm/test_demo_vlm.py tests/demo_vlm/test_demo_vlm_batches.py tests/demo_vlm/test_demo_vlm_learner.py

test-before: $(BEFORE)/.installed
	$(BEFORE)/bin/python -m pytest --numprocesses 2 --dist worksteal $(HOSTS_SLOW)
	$(BEFORE)/bin/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" tests/hosts tests/bench

# vLLM pins torch and transformers, and takes 9 GB: an environment of its own, outside CI.
VLLM := $(VENV)/vllm

$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[vllm]" pytest pytest-timeout
	touch $@

test-vllm: export OMP_NUM_THREADS := 1
test-vllm: export VLLM_TARGET_DEVICE := cpu
test-vllm: export VLLM_ENABLE_V1_MULTIPROCESSING := 0
test-vllm: export VLLM_CPU_KVCACHE_SPACE := 1
test-vllm: export VLLM_CPU_OMP_THREADS_BIND := nobind
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/serving

test-lmms: export OMP_NUM_THREADS := 1
test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python -m pytest tests/lmms

test-trl: export OMP_NUM_THREADS := 1
test-trl: $(TRL)/.installed
	$(TRL)/bin/python -m pytest tests/trl

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type-check: install
	$(BIN)/mypy

# The documentation site, as a folder that a browser opens: outputs/site/index.html. A broken link is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m mkdocs build --strict --quiet

all-checks: lint type-check docs test test-oldest test-before test-lmms

bench: install
	$(BIN)/python -m benchmarks.road
	$(BIN)/python -m benchmarks.select
	$(BIN)/python -m benchmarks.stages

# On a CUDA device: the models of 7 B with random weights, and a training step.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu

# Every pruner on the shipped demo VLM, then the tables of the README and the documentation.
PRUNERS := ocvtp divprune scope fopru fopru:strategy=row visionzip hiprune:object_block=2 fastervlm \
	vispruner prumerge prumerge_plus holov greedyprune trimtokenator zspaprune todre visiondrop fps \
	kmeans ridge ridge:weights=none trim trim:nearest=true \
	cdpruner cdpruner:nearest=true tome vprune "fastv:stages=[[1,K]]" \
	"pyramiddrop:stages=[[1,K]]" "sparsevlm:stages=[[1,K]]" "dart:stages=[[1,K]]" \
	"topv:stages=[[1,K]]" vflowopt "vitcop:stages=[[2,K]]" todre:later=true
RESULTS := docs/results/demo-vlm

accuracy: export OMP_NUM_THREADS := 1
accuracy: install
	mkdir -p $(RESULTS)
	$(BIN)/ocvtp evaluate --model checkpoints/demo-vlm --dtype float32 --task scenes --num-images 500 \
		--pruners $(PRUNERS) --num-keep 72 36 16 8 --batch-size 64 --skip-unfit \
		--checkpoint $(wildcard checkpoints/demo-pruner/*) --text-tower checkpoints/demo-vlm/clip \
		--output outputs/accuracy --json > outputs/accuracy/summary.json
	cp outputs/accuracy/summary.json $(RESULTS)/results.json
	cp outputs/accuracy/report.md outputs/accuracy/*.png $(RESULTS)/
	$(BIN)/python -m benchmarks.readme

# A VLM that sees photographs, and every pruner on it: `make photo-vlm COCO=DIR PHOTOS=DIR TOWER=DIR`, see
# docs/photo-vlm.md. Another call continues one that was stopped.
PHOTO_VLM := outputs/photo-vlm
PHOTO_RESULTS := docs/results/photo-vlm
PHOTO_PRUNERS := $(filter-out ocvtp trim trim:% cdpruner cdpruner:%,$(PRUNERS:hiprune:%=hiprune:object_block=5))
PHOTO_IMAGES := 100

photo-vlm: export OMP_NUM_THREADS := 2
photo-vlm: install
	@test -n "$(COCO)" -a -n "$(PHOTOS)" -a -n "$(TOWER)" || { echo "pass COCO=DIR PHOTOS=DIR TOWER=DIR"; exit 2; }
	$(BIN)/python -m tools.photo_vlm train --coco $(COCO) --photos $(PHOTOS) --tower $(TOWER) --output $(PHOTO_VLM)

photo-accuracy: export OMP_NUM_THREADS := 2
photo-accuracy: install
	mkdir -p $(PHOTO_RESULTS)
	$(BIN)/ocvtp --import tools/photo_vlm/task.py evaluate --model $(PHOTO_VLM) --dtype float32 --task composites \
		--composites $(PHOTO_VLM)/composites --num-images $(PHOTO_IMAGES) --pruners $(PHOTO_PRUNERS) \
		--num-keep 288 144 64 32 --batch-size 16 --skip-unfit --output outputs/photo-accuracy --json \
		> outputs/photo-accuracy.json
	cp outputs/photo-accuracy.json $(PHOTO_RESULTS)/results.json
	cp outputs/photo-accuracy/report.md outputs/photo-accuracy/*.png $(PHOTO_RESULTS)/

# What every host can do, on the newest transformers and the oldest.
hosts: install $(OLDEST)/.installed
	$(BIN)/python -m benchmarks.hosts $(BIN)/python $(OLDEST)/bin/python

# The plots of docs/results, from the results beside them.
plots: install
	$(BIN)/python -m benchmarks.plots

# The README's picture, of the demo VLM.
pictures: export OMP_NUM_THREADS := 1
pictures: install
	$(BIN)/python -m benchmarks.pictures

# The generated tables of the README and the documentation.
readme: install
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf outputs $(VENV) .mypy_cache .ruff_cache .pytest_cache
