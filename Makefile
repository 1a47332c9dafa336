# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo
SCENE := outputs/data/demo_kept/easy/val2017/000000000003.jpg

.PHONY: install environments demo test test-fast test-oldest test-before test-lmms test-trl test-vllm lint format type-check all-checks bench bench-gpu accuracy turns positions grounding learned photos photos-inputs photo-vlm photo-accuracy hosts plots cards pictures readme docs clean

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
	$(BIN)/ocvtp train --config selector/mask --trainer.max_steps 200 --trainer.val_check_interval 200 \
		--data.num_train 400 --data.num_val 20 --data.root outputs/data/demo_learned --output outputs/train/demo_learned
	$(BIN)/ocvtp export --checkpoint outputs/train/demo_learned/checkpoints/last.ckpt --output $(DEMO)/learned
	rm -rf $(DEMO)/accuracy
	$(BIN)/ocvtp evaluate --model checkpoints/demo-vlm --dtype float32 --task scenes --num-images 40 \
		--pruners ocvtp learned divprune fopru visionzip ridge --checkpoint $(DEMO)/oc-pruner $(DEMO)/learned \
		--num-keep 16 --batch-size 64 --output $(DEMO)/accuracy
	$(BIN)/ocvtp show --model checkpoints/demo-vlm --checkpoint $(DEMO)/oc-pruner --num-keep 16 \
		--pruner ocvtp learned:checkpoint=$(DEMO)/learned fopru visionzip hiprune:object_block=2 divprune scope zspaprune ridge \
		trim:nearest=true tome "fastv:stages=[[1,16]]" random --text-tower checkpoints/demo-vlm/clip \
		--prompt "How many circles are there in the image?" --image $(SCENE) --output $(DEMO)/kept.png

# Tests that were rewritten for their assertions are kept, for every process and for the next run.
unexport PYTHONDONTWRITEBYTECODE

# One thread a process.
PROCESSES := 2
test test-fast test-oldest test-before: export OMP_NUM_THREADS := 1

test: install
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal

test-fast: install
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal -m "not slow"

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

# All that CI needs, side by side: `make --jobs 2 environments`.
environments: $(STAMP) $(OLDEST)/.installed $(BEFORE)/.installed $(LMMS)/.installed $(DOCS)/.installed

# On older versions, of the slow tests those that every host has for every feature, and calls that keep all.
OF_VERSIONS := -m "not slow or versions"

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(OF_VERSIONS) tests/hosts tests/bench tests/evaluation tests/encoders tests/training/test_training_layouts.py tests/commands/test_cli.py tests/demo_vlm/test_demo_vlm.py tests/demo_vlm/test_demo_vlm_batches.py tests/demo_vlm/test_demo_vlm_learner.py

test-before: $(BEFORE)/.installed
	$(BEFORE)/bin/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(OF_VERSIONS) tests/hosts tests/bench

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
	$(LMMS)/bin/python -m pytest --numprocesses $(PROCESSES) --dist worksteal tests/lmms

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

# On a CUDA device: what is worth most first, in so many minutes; another call does the rest. docs/bench.md
GPU_MINUTES := 8
GPU_RESULTS := docs/results/gpu/device

bench-gpu: install
	$(BIN)/python -m benchmarks.gpu --minutes $(GPU_MINUTES) --output $(GPU_RESULTS)

# Those that a vision tower alone can be asked about, and all.
TOWER_PRUNERS := ocvtp divprune scope fopru fopru:strategy=row visionzip hiprune:object_block=2 fastervlm \
	vispruner prumerge prumerge_plus holov todre visiondrop fps kmeans ridge ridge:weights=none
PRUNERS := $(TOWER_PRUNERS) greedyprune trimtokenator zspaprune trim trim:nearest=true \
	cdpruner cdpruner:nearest=true tome vprune "fastv:stages=[[1,K]]" \
	"pyramiddrop:stages=[[1,K]]" "sparsevlm:stages=[[1,K]]" "dart:stages=[[1,K]]" \
	"topv:stages=[[1,K]]" vflowopt "vitcop:stages=[[2,K]]" todre:later=true

# Every pruner on the shipped demo VLM, then the tables of the README and the documentation.
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

# Whether tokens that were kept for a question serve the next ones, beside tokens chosen again for all questions.
TURNS := docs/results/turns
TURNS_ASK = $(BIN)/ocvtp evaluate --model checkpoints/demo-vlm --dtype float32 --task turns --levels easy --num-images 150 \
	--pruners learned zspaprune "sparsevlm:stages=[[1,K]]" divprune --checkpoint checkpoints/demo-learned/0 --num-keep 16 8 \
	--seeds 1 --no-controls --batch-size 64 --json

turns: export OMP_NUM_THREADS := 1
turns: install
	for how in cache no-cache; do \
		mkdir -p $(TURNS)/$$how && $(TURNS_ASK) --$$how --output outputs/turns/$$how > $(TURNS)/$$how/results.json && \
		cp outputs/turns/$$how/report.md outputs/turns/$$how/*.png $(TURNS)/$$how/ || exit 1; \
	done

# Tokens numbered from 0, and at the positions that they had.
POSITIONS := docs/results/positions

positions: export OMP_NUM_THREADS := 1
positions: install
	mkdir -p $(POSITIONS)
	$(BIN)/ocvtp evaluate --model checkpoints/demo-vlm --dtype float32 --task scenes --levels easy --num-images 200 --questions 4 \
		--pruners random divprune fopru --num-keep 36 16 --positions contiguous original --seeds 1 --no-controls --batch-size 64 \
		--output outputs/positions --json > $(POSITIONS)/results.json
	cp outputs/positions/report.md outputs/positions/*.png $(POSITIONS)/

# The demo VLM taught boxes, and what it is worth to it that tokens keep their positions. What was trained is not trained again.
GROUNDING := outputs/demo-grounding
GROUNDING_RESULTS := docs/results/grounding

grounding: export OMP_NUM_THREADS := 1
grounding: install
	$(BIN)/python -m tools.demo_grounding --output $(GROUNDING) --resume
	mkdir -p $(GROUNDING_RESULTS)
	$(BIN)/ocvtp evaluate --model $(GROUNDING) --dtype float32 --task grounding --levels easy --num-images 200 \
		--pruners divprune fopru --num-keep 36 16 --positions contiguous original --seeds 1 --batch-size 64 \
		--output $(GROUNDING)/judged --json > $(GROUNDING)/judged.json
	cp $(GROUNDING)/judged.json $(GROUNDING_RESULTS)/results.json
	cp $(GROUNDING)/judged/report.md $(GROUNDING)/judged/*.png $(GROUNDING_RESULTS)/

# Scorers that read the prompt, with three seeds: by masks first, then by the answers. Beside the best of the others on the same
# scenes: docs/learned-pruners.md. What was trained is not trained again.
LEARNED_WORK := outputs/learned
LEARNED_RESULTS := docs/results/demo-learned
LEARNED_PRUNERS := learned ocvtp zspaprune todre trimtokenator ridge
LEARNED_SEEDS := 0 1 2
LEARNED_TRAINED := $(LEARNED_SEEDS:%=$(LEARNED_WORK)/kl/%/model.safetensors)
LEARNED_TRAIN = $(BIN)/ocvtp train --config selector/$(1) --seed_everything $* --output $(LEARNED_WORK)/runs/$(1)/$* \
	--trainer.enable_progress_bar false
LEARNED_EXPORT = $(BIN)/ocvtp export --checkpoint $(LEARNED_WORK)/runs/$(1)/$*/checkpoints/last.ckpt --output $(@D)

learned: export OMP_NUM_THREADS := 1
learned: $(LEARNED_TRAINED) | install
	mkdir -p $(LEARNED_RESULTS) $(LEARNED_WORK)/judged checkpoints/demo-learned
	cp -r $(LEARNED_WORK)/kl/. checkpoints/demo-learned/
	$(BIN)/ocvtp evaluate --model checkpoints/demo-vlm --dtype float32 --task scenes --num-images 500 \
		--pruners $(LEARNED_PRUNERS) --num-keep 16 8 --batch-size 64 \
		--checkpoint $(LEARNED_SEEDS:%=checkpoints/demo-learned/%) $(wildcard checkpoints/demo-pruner/*) \
		--output $(LEARNED_WORK)/judged --json > $(LEARNED_WORK)/judged/summary.json
	cp $(LEARNED_WORK)/judged/summary.json $(LEARNED_RESULTS)/results.json
	cp $(LEARNED_WORK)/judged/report.md $(LEARNED_WORK)/judged/*.png $(LEARNED_RESULTS)/

$(LEARNED_SEEDS:%=$(LEARNED_WORK)/mask/%/model.safetensors): $(LEARNED_WORK)/mask/%/model.safetensors: \
		configs/train/selector/mask.yaml | install
	$(call LEARNED_TRAIN,mask)
	$(call LEARNED_EXPORT,mask)

$(LEARNED_TRAINED): $(LEARNED_WORK)/kl/%/model.safetensors: configs/train/selector/kl.yaml $(LEARNED_WORK)/mask/%/model.safetensors
	$(call LEARNED_TRAIN,kl) --model.warm_start $(LEARNED_WORK)/mask/$*
	$(call LEARNED_EXPORT,kl)

# The learned pruner on photographs without labels, with a pretrained tower: docs/photographs.md. Whatever is there is not
# made again, so that the same command goes on after a stop. COCO judges, and nothing is trained on it.
PHOTOS ?= data/photos
COCO ?= data/coco
PHOTO_SEEDS := 0 1 2
PHOTO_VAL := 50
PHOTO_TRAIN :=
PHOTO_JUDGE :=
PHOTO_WORK := outputs/photos
PHOTO_RESULTS := docs/results/photos
PHOTO_PRUNERS := checkpoints/photo-pruner
PHOTO_COCO := train2017 val2017 annotations/instances_train2017.json annotations/instances_val2017.json
PHOTO_TOWER := $(PHOTO_WORK)/tower/model.safetensors
PHOTO_FEATURES := $(PHOTO_WORK)/features/manifest.json
PHOTO_EARLY := $(PHOTO_WORK)/features-surprise/manifest.json
PHOTO_KEPT := $(PHOTO_SEEDS:%=$(PHOTO_WORK)/pruners/kept/%/model.safetensors)
PHOTO_SLOTS := $(PHOTO_SEEDS:%=$(PHOTO_WORK)/pruners/slots/%/model.safetensors)
PHOTO_SURPRISE := $(PHOTO_SEEDS:%=$(PHOTO_WORK)/pruners/surprise/%/model.safetensors)
PHOTO_TRAINED := $(PHOTO_SURPRISE) $(PHOTO_KEPT) $(PHOTO_SLOTS)
PHOTO_READS := --tower local-dir:$(PHOTO_WORK)/tower --img-size 336
PHOTO_INPUTS := PHOTOS=$(PHOTOS) COCO=$(COCO) PHOTO_VAL=$(PHOTO_VAL) PHOTO_TRAIN=$(PHOTO_TRAIN) PHOTO_JUDGE=$(PHOTO_JUDGE)
PHOTO_SHOWN := ridge scope fastervlm random
PHOTO_VARIANTS := surprise surprise:balance=0.5 surprise:balance=0.9 surprise:surprise_power=0 surprise:attention_power=0 \
	surprise:head=mean,attention_power=1.5,balance=0.5

# Two trainings of one thread each take less than one after the other of two.
photos: export OMP_NUM_THREADS := 2
photos: $(PHOTO_FEATURES) $(PHOTO_EARLY) | photos-inputs install
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 $(PHOTO_TRAINED)
	$(MAKE) --no-print-directory $(PHOTO_WORK)/judged/summary.json $(PHOTO_WORK)/surprise.png $(PHOTO_WORK)/kept.png $(PHOTO_WORK)/slots.png
	mkdir -p $(PHOTO_RESULTS) $(PHOTO_PRUNERS)
	cp $(PHOTO_WORK)/judged/summary.json $(PHOTO_RESULTS)/results.json
	cp $(PHOTO_WORK)/judged/report.md $(PHOTO_WORK)/judged/*.png $(PHOTO_WORK)/hidden/*.png $(PHOTO_RESULTS)/
	cp -r $(PHOTO_WORK)/pruners/surprise/. $(PHOTO_PRUNERS)/

photos-inputs:
	@test -d "$(PHOTOS)" || { echo "make photos: there is no folder $(PHOTOS); put photographs into it" \
		"(of anything, no labels are read), or pass PHOTOS=DIR" >&2; exit 1; }
	@for name in $(PHOTO_COCO); do test -e "$(COCO)/$$name" || { echo "make photos: there is no $(COCO)/$$name; put COCO's" \
		"images and masks there ($(PHOTO_COCO)), or pass COCO=DIR" >&2; exit 1; }; done
	@mkdir -p $(PHOTO_WORK); test -e $(PHOTO_WORK)/inputs || echo "$(PHOTO_INPUTS)" > $(PHOTO_WORK)/inputs
	@test "$(PHOTO_INPUTS)" = "$$(cat $(PHOTO_WORK)/inputs)" || { echo "make photos: $(PHOTO_WORK) is of" \
		"$$(cat $(PHOTO_WORK)/inputs); pass these, or remove that folder" >&2; exit 1; }

$(PHOTO_TOWER): | photos-inputs install
	$(BIN)/python -m tools.photo_tower $(@D)

$(PHOTO_FEATURES): PHOTO_RECIPE := kept
$(PHOTO_EARLY): PHOTO_RECIPE := surprise
$(PHOTO_FEATURES) $(PHOTO_EARLY): $(PHOTO_TOWER) | photos-inputs
	$(BIN)/ocvtp extract --config configs/train/photos_$(PHOTO_RECIPE).yaml --data ocvtp.data.folder.FolderDataModule \
		--data.root $(PHOTOS) --data.num_val $(PHOTO_VAL) --data.batch_size 8 --output $(@D)

# The last step is exported: seeds of as many steps are averaged. It needs no checkpoint to go on from then, so that settings
# that are changed start from nothing; and what was judged was another pruner.
$(PHOTO_KEPT): configs/train/photos_kept.yaml
$(PHOTO_SLOTS): configs/train/photos_slots.yaml
$(PHOTO_SURPRISE): configs/train/photos_surprise.yaml
$(PHOTO_KEPT) $(PHOTO_SLOTS): $(PHOTO_FEATURES)
$(PHOTO_SURPRISE): $(PHOTO_EARLY)
$(PHOTO_TRAINED): $(PHOTO_WORK)/pruners/%/model.safetensors:
	$(BIN)/ocvtp train --config configs/train/photos_$(*D).yaml --seed_everything $(*F) --output $(PHOTO_WORK)/runs/$* \
		--trainer.enable_progress_bar false $(PHOTO_TRAIN) $(if $(wildcard $(PHOTO_WORK)/runs/$*/checkpoints/last.ckpt),--resume last)
	$(BIN)/ocvtp export --checkpoint $(PHOTO_WORK)/runs/$*/checkpoints/last.ckpt --output $(@D)
	rm -rf $(PHOTO_WORK)/runs/$*/checkpoints $(PHOTO_WORK)/judged

$(PHOTO_WORK)/judged/summary.json: $(PHOTO_TRAINED) | photos-inputs
	mkdir -p $(@D)
	$(BIN)/ocvtp evaluate $(PHOTO_READS) --task coverage --images $(COCO)/train2017 $(COCO)/val2017 \
		--instances $(COCO)/annotations/instances_train2017.json $(COCO)/annotations/instances_val2017.json $(PHOTO_JUDGE) \
		--pruners $(subst object_block=2,object_block=4,$(TOWER_PRUNERS)) $(PHOTO_VARIANTS) --num-keep 128 64 32 16 --batch-size 16 --skip-unfit \
		--checkpoint $(patsubst %/,%,$(dir $(PHOTO_TRAINED))) --output $(@D) --json > $(@D)/summary.part
	mv $(@D)/summary.part $@

# Photographs of others are in no repository: of them, only the pictures without a pixel of them are copied from here.
$(PHOTO_WORK)/surprise.png: PHOTO_LEARNED := surprise
$(PHOTO_WORK)/kept.png $(PHOTO_WORK)/slots.png: PHOTO_LEARNED := ocvtp
$(PHOTO_WORK)/surprise.png $(PHOTO_WORK)/kept.png $(PHOTO_WORK)/slots.png: $(PHOTO_WORK)/%.png: $(PHOTO_TRAINED) | photos-inputs
	$(BIN)/ocvtp show $(PHOTO_READS) --pruner $(PHOTO_LEARNED) $(PHOTO_SHOWN) --checkpoint $(PHOTO_WORK)/pruners/$*/$(firstword $(PHOTO_SEEDS)) \
		--num-keep 32 --image $(wordlist 1,3,$(sort $(wildcard $(COCO)/val2017/*.jpg))) --output $(PHOTO_WORK)/hidden/$*.png \
		--hide-image
	$(BIN)/ocvtp show $(PHOTO_READS) --pruner $(PHOTO_LEARNED) $(PHOTO_SHOWN) --checkpoint $(PHOTO_WORK)/pruners/$*/$(firstword $(PHOTO_SEEDS)) \
		--num-keep 32 --image $(wordlist 1,3,$(sort $(wildcard $(COCO)/val2017/*.jpg))) --output $@

# A VLM that sees photographs, and every pruner on it: `make photo-vlm COCO=DIR PHOTOS=DIR TOWER=DIR`, see
# docs/photo-vlm.md. Another call continues one that was stopped.
PHOTO_VLM := outputs/photo-vlm
PHOTO_VLM_RESULTS := docs/results/photo-vlm
PHOTO_VLM_PRUNERS := $(filter-out ocvtp trim trim:% cdpruner cdpruner:%,$(PRUNERS:hiprune:%=hiprune:object_block=5))
PHOTO_IMAGES := 100
PHOTO_QUESTIONS := 4
TOWER ?= $(PHOTO_WORK)/tower

photo-vlm: export OMP_NUM_THREADS := 2
photo-vlm: install
	@for name in "$(COCO)" "$(PHOTOS)" "$(TOWER)"; do test -d "$$name" || { echo "make photo-vlm: there is no folder" \
		"$$name; pass COCO=DIR PHOTOS=DIR TOWER=DIR (python -m tools.photo_tower writes a tower)" >&2; exit 1; }; done
	$(BIN)/python -m tools.photo_vlm train --coco $(COCO) --photos $(PHOTOS) --tower $(TOWER) --output $(PHOTO_VLM)

photo-accuracy: export OMP_NUM_THREADS := 2
photo-accuracy: install
	mkdir -p $(PHOTO_VLM_RESULTS)
	$(BIN)/ocvtp --import tools/photo_vlm/task.py evaluate --model $(PHOTO_VLM) --dtype float32 --task composites \
		--composites $(PHOTO_VLM)/composites --num-images $(PHOTO_IMAGES) --questions $(PHOTO_QUESTIONS) \
		--pruners surprise $(PHOTO_VLM_PRUNERS) --num-keep 288 144 64 32 --batch-size 16 --skip-unfit \
		--checkpoint $(wildcard $(PHOTO_PRUNERS)/[0-9]*) --output outputs/photo-accuracy --json \
		> outputs/photo-accuracy.json
	cp outputs/photo-accuracy.json $(PHOTO_VLM_RESULTS)/results.json
	cp outputs/photo-accuracy/report.md outputs/photo-accuracy/*.png $(PHOTO_VLM_RESULTS)/

# What every host can do, on the newest transformers and the oldest.
hosts: install $(OLDEST)/.installed
	$(BIN)/python -m benchmarks.hosts $(BIN)/python $(OLDEST)/bin/python

# The plots of docs/results, from the results beside them.
plots: install
	$(BIN)/python -m benchmarks.plots

# The model cards of what is shipped, from their config.json and docs/results.
CARD = $(BIN)/ocvtp card $(1) --results docs/results/$(2) --data $(3) --license apache-2.0 --output $(1)/README.md

cards: install
	for seed in 0 1 2; do \
		$(call CARD,checkpoints/demo-pruner/$$seed,demo-vlm,"3000 drawn scenes (configs/train/demo_kept.yaml)") && \
		$(call CARD,checkpoints/photo-pruner/$$seed,photos,"650 photographs without labels (docs/photographs.md)") || exit 1; \
	done

# The README's picture, of the demo VLM.
pictures: export OMP_NUM_THREADS := 1
pictures: install
	$(BIN)/python -m benchmarks.pictures

# The generated tables of the README and the documentation.
readme: install
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf outputs $(VENV) .mypy_cache .ruff_cache .pytest_cache
